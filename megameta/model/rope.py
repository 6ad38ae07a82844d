"""Rotary position embedding. Pairs are (i, i + K/2), as in GPT-NeoX and HuggingFace; angles are float32 (spec §3)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megameta.model.config import ModelConfig


class Rotation(NamedTuple):
    """cos and sin of the angles, each (B or 1, T, rotary size), float32, halves repeated."""

    cos_BTK: Tensor
    sin_BTK: Tensor


def rotary_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Radians a position of each pair of channels, float32 (rotary size / 2,): theta^(−2i / rotary size), or as scaled.

    linear: over the factor (position interpolation, Chen et al. 2023). ntk: of the base theta · factor^(R / (R − 2)),
    so that the slowest pair is interpolated in full and the fastest not at all. yarn (Peng et al. 2023, §3.2): a mean
    of both ends by how often a pair turns in the original window, along a ramp between its two betas.
    """
    size, factor, theta = config.rotary_size, config.position_scaling_factor, config.rope_theta
    if config.position_scaling == "none":
        return theta ** -(torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    exponent_P = torch.arange(0, size, 2, device=device, dtype=torch.float64) / size
    if config.position_scaling == "ntk":
        theta *= factor ** (size / (size - 2))
    frequency_P = theta**-exponent_P
    if config.position_scaling == "linear":
        frequency_P = frequency_P / factor
    elif config.position_scaling == "yarn":
        kept_P = _kept_by_yarn(config, frequency_P)
        frequency_P = frequency_P * kept_P + frequency_P / factor * (1 - kept_P)
    return frequency_P.float()


def _kept_by_yarn(config: ModelConfig, frequency_P: Tensor) -> Tensor:
    """Share of each pair's own frequency: 1 for pairs that turn often in the original window, 0 for slow ones."""
    size = config.rotary_size

    def pair_that_turns(times: float) -> float:
        window = config.original_max_position_embeddings
        return size * math.log(window / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(config.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.yarn_beta_slow)), size - 1)
    pair_P = torch.arange(size // 2, device=frequency_P.device, dtype=frequency_P.dtype)
    return 1 - ((pair_P - low) / max(high - low, 0.001)).clamp(0, 1)


def attention_scale(config: ModelConfig) -> float:
    """What multiplies cos and sin: yarn's m = attention factor · (0.1 · ln(factor) + 1), else 1 (spec §3)."""
    if config.position_scaling != "yarn":
        return 1.0
    return config.yarn_attention_factor * (0.1 * math.log(config.position_scaling_factor) + 1.0)


def rotation_at(position_BT: Tensor, config: ModelConfig) -> Rotation:
    """Rotation at integer positions (B or 1, T). At position 0 cos is ``attention_scale`` and sin is 0."""
    angle_BTK = position_BT[..., None].float() * rotary_frequencies(config, position_BT.device)
    angle_BTK = torch.cat((angle_BTK, angle_BTK), dim=-1)
    scale = attention_scale(config)
    if scale == 1.0:
        return Rotation(angle_BTK.cos(), angle_BTK.sin())
    return Rotation(angle_BTK.cos() * scale, angle_BTK.sin() * scale)


def rotate(x_BHTK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first ``rotary size`` channels of each head; the others pass. Keeps shape and dtype."""
    size = rotation.cos_BTK.shape[-1]
    cos, sin = rotation.cos_BTK[:, None], rotation.sin_BTK[:, None]
    turned, passed = x_BHTK[..., :size], x_BHTK[..., size:]
    low, high = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat((-high, low), dim=-1) * sin).to(x_BHTK.dtype)
    return torch.cat((turned, passed), dim=-1) if passed.shape[-1] else turned
