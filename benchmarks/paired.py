"""Ratios from paired measurements: median and bootstrap 95 % interval, never single times (machines drift)."""

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: With BENCHMARK_CLOCK=cpu: processor seconds of this process, all its threads. What other programs take on a busy
#: machine does not count there, nor does waiting (for a disk, a GPU, another process). Otherwise: seconds on the wall.
ON_THE_WALL = os.environ.get("BENCHMARK_CLOCK") != "cpu"
seconds = time.perf_counter if ON_THE_WALL else time.process_time


@dataclass(frozen=True)
class Ratio:
    """Of two interleaved series of seconds."""

    name: str
    median: float
    low: float
    high: float
    seconds: float
    """Median of the numerator's series."""
    pairs: int

    def row(self) -> str:
        """A line of the printed table."""
        return (
            f"{self.name:<34} {self.median:6.3f}  [{self.low:.3f}, {self.high:.3f}]"
            f"  {1000 * self.seconds:9.2f} ms  {self.pairs} pairs"
        )


def measure(
    baseline: Callable[[], float], others: dict[str, Callable[[], float]], pairs: int, warmup: int = 2
) -> dict[str, tuple[list[float], list[float]]]:
    """Run baseline and each other in turn, ``pairs`` times; each callable returns its own seconds.

    The order inside a round is shuffled, so that no candidate always follows the same one.
    """
    rounds = random.Random(0)
    for run in (baseline, *others.values()):
        for _ in range(warmup):
            run()
    series: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in others}
    for _ in range(pairs):
        names = list(others)
        rounds.shuffle(names)
        for name in names:
            first, second = (others[name], baseline) if rounds.random() < 0.5 else (baseline, others[name])
            times = first(), second()
            own, base = times if first is others[name] else times[::-1]
            series[name][0].append(own)
            series[name][1].append(base)
    return series


def ratio(name: str, own: Sequence[float], base: Sequence[float], resamples: int = 2000) -> Ratio:
    """Median over pairs of own/base, with a bootstrap interval over the pairs."""
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(resamples))
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]
    return Ratio(name, statistics.median(ratios), low, high, statistics.median(own), len(ratios))


CLOCK = "wall" if ON_THE_WALL else "cpu"
_UNIT = "step" if ON_THE_WALL else "CPU step"
HEADER = f"{'ratio to the baseline':<34} {'median':>6}  {'95 % interval':<16}  {_UNIT:>9}"
