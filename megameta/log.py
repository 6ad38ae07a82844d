"""What is shown while something runs: the log of a run, on the terminal and in RUN/logs, and lines of progress."""

import logging
import sys
import time
from pathlib import Path

from rich.console import Console

LOG = logging.getLogger("megameta")

#: One console for lines and bar: rich keeps a live bar below the lines that go through the same one.
CONSOLE = Console(stderr=True)


class _Terminal(logging.Handler):
    """Log lines to the terminal, above a live bar."""

    def emit(self, record: logging.LogRecord) -> None:
        CONSOLE.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


def open_log(path: Path, *, echo: bool) -> None:
    """Send the log to a file, and to the terminal where ``echo``."""
    close_log()
    path.parent.mkdir(parents=True, exist_ok=True)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOG.addHandler(to_file)
    if echo:
        LOG.addHandler(_Terminal())


def show_log() -> None:
    """Send the log to the terminal alone."""
    close_log()
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    LOG.addHandler(_Terminal())


def close_log() -> None:
    """Close the log's files."""
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()


def duration(seconds: float) -> str:
    """h:mm:ss"""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


class ProgressLine:
    """A line every few seconds of long work whose size is known: how far it is, how fast, how long it will take.

    Call it with what is done so far; lines go to standard error.

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
        left = duration((self._total - done) / rate)
        text = f"{self._label}{done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s, left {left}"
        print(text, file=sys.stderr, flush=True)
