"""The examples of the two statements against definitions written out, and against limits known in closed form."""

import itertools
import math

import pytest
import torch

from megameta.paper.analysis.bias_theory import (
    FITTED,
    METAS,
    POSITIONS,
    Bilinear,
    Relative,
    best_absolute,
    best_relative,
    centred,
    draw_contents,
    fit,
    residual,
    target_bias,
)
from megameta.paper.analysis.boost_theory import (
    KEYS,
    boost_theory,
    break_even,
    entropy_after,
    entropy_slope,
    share_of_keys_that_sharpen,
    smallest_drop,
    turning_point,
)
from megameta.paper.analysis.registry import ANALYSES, Options


def plain_entropy(logits: list[float]) -> float:
    weights = [math.exp(x) for x in logits]
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)


LOGITS = [0.3, -1.2, 2.0, 0.0, -3.0, 0.7]


@pytest.mark.parametrize("key", range(len(LOGITS)))
@pytest.mark.parametrize("boost", [-1.0, 0.0, 0.5, 3.0])
def test_entropy_after_a_boost_is_that_of_the_boosted_logits(key: int, boost: float) -> None:
    weights = [math.exp(x) for x in LOGITS]
    p = weights[key] / sum(weights)
    rest = plain_entropy([x for number, x in enumerate(LOGITS) if number != key])
    moved = [x + boost * (number == key) for number, x in enumerate(LOGITS)]
    assert float(entropy_after(p, boost, rest)) == pytest.approx(plain_entropy(moved), abs=1e-12)
    step = 1e-5
    up, down = (plain_entropy([x + s * (n == key) for n, x in enumerate(moved)]) for s in (step, -step))
    slope = entropy_slope(torch.tensor(moved, dtype=torch.float64).numpy(), key)
    assert slope == pytest.approx((up - down) / (2 * step), abs=1e-8)
    # the condition, in both of its forms
    share = math.exp(moved[key]) / sum(math.exp(x) for x in moved)
    assert (slope < 0) == (share > math.exp(-plain_entropy(moved))) == (share > turning_point(rest))


@pytest.mark.parametrize("rest", [0.0, 0.3, math.log(63)])
def test_break_even_divides_the_regions(rest: float) -> None:
    turn = turning_point(rest)
    for p in (turn / 100, turn / 2, turn * 0.99):
        even, before = break_even(p, rest), float(entropy_after(p, 0.0, rest))
        assert float(entropy_after(p, even, rest)) == pytest.approx(before, abs=1e-10)
        assert float(entropy_after(p, 0.5 * even, rest)) > before > float(entropy_after(p, even + 0.1, rest))
    for p in (turn, (1 + turn) / 2):
        assert break_even(p, rest) == 0
        assert float(entropy_after(p, 0.01, rest)) < float(entropy_after(p, 0.0, rest))
    assert float(entropy_after(turn, 0.0, rest)) == pytest.approx(math.log(1 + math.exp(rest)))  # its largest value


@pytest.mark.parametrize("boost", [0.5, 1.26, 3.0])
def test_no_drop_depends_on_the_boost_alone(boost: float) -> None:
    """As p nears 1 the drop goes to 0 as its expansion says, ε being 1 − p."""
    rest = math.log(KEYS - 1)
    for eps in (1e-4, 1e-6):
        scale = math.log(1 / eps) + 1 + rest
        expected = eps * ((1 - math.exp(-boost)) * scale - boost * math.exp(-boost))
        drop = float(entropy_after(1 - eps, 0.0, rest) - entropy_after(1 - eps, boost, rest))
        assert drop == pytest.approx(expected, rel=100 * eps + 1e-6)
        assert 0 < smallest_drop(boost, rest, 1 - eps) <= drop * (1 + 1e-9)


def test_share_of_random_keys_counted_one_by_one() -> None:
    import numpy as np

    rows = np.random.default_rng(5).normal(0.0, 2.0, (3, KEYS))
    falls, mass = 0, 0.0
    for row in rows.tolist():
        before, total = plain_entropy(row), sum(math.exp(x) for x in row)
        for key in range(KEYS):
            lower = plain_entropy([x + 1.26 * (n == key) for n, x in enumerate(row)]) < before
            falls += lower
            mass += lower * math.exp(row[key]) / total
    found = share_of_keys_that_sharpen(2.0, 1.26, seed=5, rows=3)
    assert found["keys"] == pytest.approx(falls / (3 * KEYS))
    assert found["attention"] == pytest.approx(mass / 3)


def test_floor_of_two_contents_by_hand() -> None:
    """Two sequences with one meta-token each at different places and no distance: the mean is off by half of each."""
    meta = torch.zeros(2, 4, dtype=torch.float64)
    meta[0, 1], meta[1, 2] = 1.0, 1.0
    target = 2.0 * meta[:, None, :].expand(2, 4, 4)
    # half the difference of the two: +1 at key 1, −1 at key 2, each row's mean off over j ≤ i
    rows = [[0.0], [-0.5, 0.5], [0.0, 1.0, -1.0], [0.0, 1.0, -1.0, 0.0]]
    expected = math.sqrt(sum(x * x for row in rows for x in row) / 10)
    assert float(residual(target, best_absolute(target))) == pytest.approx(expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_floors_are_the_least_residuals(seed: int) -> None:
    """Any step away from the projections is worse, and gradient descent ends at them."""
    target = target_bias(draw_contents(seed))
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(POSITIONS)
    distance = (place[:, None] - place[None, :]).clamp(min=0)
    for best, step in (
        (best_absolute(target), torch.randn(POSITIONS, POSITIONS, dtype=torch.float64, generator=generator)),
        (best_relative(target), torch.randn(POSITIONS, dtype=torch.float64, generator=generator)[distance]),
    ):
        floor = residual(target, best)
        for size, sign in itertools.product((1e-3, 1e-1), (1, -1)):
            assert residual(target, best + sign * size * step) > floor
    relative = Relative()
    assert fit(relative, draw_contents(seed), target)[-1] == pytest.approx(
        float(residual(target, best_relative(target))), abs=1e-9
    )


def test_what_fits_and_what_does_not() -> None:
    meta = draw_contents(7)
    assert (meta.sum(dim=1) == METAS).all()
    target = target_bias(meta)
    floor = float(residual(target, best_absolute(target)))
    with_meta, without = Bilinear(sees_meta=True, seed=7), Bilinear(sees_meta=False, seed=7)
    assert fit(with_meta, meta, target)[-1] <= FITTED
    assert float(residual(target, with_meta(meta).detach())) <= FITTED
    assert floor - 1e-12 <= fit(without, meta, target)[-1] <= floor * 1.001
    assert floor > 0.1
    # contents that it was not fitted to
    others = draw_contents(8)
    assert float(residual(target_bias(others), with_meta(others).detach())) <= 100 * FITTED


def test_rows_are_compared_without_what_softmax_does_not_see() -> None:
    target = target_bias(draw_contents(0))
    shift = torch.randn(len(target), POSITIONS, 1, dtype=torch.float64)
    assert float(residual(target, target + shift)) < 1e-12
    kept = centred(target)
    assert float(kept.sum(dim=-1).abs().max()) < 1e-12 and not kept.triu(1).any()


def test_findings_say_what_they_must() -> None:
    regions, slopes = boost_theory(Options())
    assert any(row["change (nats)"] > 1e-3 for row in regions.tables["change"])
    assert any(row["change (nats)"] < -1 for row in regions.tables["change"])
    assert slopes.facts["largest difference of slopes"] < 1e-8
    assert ANALYSES["theory"].load().__name__ == "theory"
