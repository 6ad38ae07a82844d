"""transformers' own GPT2LMHeadModel: the baseline written as one, which needs no remote code, and any of them read.

GPT-2 keeps query, key and value in one matrix, stores matrices transposed (Conv1D: inputs × outputs), and has biases
everywhere; where the training model has none, they are zero.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megameta.checkpoint.tensor_file import LazyTensors, MadeTensors, TensorEntry, entry_of
from megameta.hf.foreign import HFValues
from megameta.model import ModelConfig

if TYPE_CHECKING:
    from transformers import GPT2Config

#: Section of config.json that holds what GPT2Config cannot say (the meta-token's id, whether there were biases).
CONFIG_SECTION = "megameta"
#: Buffers that older versions of transformers stored among the weights: causal masks.
IGNORED = re.compile(r"\.attn\.(masked_)?bias$")
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
#: Names of activations in configurations; gelu_new and gelu_fast are the tanh form in other spellings.
HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
#: Export ← training model, inside a block; matrices are transposed, and c_attn joins three.
_BLOCK = {
    "ln_1": "norm_1",
    "attn.c_proj": "attention.o_proj",
    "ln_2": "norm_2",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")


def fits_gpt2(config: ModelConfig) -> bool:
    """Whether GPT2LMHeadModel computes exactly what this model computes."""
    return (
        not config.meta_attention
        and config.position == "ape"
        and config.norm == "layernorm"
        and config.activation in _ACTIVATIONS
        and config.num_key_value_heads == config.num_heads
        and not (config.qk_norm or config.parallel_residual)
        and not (config.zero_meta_positions or config.zero_meta_embedding)
    )


def make_gpt2_config(config: ModelConfig) -> "GPT2Config":
    """The stock configuration, and the training model's own beside it."""
    from transformers import GPT2Config

    own = {name: value for name, value in config.to_dict().items() if name != "attention_backend"}
    section: dict[str, Any] = {CONFIG_SECTION: own}
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_position_embeddings,
        n_embd=config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_inner=config.intermediate_size,
        activation_function=_ACTIVATIONS[config.activation],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=config.norm_eps,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        **section,
    )


def to_gpt2(config: ModelConfig, tensors: Mapping[str, Tensor]) -> MadeTensors:
    """Canonical tensors as GPT2LMHeadModel's, each made when it is asked for."""
    made: dict[str, tuple[TensorEntry, Callable[[], Tensor]]] = {}

    def same(target: str, source: str) -> None:
        made[target] = (entry_of(tensors, source)._replace(name=target), partial(tensors.__getitem__, source))

    def both(target: str, sources: tuple[str, ...]) -> None:
        first = entry_of(tensors, f"{sources[0]}.weight")
        rows = sum(entry_of(tensors, f"{source}.weight").shape[0] for source in sources)
        shape = (first.shape[1], rows) if len(first.shape) == 2 else (rows,)
        weight = TensorEntry(f"{target}.weight", shape, first.dtype)
        made[weight.name] = (weight, partial(_weight, tensors, sources))
        bias = TensorEntry(f"{target}.bias", (rows,), first.dtype)
        made[bias.name] = (bias, partial(_bias, tensors, sources))

    same("transformer.wte.weight", "embedding.tokens.weight")
    same("transformer.wpe.weight", "embedding.positions.weight")
    if not config.tie_embeddings:
        same("lm_head.weight", "head.output.weight")
    for layer in range(config.num_layers):
        for target, source in _BLOCK.items():
            both(f"transformer.h.{layer}.{target}", (f"blocks.{layer}.{source}",))
        both(f"transformer.h.{layer}.attn.c_attn", tuple(f"blocks.{layer}.{source}" for source in _QKV))
    both("transformer.ln_f", ("head.norm",))
    return MadeTensors(made)


def _weight(tensors: Mapping[str, Tensor], sources: tuple[str, ...]) -> Tensor:
    weights = [tensors[f"{source}.weight"] for source in sources]
    return torch.cat(weights).T.contiguous() if weights[0].ndim == 2 else weights[0]


