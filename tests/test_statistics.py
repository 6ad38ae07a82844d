"""Intervals over seeds and examples, against hand-computed values and by simulation."""

import random

import pytest

from megameta.paper.reproduce.report import points, verdict
from megameta.statistics import Estimate, accuracy_estimate, difference_estimate, t_quantile


def test_t_quantiles() -> None:
    assert t_quantile(2) == 4.303
    assert t_quantile(20) == pytest.approx(2.086, abs=2e-3)
    assert t_quantile(200) == pytest.approx(1.972, abs=1e-3)


def test_one_seed_has_an_interval_over_examples_and_says_so() -> None:
    found = accuracy_estimate([0.5], 100)
    assert found.over == "examples" and found.count == 1
    assert (found.low, found.high) == (pytest.approx(0.404, abs=1e-3), pytest.approx(0.596, abs=1e-3))
    difference = difference_estimate([0.5], [0.5], 100)
    assert difference.over == "examples" and difference.low == pytest.approx(-0.1358, abs=1e-3)
    assert "nothing is claimed" in verdict(difference)


def test_seeds_have_students_interval_paired() -> None:
    found = accuracy_estimate([0.2, 0.4, 0.6], 1000)
    assert found.mean == pytest.approx(0.4) and found.spread == pytest.approx(0.2)
    assert found.high - found.mean == pytest.approx(min(0.6, 4.303 * 0.2 / 3**0.5))
    # Paired: what seeds share falls out.
    paired = difference_estimate([0.3, 0.5, 0.7], [0.2, 0.4, 0.6], 1000)
    assert (paired.low, paired.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert verdict(paired) == "higher"


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    draw = random.Random(0)
    rounds, inside = 2000, 0
    for _ in range(rounds):
        first = [draw.gauss(0.5, 0.05) for _ in range(4)]
        second = [draw.gauss(0.4, 0.05) for _ in range(4)]
        found = difference_estimate(first, second, 100)
        inside += found.low <= 0.1 <= found.high
    assert 0.935 < inside / rounds < 0.965


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.01, 0.2, "higher"), (-0.2, -0.01, "lower"), (-0.1, 0.1, "no difference shown")]
)
def test_an_interval_with_0_shows_nothing(low: float, high: float, said: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high, 3, "seeds")) == said


def test_points_have_signs() -> None:
    assert points(Estimate(0.051, -0.01, 0.12, 3, "seeds")) == "+5.1 [-1.0, +12.0]"
    assert points(None) == "–"
