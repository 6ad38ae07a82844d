"""Shape and switches of the model. A plain dataclass, so that an exported model needs no other package."""

import dataclasses
import math
from typing import ClassVar, Literal

Position = Literal["rope", "ape", "none", "rnope"]
PositionScaling = Literal["none", "linear", "ntk", "yarn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the model computes (spec §2 and §3). The defaults are the paper's 152 M Meta + RoPE model.

    Raises:
        ValueError: where two values contradict each other; the message names the keys.
    """

    # Read by pydantic where the run configuration embeds this class; nothing here imports it.
    __pydantic_config__: ClassVar[dict] = {"extra": "forbid", "use_attribute_docstrings": True}

    vocab_size: int = 50258
    """Entries of the vocabulary with the meta-token, before padding. Taken from data.tokenizer where that is given."""
    meta_token_id: int = -1
    """Id of the meta-token. Default: the last id. Taken from data.tokenizer where that is given."""
    hidden_size: int = 768
    """Width D of the residual stream."""
    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 12
    """Query heads H of either attention branch; the head width is hidden_size / num_heads."""
    num_key_value_heads: int = 0
    """Key and value heads (grouped-query attention). Default: num_heads."""
    intermediate_size: int = 0
    """Width F of the MLP. Default: 4 × hidden_size."""
    position: Position = "rope"
    """rope, ape (learned absolute), none (NoPE), or rnope (rope in even layers, none in odd ones)."""
    max_position_embeddings: int = 1024
    """Longest sequence trained on; the number of rows of the position table under ape."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_fraction: float = 1.0
    """Share of each head's width that is rotated (1.0: all of it; GPT-NeoX uses 0.25)."""
    position_scaling: PositionScaling = "none"
    """Context extension of rope, rnope: yarn, ntk (a larger base), linear (positions interpolated); see docs."""
    position_scaling_factor: float = 1.0
    """How many times the original window the model shall reach; above 1 with position_scaling."""
    original_max_position_embeddings: int = 0
    """Window before the extension, which yarn's frequencies depend on. Must be given with position_scaling; otherwise
    it is max_position_embeddings."""
    yarn_beta_fast: float = 32.0
    """yarn: channels that turn more often than this in the original window stay as they are."""
    yarn_beta_slow: float = 1.0
    """yarn: channels that turn less often than this are interpolated in full."""
    yarn_attention_factor: float = 1.0
    """yarn: times 0.1 · ln(factor) + 1 it multiplies cos and sin, so logits by its square."""
    meta_attention: bool = True
    """Whether blocks have the meta-attention branch."""
    meta_layers: tuple[int, ...] | None = None
    """Layers whose blocks have the branch, counted from 0. Default: all."""
    zero_meta_positions: bool = False
    """Remove the positional signal at meta-tokens (rope: angle 0; ape: no position vector)."""
    zero_meta_embedding: bool = False
    """Replace the token embedding of the meta-token by zeros (spec §3: hurts; for ablations)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before each branch and before the head."""
    norm_eps: float = 1e-5
    """Added to the variance inside the normalisation."""
    bias: bool = False
    """Whether projections and LayerNorms have biases."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    """Activation of the MLP; swiglu adds a gate projection."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head before rotation."""
    parallel_residual: bool = False
    """Feed all branches of a block from the same input (GPT-NeoX) instead of one after another."""
    tie_embeddings: bool = True
    """Share the token embedding with the output projection."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights (GPT-2)."""
    attention_backend: Literal["auto", "sdpa", "flash"] = "auto"
    """Attention kernel. auto: flash-attn (2, 3 or 4) on a GPU where it is installed, else torch's sdpa."""

    def __post_init__(self) -> None:
        self._check_scaling()
        defaults = {
            "meta_token_id": (-1, self.vocab_size - 1),
            "num_key_value_heads": (0, self.num_heads),
            "original_max_position_embeddings": (0, self.max_position_embeddings),
            "intermediate_size": (0, 4 * self.hidden_size),
        }
        for name, (unset, value) in defaults.items():
            if getattr(self, name) == unset:
                object.__setattr__(self, name, value)
        self._check()
        if self.meta_layers is not None:
            self._check_meta_layers()
            # One value for one model: in order, and none where it is all of them.
            layers = tuple(sorted(self.meta_layers))  # a list where it comes from JSON
            object.__setattr__(self, "meta_layers", layers if len(layers) < self.num_layers else None)

    def _check(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.meta_token_id < self.vocab_size:
            raise ValueError(f"meta_token_id {self.meta_token_id} is not an id below vocab_size {self.vocab_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_key_value_heads < 1 or self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.uses_rope and (self.rotary_size < 2 or self.rotary_size % 2):
            raise ValueError(
                f"rotary_fraction {self.rotary_fraction} of head width {self.head_size} rotates"
                f" {self.rotary_size} channels; an even number of at least 2 is needed"
            )
        if self.position_scaling == "ntk" and self.rotary_size < 4:
            raise ValueError(f"position_scaling ntk needs 4 rotated channels or more, and there are {self.rotary_size}")

    def _check_scaling(self) -> None:
        """Before defaults are filled in: the window before an extension has none that would be right."""
        scaling, factor = self.position_scaling, self.position_scaling_factor
        window = self.original_max_position_embeddings
        if scaling != "none" and not self.uses_rope:
            raise ValueError(
                f"position_scaling {scaling} extends rotary positions, and position is {self.position}: learned"
                " positions end at their window, and none has nothing to scale; take position_scaling away"
            )
        if scaling == "none" and factor != 1.0:
            raise ValueError(
                f"position_scaling_factor {factor} has no effect without position_scaling: say how (yarn, ntk, linear),"
                " or leave the factor out"
            )
        if scaling != "none" and not 1.0 < factor < math.inf:
            raise ValueError(
                f"position_scaling {scaling} needs a position_scaling_factor above 1 (how many times the original"
                f" window), not {factor}"
            )
        if window < 0 or (window == 0 and scaling != "none"):
            raise ValueError(
                f"position_scaling {scaling} needs original_max_position_embeddings: the window before the extension,"
                " as a number of at least 1 (the sequence length of the run that the weights come from)"
            )
        yarn = (self.yarn_beta_fast, self.yarn_beta_slow, self.yarn_attention_factor)
        if scaling != "yarn" and yarn != (32.0, 1.0, 1.0):
            raise ValueError(
                f"yarn_beta_fast, yarn_beta_slow and yarn_attention_factor {yarn} have no effect with position_scaling"
                f" {scaling}: set it to yarn, or leave them out"
            )
        if not (0 < self.yarn_beta_slow < self.yarn_beta_fast < math.inf and 0 < self.yarn_attention_factor < math.inf):
            raise ValueError(
                f"yarn_beta_slow {self.yarn_beta_slow} must be below yarn_beta_fast {self.yarn_beta_fast}, and they and"
                f" yarn_attention_factor {self.yarn_attention_factor} above 0"
            )

    def _check_meta_layers(self) -> None:
        layers = list(self.meta_layers or ())
        if not self.meta_attention:
            raise ValueError(
                f"meta_layers {layers} says where the branch stands, and meta_attention is false: leave meta_layers out"
                " (null), or set meta_attention to true"
            )
        if not layers:
            raise ValueError(
                "meta_layers is empty: leave it out (null) for a branch in all layers, or set meta_attention to false"
                " for none"
            )
        if outside := [layer for layer in layers if not 0 <= layer < self.num_layers]:
            raise ValueError(
                f"meta_layers {layers}: there is no layer {outside[0]}; num_layers {self.num_layers} makes them"
                f" 0 to {self.num_layers - 1}"
            )
        if twice := [layer for layer in layers if layers.count(layer) > 1]:
            raise ValueError(f"meta_layers {layers} names layer {twice[0]} more than once: name each layer once")

    @property
    def head_size(self) -> int:
        """Width K of one head."""
        return self.hidden_size // self.num_heads

    @property
    def uses_rope(self) -> bool:
        """Whether any layer rotates its queries and keys."""
        return self.position in ("rope", "rnope")

    @property
    def rotary_size(self) -> int:
        """Channels of each head that are rotated."""
        return round(self.head_size * self.rotary_fraction)

    def layer_uses_rope(self, layer: int) -> bool:
        """Whether this layer rotates. rnope alternates, starting with a rotated layer (ours)."""
        return self.position == "rope" or (self.position == "rnope" and layer % 2 == 0)

    def layer_has_meta(self, layer: int) -> bool:
        """Whether this layer has the meta-attention branch."""
        return self.meta_attention and (self.meta_layers is None or layer in self.meta_layers)

    def count_meta_layers(self, first: int = 0, end: int | None = None) -> int:
        """How many of the layers [first, end) have the branch; of all layers by default."""
        return sum(map(self.layer_has_meta, range(first, self.num_layers if end is None else end)))

    @property
    def num_residual_adds(self) -> int:
        """How often the residual stream is added to; the square root divides initial residual projections (spec §2)."""
        return 2 * self.num_layers + self.count_meta_layers()

    def padded_vocab_size(self, multiple: int = 128) -> int:
        """Rows of the embedding table: vocab_size rounded up to a multiple (spec §2: 128 × tensor-parallel size)."""
        return -(-self.vocab_size // multiple) * multiple

    def to_dict(self) -> dict:
        """The fields by name."""
        return dataclasses.asdict(self)
