"""What a run records and shows as it goes: metrics.jsonl, TensorBoard, the bar or lines, the heartbeat."""

import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megameta.cluster.session import RunSession
from megameta.config import RunConfig
from megameta.files import write_text_atomically
from megameta.log import LOG, duration
from megameta.train.display import StepDisplay
from megameta.train.metrics import MetricsFile, TensorBoard


class Logger(Protocol):
    """Takes the records of a run on rank 0.

    A record has "step", and "loss" and the other numbers of that step, or "eval" (results by held-out set), or
    "analysis" (numbers by name).
    """

    def write(self, record: dict[str, Any]) -> None:
        """Take a record."""

    def sync(self) -> None:
        """Bring what was taken to the disk."""

    def close(self) -> None:
        """Sync and close."""


class RunRecords:
    """The records of a run; on ranks other than 0 they go nowhere.

    Args:
        step: that the run resumes from.
    """

    def __init__(self, config: RunConfig, session: RunSession, step: int, *, is_main: bool) -> None:
        self._config, self._session, self._is_main = config, session, is_main
        self._seconds: deque[float] = deque(maxlen=50)
        self._display: StepDisplay | None = None
        self.loggers: list[Logger] = []
        if is_main:
            directory = Path(config.run.dir)
            write_text_atomically(directory / "config.yaml", config.to_yaml())
            self.loggers.append(MetricsFile(directory / "metrics.jsonl", step, session.attempt))
            if config.log.tensorboard:
                self.loggers.append(TensorBoard(directory / "tensorboard", step))

    @property
    def typical_seconds(self) -> float:
        """Of a step: the median of the last ones."""
        return statistics.median(self._seconds)

    def begin(self, step: int) -> None:
        """Show that training begins, after so many steps."""
        if self._is_main:
            config = self._config
            self._display = StepDisplay("training", config.train.num_steps, step, config.log.interval)

    def step(self, record: dict[str, Any], seconds: float, slots: int) -> None:
        """Record a finished step, which took so long for so many slots of all ranks."""
        self._seconds.append(seconds)
        self._write(record)
        if self._display is None:
            return
        step, typical = record["step"], self.typical_seconds
        speed, left = slots / typical, typical * (self._config.train.num_steps - step)
        self._display.step(step, record["loss"], record["lr"], speed, left)
        if (heartbeat := self._session.monitor.heartbeat) is not None:
            heartbeat.step = step
            heartbeat.numbers = {"loss": record["loss"], "tokens_per_second": speed, "eta_seconds": left}

    def evaluation(self, step: int, results: Mapping[str, Any], seconds: float) -> None:
        """Record results by held-out set, each a dataclass of numbers."""
        self._write({"step": step, "eval": {name: vars(result) for name, result in results.items()}})
        for name, result in results.items():
            LOG.info("step %d · %s: %s", step, name, result)
        LOG.info("evaluation took %s", duration(seconds))

    def analysis(self, step: int, found: Mapping[str, float], seconds: float) -> None:
        """Record what a probe has measured."""
        every = self._config.analysis.interval
        share = seconds / (every * self.typical_seconds)
        self._write({"step": step, "analysis": dict(found), "seconds": seconds, "share_of_steps": share})
        numbers = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
        LOG.info("step %d · inside: %s; %.2f s, %.1f %% of %d steps", step, numbers, seconds, 100 * share, every)

    def sync(self) -> None:
        """Bring all records to the disk."""
        for logger in self.loggers:
            logger.sync()

    def close(self) -> None:
        """Sync and close."""
        if self._display is not None:
            self._display.close()
        for logger in reversed(self.loggers):
            logger.close()

    def _write(self, record: dict[str, Any]) -> None:
        for logger in self.loggers:
            logger.write(record)
