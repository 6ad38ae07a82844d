"""What a run records: RUN/metrics.jsonl, TensorBoard, throughput and utilisation."""

import json
import os
import time
from pathlib import Path
from typing import Any

from megameta.cluster.attempt import Attempt
from megameta.errors import UserError
from megameta.files import write_text_atomically


class MetricsFile:
    """One JSON line a step, and one an evaluation (with "eval" in place of "loss").

    Opening cuts the file back to the step that the run goes on from, so that no step stands in it twice. It puts a new
    file in the place of the former one: an attempt that still writes somewhere writes into a file without a name.
    """

    def __init__(self, path: Path, resumed_step: int, attempt: Attempt | None = None) -> None:
        self._attempt, self._next_check = attempt, 0.0
        kept = [line for line in read_metrics(path) if line["step"] <= resumed_step] if path.exists() else []
        write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append a record: a kill of the process loses none, a power cut those after the last ``sync``.

        Raises:
            Superseded: a newer attempt has started (looked up once a second at most).
        """
        if self._attempt is not None and time.monotonic() > self._next_check:
            self._attempt.check()
            self._next_check = time.monotonic() + 1.0
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring the records to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
        UserError: another line is not JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not JSON ({error}); remove the line") from error
    return records


class TensorBoard:
    """RUN/tensorboard: evaluations, analyses, and the steps that log.interval shows; points after the resumed step are
    purged."""

    def __init__(self, directory: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resumed_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """One point a series of a record of ``MetricsFile``."""
        for name, value in _series(record).items():
            if value is not None:
                self._writer.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Nothing: its threads write when they do, and no run resumes from it."""

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def _series(record: dict[str, Any]) -> dict[str, float | None]:
    if "eval" in record:
        return {f"eval/{name}/{key}": value for name, result in record["eval"].items() for key, value in result.items()}
    if "analysis" in record:
        return {f"analysis/{name}": value for name, value in record["analysis"].items()}
    if "epochs" not in record:  # which come with the steps that are shown
        return {}
    numbers = {f"train/{k}": v for k, v in record.items() if k not in ("step", "batch", "skipped", "epochs")}
    return numbers | {f"epochs/{name}": count for name, count in record["epochs"].items()}
