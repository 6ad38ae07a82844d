"""The judge of `make bench`: which rows have moved beyond noise."""

import sys

import pytest

from tests.support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import guard


def row(name: str, median: float, half: float = 0.02) -> dict:
    return {"name": name, "median": median, "low": median - half, "high": median + half, "pairs": 9}


@pytest.mark.parametrize(
    ("now", "larger_is_slower", "expected"),
    [
        (1.03, True, "same"),
        (1.2, True, "slower"),
        (0.9, True, "faster"),
        (1.2, False, "faster"),
        (0.9, False, "slower"),
    ],
)
def test_a_row_moves_where_intervals_are_apart(now: float, larger_is_slower: bool, expected: str) -> None:
    said = guard.judge([row("A/A: again", 1.0), row("branch", now)], {"branch": row("branch", 1.04)}, larger_is_slower)
    assert [verdict for verdict, _ in said] == ["noise", expected]


def test_noise_rows_of_every_benchmark_are_known() -> None:
    """step_time and peers begin with "A/A", decode_speed names what it measures first."""
    said = guard.judge([row("a step, A/A", 1.0), row("A/A: ours, again", 1.0)], {}, True)
    assert [verdict for verdict, _ in said] == ["noise", "noise"]


def test_runs_of_the_same_code_are_the_same() -> None:
    """Seen within five minutes: 0.993 [0.981, 1.006] and 1.027 [1.020, 1.036], with as-noise rows within 0.01 of 1."""
    stored = {"a step": row("a step", 0.993, 0.013)}
    rows = [row("a step, A/A", 1.0, 0.007), row("a step", 1.028, 0.008)]
    assert guard.judge(rows, stored, True)[1][0] == "same"
    assert guard.judge([rows[0], row("a step", 1.06, 0.008)], stored, True)[1][0] == "slower"


def test_noise_widens_what_counts_as_the_same() -> None:
    stored = {"branch": row("branch", 1.04)}
    assert guard.judge([row("A/A: again", 1.0, 0.3), row("branch", 1.2)], stored, True)[1][0] == "same"
    assert guard.judge([row("branch", 1.2)], {}, True)[0][0] == "new"
