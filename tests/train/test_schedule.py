"""The learning rate against its definition in words, at the corners and in between."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megameta.config import OptimizerSection
from megameta.train.schedule import learning_rate


def section(**changes):
    return OptimizerSection(**{"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 10, **changes})


def test_warm_up_is_linear_and_reaches_the_peak():
    for schedule in ("cosine", "wsd", "constant"):
        o = section(schedule=schedule)
        assert [learning_rate(s, 100, o) for s in range(1, 11)] == pytest.approx([s * 1e-4 for s in range(1, 11)])


def test_cosine():
    o = section()
    assert learning_rate(100, 100, o) == pytest.approx(1e-4)
    assert learning_rate(55, 100, o) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(33, 100, o) == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi * 23 / 90)) / 2)
    assert learning_rate(130, 100, o) == pytest.approx(1e-4), "beyond the end it stays at the floor"


def test_the_papers_schedule():
    o = section(lr=6e-4, min_lr=6e-5, warmup_steps=2000)
    assert learning_rate(1, 200_000, o) == pytest.approx(3e-7)
    assert learning_rate(2000, 200_000, o) == pytest.approx(6e-4)
    assert learning_rate(101_000, 200_000, o) == pytest.approx(3.3e-4)
    assert learning_rate(200_000, 200_000, o) == pytest.approx(6e-5)


def test_warm_up_stable_decay():
    o = section(schedule="wsd", decay_steps=20)
    assert learning_rate(11, 100, o) == learning_rate(80, 100, o) == 1e-3
    assert learning_rate(90, 100, o) == pytest.approx(5.5e-4)
    assert learning_rate(100, 100, o) == pytest.approx(1e-4)
    default = section(schedule="wsd")
    assert learning_rate(90, 100, default) == 1e-3
    assert learning_rate(91, 100, default) == pytest.approx(1e-3 - 9e-5)


def test_constant_and_no_warm_up():
    assert learning_rate(99, 100, section(schedule="constant")) == 1e-3
    assert learning_rate(1, 100, section(warmup_steps=0)) == pytest.approx(1e-3, rel=1e-3)


@given(st.sampled_from(["cosine", "wsd", "constant"]), st.integers(0, 30), st.integers(31, 200), st.floats(1e-6, 1e-3))
@settings(max_examples=60, deadline=None)
def test_rises_then_never_rises_and_stays_inside(schedule, warmup, steps, floor):
    o = section(schedule=schedule, warmup_steps=warmup, min_lr=floor)
    rates = [learning_rate(s, steps, o) for s in range(1, steps + 1)]
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    tail = rates[max(0, warmup - 1) :]
    assert all(a >= b for a, b in itertools.pairwise(tail))
    assert max(rates) <= 1e-3 and min(tail) >= floor * (1 - 1e-9)
