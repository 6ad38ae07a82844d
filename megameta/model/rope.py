"""Rotary position embedding. Pairs are (i, i + K/2), as in GPT-NeoX and HuggingFace; angles are float32 (spec §3)."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """cos and sin of the angles, each (B or 1, T, rotary size), float32, halves repeated."""

    cos_BTK: Tensor
    sin_BTK: Tensor


def rotation_at(position_BT: Tensor, rotary_size: int, theta: float) -> Rotation:
    """Angles position · theta^(−2i / rotary_size) at integer positions (B or 1, T)."""
    exponent = torch.arange(0, rotary_size, 2, device=position_BT.device, dtype=torch.float32) / rotary_size
    angle_BTK = position_BT[..., None].float() * theta**-exponent
    angle_BTK = torch.cat((angle_BTK, angle_BTK), dim=-1)
    return Rotation(angle_BTK.cos(), angle_BTK.sin())


def rotate(x_BHTK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first ``rotary size`` channels of each head; the others pass. Keeps shape and dtype."""
    size = rotation.cos_BTK.shape[-1]
    cos, sin = rotation.cos_BTK[:, None], rotation.sin_BTK[:, None]
    turned, passed = x_BHTK[..., :size], x_BHTK[..., size:]
    low, high = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat((-high, low), dim=-1) * sin).to(x_BHTK.dtype)
    return torch.cat((turned, passed), dim=-1) if passed.shape[-1] else turned
