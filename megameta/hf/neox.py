"""transformers' GPTNeoXForCausalLM (Pythia among them), read.

Its query, key and value are one matrix whose rows are ordered by head, then query, key, value, then channel.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megameta.checkpoint.tensor_file import LazyTensors, MadeTensors, TensorEntry
from megameta.hf.foreign import HFValues
from megameta.hf.gpt2 import HF_ACTIVATIONS
from megameta.model import ModelConfig

#: Buffers that older versions of transformers stored among the weights: causal masks, rotary frequencies.
IGNORED = re.compile(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$")
_BLOCK = {
    "input_layernorm": "norm_1",
    "attention.dense": "attention.o_proj",
    "post_attention_layernorm": "norm_2",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")


def read_neox_config(values: HFValues) -> dict[str, Any]:
    """Fields of ``ModelConfig``, but the vocabulary's, of a GPT-NeoX from elsewhere.

    Raises:
        UserError: it computes something that the training model cannot.
    """
    rope = dict(values.get("rope_parameters", None) or values.get("rope_scaling", None) or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        values.note(f"rope_parameters are of the type {kind!r}, and only 'default' can be represented")
    width, heads = values.get("hidden_size", 6144), values.get("num_attention_heads", 64)
    fraction = float(rope.get("partial_rotary_factor", values.get("rotary_pct", 0.25)))
    head = width // heads
    if round(head * fraction) != int(head * fraction):  # transformers rounds down
        fraction = int(head * fraction) / head
    return {
        "hidden_size": width,
        "num_layers": values.get("num_hidden_layers", 44),
        "num_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": values.get("intermediate_size", 24576),
        "position": "rope",
        "max_position_embeddings": values.get("max_position_embeddings", 2048),
        "rope_theta": float(rope.get("rope_theta", values.get("rotary_emb_base", 10000.0))),
        "rotary_fraction": fraction,
        "norm": "layernorm",
        "norm_eps": values.get("layer_norm_eps", 1e-5),
        "bias": True,
        "activation": values.choice("hidden_act", HF_ACTIVATIONS, default="gelu"),
        "qk_norm": False,
        "parallel_residual": values.get("use_parallel_residual", True),
        "tie_embeddings": values.get("tie_word_embeddings", False),
    }


def from_neox(config: ModelConfig, stored: LazyTensors) -> MadeTensors:
    """Canonical tensors from GPTNeoXForCausalLM's, each made when it is asked for; biases that it lacks are zero.

    Raises:
        KeyError: one is missing.
    """
    made: dict[str, tuple[TensorEntry, Callable[[], Tensor]]] = {}

    def same(target: str, source: str) -> None:
        made[target] = (stored.entry(source)._replace(name=target), partial(stored.__getitem__, source))

    def both(target: str, source: str) -> None:
        same(f"{target}.weight", f"{source}.weight")
        if f"{source}.bias" in stored:
            same(f"{target}.bias", f"{source}.bias")
        else:
            zeros(f"{target}.bias", stored.entry(f"{source}.weight"))

    def zeros(name: str, weight: TensorEntry, parts: int = 1) -> None:
        rows = weight.shape[0] // parts
        made[name] = (TensorEntry(name, (rows,), weight.dtype), partial(torch.zeros, rows, dtype=weight.dtype))

    same("embedding.tokens.weight", "gpt_neox.embed_in.weight")
    for layer in range(config.num_layers):
        place = f"gpt_neox.layers.{layer}"
        for source, target in _BLOCK.items():
            both(f"blocks.{layer}.{target}", f"{place}.{source}")
        weight = stored.entry(f"{place}.attention.query_key_value.weight")
        bias = f"{place}.attention.query_key_value.bias"
        for number, projection in enumerate(_QKV):
            target = f"blocks.{layer}.{projection}"
            for entry in [weight, *([stored.entry(bias)] if bias in stored else [])]:
                name = f"{target}.{entry.name.rpartition('.')[2]}"
                piece = partial(_part, stored, entry.name, number, config.num_heads)
                made[name] = (TensorEntry(name, (entry.shape[0] // 3, *entry.shape[1:]), entry.dtype), piece)
            if bias not in stored:
                zeros(f"{target}.bias", weight, 3)
    both("head.norm", "gpt_neox.final_layer_norm")
    if not config.tie_embeddings:
        same("head.output.weight", "lm_head.weight" if "lm_head.weight" in stored else "embed_out.weight")
    return MadeTensors(made)


def _part(stored: Mapping[str, Tensor], name: str, number: int, num_heads: int) -> Tensor:
    """Query, key or value (0, 1, 2) of all heads."""
    fused = stored[name].unflatten(0, (num_heads, 3, -1))
    return fused[:, number].flatten(0, 1).contiguous()
