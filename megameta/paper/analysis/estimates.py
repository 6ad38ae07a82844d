"""Means over held-out sequences, with intervals. Letters: N sequences."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A mean over sequences and its 95 % interval (normal approximation: mean ± 1.96 standard errors). It speaks of
    other text for the same model, not of another model trained with another seed."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def columns(self, name: str) -> dict[str, float]:
        """The three numbers as columns of a table."""
        return {name: self.mean, f"{name} low": self.low, f"{name} high": self.high}


def estimate(value_N: Tensor) -> Estimate:
    """Of one number a sequence; NaN stands for a sequence that has none. Without any number all three are NaN."""
    kept = value_N.double().flatten()
    kept = kept[~kept.isnan()]
    if not len(kept):
        return Estimate(math.nan, math.nan, math.nan)
    mean = float(kept.mean())
    half = 1.96 * float(kept.std()) / math.sqrt(len(kept)) if len(kept) > 1 else 0.0
    return Estimate(mean, mean - half, mean + half)


def mean_over(value_BHT: Tensor, chosen_BT: Tensor) -> Tensor:
    """Mean of each sequence and head over its chosen rows, float64 (B, H); NaN where none is chosen."""
    chosen_B1T = chosen_BT[:, None]
    total_BH = torch.where(chosen_B1T, value_BHT, 0).sum(dim=-1, dtype=torch.float64)
    return total_BH / chosen_B1T.sum(dim=-1)
