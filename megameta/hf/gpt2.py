"""The baseline as transformers' own GPT2LMHeadModel, which needs no remote code.

GPT-2 keeps query, key and value in one matrix, stores matrices transposed (Conv1D: inputs × outputs), and has biases
everywhere; where the training model has none, they are zero.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megameta.checkpoint.tensor_file import MadeTensors, TensorEntry, entry_of
from megameta.errors import UserError
from megameta.model import ModelConfig

if TYPE_CHECKING:
    from transformers import GPT2Config

#: Section of config.json that holds what GPT2Config cannot say (the meta-token's id, whether there were biases).
CONFIG_SECTION = "megameta"
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
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


def from_gpt2(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The inverse of ``to_gpt2``; biases are kept where the model had them or where they are no longer zero.

    Args:
        values: the contents of config.json.

    Raises:
        UserError: a GPT-2 that was not exported by this project.
    """
    if CONFIG_SECTION not in values:
        raise UserError("this GPT-2 was not exported by megameta: its config.json has no section megameta")
    own = dict(values[CONFIG_SECTION])
    own["bias"] = own["bias"] or any(
        bool(tensor.any()) for name, tensor in tensors.items() if name.endswith(".bias") and tensor.ndim == 1
    )
    config = ModelConfig(**own)
    prefix = "transformer."
    result = {
        "embedding.tokens.weight": tensors[f"{prefix}wte.weight"],
        "embedding.positions.weight": tensors[f"{prefix}wpe.weight"],
    }
    if not config.tie_embeddings:
        result["head.output.weight"] = tensors["lm_head.weight"]

    def both(targets: tuple[str, ...], source: str) -> None:
        weight, bias = tensors[f"{prefix}{source}.weight"], tensors[f"{prefix}{source}.bias"]
        weights = weight.T.chunk(len(targets)) if weight.ndim == 2 else (weight,)
        for target, one_weight, one_bias in zip(targets, weights, bias.chunk(len(targets))):
            result[f"{target}.weight"] = one_weight.contiguous()
            if config.bias:
                result[f"{target}.bias"] = one_bias.clone()

    for layer in range(config.num_layers):
        for source, target in _BLOCK.items():
            both((f"blocks.{layer}.{target}",), f"h.{layer}.{source}")
        both(tuple(f"blocks.{layer}.{target}" for target in _QKV), f"h.{layer}.attn.c_attn")
    both(("head.norm",), "ln_f")
    return config, result
