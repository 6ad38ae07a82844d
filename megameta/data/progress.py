"""A line every few seconds of long work whose size is known: how far it is, how fast, how long it will take."""

import sys
import time


class ProgressLine:
    """Call it with what is done so far; lines go to standard error.

    Args:
        total: of the same unit.
        unit: its name, plural.
        label: what the line begins with.
        interval: seconds between lines; work that takes less prints none.
    """

    def __init__(self, total: int, unit: str, label: str = "", interval: float = 5.0) -> None:
        self._total, self._unit, self._label, self._interval = total, unit, label, interval
        self._began = time.monotonic()
        self._next = self._began + interval

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now < self._next or not done:
            return
        self._next = now + self._interval
        rate = done / (now - self._began)
        seconds = round((self._total - done) / rate)
        left = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        text = f"{self._label}{done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s, left {left}"
        print(text, file=sys.stderr, flush=True)
