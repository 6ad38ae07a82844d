"""95 % intervals: of means over few values, such as seeds, and of proportions; where there is one seed, over its
examples, which is said."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

#: Student's t at 97.5 % by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def t_quantile(freedom: int) -> float:
    """97.5 % quantile; beyond the table from the normal one by two terms of its expansion (Abramowitz 26.7.5)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of a mean by Student's t; two values or more."""
    return t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def wilson(successes: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson, JASA 1927)."""
    if count == 0:
        return 0.0, 1.0
    share, square = successes / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


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
