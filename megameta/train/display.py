"""The progress of a training run: a live bar on a terminal, plain lines elsewhere, both in RUN/logs."""

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from megameta.log import CONSOLE, LOG, duration


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
