"""Small models, batches, and a covering choice of option values for the tests of the model."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megameta.model import GPT, ModelConfig
from megameta.model.init import is_vocabulary_table

BATCH, LENGTH = 4, 13


def small_config(**changes: Any) -> ModelConfig:
    """Two layers of width 32 with four heads, and a meta-token in the middle of the vocabulary."""
    shape = {
        "vocab_size": 37,
        "meta_token_id": 11,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "attention_backend": "sdpa",
    }
    return ModelConfig(**{**shape, **changes})


def small_model(
    config: ModelConfig, dtype: torch.dtype = torch.float64, *, vocab_multiple: int = 8, seed: int = 0
) -> GPT:
    """Weights large enough that every path matters: sharp attention, norms that are not one, biases that are not zero.

    Rows that pad the vocabulary are zero.
    """
    model = GPT(config, vocab_multiple)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 2 and "embedding" not in name:
                value *= 1.2 / parameter.shape[1] ** 0.5
            elif name.endswith("bias"):
                value *= 0.3
            elif parameter.ndim == 1:
                value = 1 + 0.2 * value
            if is_vocabulary_table(name):
                value[config.vocab_size :] = 0
            parameter.copy_(value)
    return model.to(dtype)


def reference_state(model: GPT, *, requires_grad: bool = False) -> dict[str, Tensor]:
    """The model's parameters in float64, vocabulary padding cut off."""
    rows = model.config.vocab_size
    state = {
        name: (p[:rows] if is_vocabulary_table(name) else p).detach().double().clone()
        for name, p in model.named_parameters()
    }
    for value in state.values():
        value.requires_grad_(requires_grad)
    return state


def make_tokens(config: ModelConfig, metas: str, *, seed: int = 0, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """Token ids (B, T) with meta-tokens: none, one a row, all T, ragged (0, 1, 5, 3, … by row), tenth (any place)."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(0, config.vocab_size - 1, (batch, length), generator=generator)
    token = token + (token >= config.meta_token_id).long()
    for row in range(batch):
        count = {"none": 0, "one": 1, "all": length, "ragged": (0, 1, 5, 3)[row % 4]}[metas]
        token[row, torch.randperm(length, generator=generator)[:count]] = config.meta_token_id
    return token


def make_documents(kind: str, *, batch: int = BATCH, length: int = LENGTH) -> Tensor | None:
    """Documents (B, T): one, packed (several a row, cut anywhere), left_pad and right_pad (−1 is padding)."""
    if kind == "one":
        return None
    column = torch.arange(length).expand(batch, length)
    row = torch.arange(batch)[:, None]
    if kind == "packed":
        return ((column >= 2 + row) & (row > 0)).long() + (column >= 7 + row).long() * 3
    pad = row * 2
    is_pad = column < pad if kind == "left_pad" else column >= length - pad
    return torch.where(is_pad, -1, 0)


def make_positions(kind: str, document_BT: Tensor | None, *, batch: int = BATCH, length: int = LENGTH) -> Tensor | None:
    """Positions: default, restart (count from 0 in each document), shared (one row (1, T)), scattered (any order)."""
    if kind == "default":
        return None
    if kind == "shared":
        return (torch.arange(length) * 3 % 29)[None]
    if kind == "scattered":
        return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(5))
    document = torch.zeros(batch, length, dtype=torch.long) if document_BT is None else document_BT
    position = torch.zeros(batch, length, dtype=torch.long)
    for t in range(1, length):
        same = document[:, t] == document[:, t - 1]
        position[:, t] = torch.where(same, position[:, t - 1] + 1, 0)
    return position


def covering(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Few cases in which every pair of values of two different factors occurs (greedy, always the same)."""
    draw = random.Random(seed)
    names = list(factors)
    pairs = {
        ((a, i), (b, j)): None
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    cases = []
    while pairs:
        best: tuple[int, dict[str, int], list] = (-1, {}, [])
        first = next(iter(pairs))
        for _ in range(60):
            case = {name: draw.randrange(len(factors[name])) for name in names} | dict(first)
            hit = [p for p in itertools.combinations(case.items(), 2) if p in pairs]
            if len(hit) > best[0]:
                best = (len(hit), case, hit)
        for pair in best[2]:
            del pairs[pair]
        cases.append({name: factors[name][index] for name, index in best[1].items()})
    return cases


def case_id(case: Mapping[str, Any]) -> str:
    """A short name for pytest."""
    return "-".join(f"{value}" if isinstance(value, str) else f"{key[:6]}{value}" for key, value in case.items())


def assert_close(actual: Tensor, reference: Tensor, tolerance: float, name: str = "", *, scale: float = 0.0) -> None:
    """Largest difference against the largest reference magnitude (or ``scale``, if that is larger); no NaN."""
    assert actual.shape == reference.shape, name
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    if reference.numel() == 0:
        return
    actual, reference = actual.detach(), reference.detach()
    scale = max(float(reference.abs().max()), scale)
    error = float((actual.double() - reference.double()).abs().max())
    assert error <= tolerance * scale, f"{name}: error {error:.3g} at scale {scale:.3g}, allowed {tolerance:g}"
