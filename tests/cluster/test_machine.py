"""What a machine is said to do."""

import itertools
from types import SimpleNamespace

from megameta.cluster import machine
from megameta.cluster.machine import measure_peak_flops


def test_the_peak_is_the_best_rate_after_the_warm_up(monkeypatch):
    """On a clock of the test's: the first two products are the fastest, and do not count."""
    seconds = [0.125, 0.125, 1.0, 0.25, 2.0, 0.5]
    marks = itertools.accumulate(itertools.chain([0.0], *([0.0, each] for each in seconds)))
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: next(marks)))
    assert measure_peak_flops("cpu", "fp32", seconds=3.0) == 2 * 768**3 / 0.25
    assert next(marks, None) is None, "as many as there is time for"
