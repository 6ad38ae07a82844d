"""Means, spreads and intervals over seeds; where there is one seed, over examples, which is said."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from megameta.intervals import half_width, wilson


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        count: seeds.
        over: what the interval is over, "seeds" or "examples".
    """

    mean: float
    low: float
    high: float
    count: int
    over: str
    spread: float = 0.0


def accuracy_estimate(values: Sequence[float], examples: int) -> Estimate:
    """Of one accuracy a seed, each over so many examples."""
    mean = fmean(values)
    if len(values) == 1:
        low, high = wilson(round(mean * examples), examples)
        return Estimate(mean, low, high, 1, "examples")
    half = half_width(values)
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half), len(values), "seeds", stdev(values))


def difference_estimate(first: Sequence[float], second: Sequence[float], examples: int) -> Estimate:
    """Of ``first`` less ``second``, paired by seed.

    With one seed the interval is over examples alone (Newcombe's hybrid of two Wilson intervals): another seed can
    differ by far more.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = fmean(differences)
    if len(differences) == 1:
        (low_a, high_a), (low_b, high_b) = (wilson(round(v * examples), examples) for v in (first[0], second[0]))
        below = math.hypot(first[0] - low_a, high_b - second[0])
        above = math.hypot(high_a - first[0], second[0] - low_b)
        return Estimate(mean, mean - below, mean + above, 1, "examples")
    half = half_width(differences)
    return Estimate(mean, mean - half, mean + half, len(differences), "seeds", stdev(differences))
