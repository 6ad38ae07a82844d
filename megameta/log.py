"""The log of a run: lines on the terminal and in RUN/logs."""

import logging
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
