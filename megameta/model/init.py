"""Initial weights that do not depend on the layout: each parameter is drawn in full from a seed of its own name."""

import hashlib
import math

import torch
from torch import Tensor, nn

from megameta.model.config import ModelConfig

#: Projections that write into the residual stream.
RESIDUAL_PROJECTIONS = ("attention.o_proj.weight", "meta_attention.o_proj.weight", "mlp.down_proj.weight")


def draw_parameter(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The initial value of one parameter, float32 on the CPU, by its canonical name and logical shape.

    GPT-2 initialisation (spec §2): normal 0.02, residual projections scaled by 1/√(number of residual adds); norms one,
    biases zero.
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = config.initializer_range
    if name.endswith(RESIDUAL_PROJECTIONS):
        std /= math.sqrt(config.num_residual_adds)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def is_vocabulary_table(name: str) -> bool:
    """Whether the parameter's rows are vocabulary entries, so that it is padded."""
    return name.endswith(("embedding.tokens.weight", "head.output.weight"))


def initialize_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of a model in place, by its canonical name; rows that pad the vocabulary become zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            rows = config.vocab_size if is_vocabulary_table(name) else shape[0]
            parameter[:rows] = draw_parameter(name, (rows, *shape[1:]), config, seed).to(parameter)
            parameter[rows:] = 0
