"""What the person at the terminal sees: a live bar on a terminal, plain lines elsewhere, both in RUN/logs."""

import logging
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

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


class StepDisplay:
    """Progress of a training run: step, loss, learning rate, tokens/s, ETA."""

    def __init__(self, title: str, num_steps: int, done: int, interval: int) -> None:
        self.interval = interval
        self.num_steps = num_steps
        self._live = CONSOLE.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=CONSOLE,
            disable=not self._live,
        )
        self._task = self._bar.add_task(title, total=num_steps, completed=done, numbers="")
        self._bar.start()

    def step(self, step: int, loss: float, lr: float, tokens_per_second: float, eta: float) -> None:
        """Show a finished step."""
        numbers = f"loss {loss:.4f} · lr {lr:.2e} · {tokens_per_second:,.0f} tokens/s · ETA {duration(eta)}"
        self._bar.update(self._task, completed=step, numbers=numbers)
        if not self._live and (step % self.interval == 0 or step == self.num_steps):
            LOG.info("step %d/%d · %s", step, self.num_steps, numbers)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()