def _bias(tensors: Mapping[str, Tensor], sources: tuple[str, ...]) -> Tensor:
    biases = []
    for source in sources:
        if f"{source}.bias" in tensors:
            biases.append(tensors[f"{source}.bias"])
        else:
            weight = entry_of(tensors, f"{source}.weight")
            biases.append(torch.zeros(weight.shape[0], dtype=weight.dtype))
    return torch.cat(biases)


def read_gpt2_config(values: HFValues) -> dict[str, Any]:
    """Fields of ``ModelConfig``, but the vocabulary's, of a GPT-2 from elsewhere.

    Raises:
        UserError: it computes something that the training model cannot.
    """
    values.expect("scale_attn_weights", True, default=True)
    values.expect("scale_attn_by_inverse_layer_idx", False, default=False)
    values.expect("add_cross_attention", False, default=False)
    width = values.get("n_embd", 768)
    return {
        "hidden_size": width,
        "num_layers": values.get("n_layer", 12),
        "num_heads": values.get("n_head", 12),
        "num_key_value_heads": values.get("n_head", 12),
        "intermediate_size": values.get("n_inner", None) or 4 * width,
        "position": "ape",
        "max_position_embeddings": values.get("n_positions", 1024),
        "norm": "layernorm",
        "norm_eps": values.get("layer_norm_epsilon", 1e-5),
        "bias": True,
        "activation": values.choice("activation_function", HF_ACTIVATIONS, default="gelu_new"),
        "qk_norm": False,
        "parallel_residual": False,
        "tie_embeddings": values.get("tie_word_embeddings", True),
    }


def read_gpt2_section(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The configuration that ``make_gpt2_config`` stored; with biases also where they are no longer zero."""
    own = dict(values[CONFIG_SECTION])
    biases = [name for name in tensors if name.endswith(".bias")]
    own["bias"] = own["bias"] or any(bool(tensors[name].any()) for name in biases)
    return ModelConfig(**own)


def from_gpt2(config: ModelConfig, stored: LazyTensors) -> MadeTensors:
    """Canonical tensors from GPT2LMHeadModel's (or GPT2Model's, whose names lack a prefix): the inverse of ``to_gpt2``,
    each made when it is asked for. Biases are left out where the configuration has none.

    Raises:
        KeyError: one is missing.
    """
    prefix = "" if "wte.weight" in stored else "transformer."
    made: dict[str, tuple[TensorEntry, Callable[[], Tensor]]] = {}

    def same(target: str, source: str) -> None:
        made[target] = (stored.entry(source)._replace(name=target), partial(stored.__getitem__, source))

    def both(targets: tuple[str, ...], source: str) -> None:
        for leaf in ("weight", "bias") if config.bias else ("weight",):
            entry = stored.entry(f"{prefix}{source}.{leaf}")
            *inputs, rows = entry.shape
            shape = (rows // len(targets), *inputs)
            for number, target in enumerate(targets):
                name = f"{target}.{leaf}"
                piece = partial(_piece, stored, entry.name, number * shape[0], shape[0])
                made[name] = (TensorEntry(name, shape, entry.dtype), piece)

    same("embedding.tokens.weight", f"{prefix}wte.weight")
    same("embedding.positions.weight", f"{prefix}wpe.weight")
    for layer in range(config.num_layers):
        for source, target in _BLOCK.items():
            both((f"blocks.{layer}.{target}",), f"h.{layer}.{source}")
        both(tuple(f"blocks.{layer}.{target}" for target in _QKV), f"h.{layer}.attn.c_attn")
    both(("head.norm",), "ln_f")
    if not config.tie_embeddings:
        same("head.output.weight", "lm_head.weight")
    return MadeTensors(made)


def _piece(stored: Mapping[str, Tensor], name: str, start: int, count: int) -> Tensor:
    """Some outputs of a matrix, which is transposed, or of a vector."""
    piece = stored[name][..., start : start + count]
    return (piece.T if piece.ndim == 2 else piece).contiguous()
