"""Attempts of a run: every start takes the next number, and one that is not the newest may write no more.

    RUN/logs/attempt_0001/     the first start: what it ran on (``cluster.records``), its heartbeat, how it ended
    RUN/logs/attempt_0002/     the second

A number is taken by making its directory, which succeeds for one process alone on any POSIX file system. A process on a
node that the scheduler has given up may still run while the next attempt is at work: before each rename that others see
(``checkpoints/latest``, a finished checkpoint, the removal of old ones) it looks whether the next number is taken.
Between that look and the rename lie microseconds, not a transaction: docs/slurm.md says what could happen there.
"""

import contextlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megameta.errors import Superseded
from megameta.files import write_text_atomically

#: What ended an attempt, in RUN/logs/attempt_N/end.json.
MISTAKE, LOST, STUCK, SUPERSEDED = "mistake", "lost", "stuck", "superseded"
_NAME = re.compile(r"attempt_(\d{4,})")


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    number: int
    folder: Path
    """RUN/logs/attempt_N."""

    def check(self) -> None:
        """Look whether this is still the newest attempt.

        Raises:
            Superseded: it is not.
        """
        # Numbers are taken one after another, so that one look is enough.
        if _folder(self.folder.parent, self.number + 1).exists():
            raise Superseded(
                f"attempt {self.number} of {self.folder.parent.parent} stops: attempt {self.number + 1} has started"
                " and the run directory is its own now. Nothing more is written"
            )

    def note_end(self, kind: str, message: str) -> None:
        """Record what ended the attempt, once: the first to say it is nearest to the cause."""
        path = self.folder / "end.json"
        with contextlib.suppress(OSError):  # the disk may be what has failed, and the message is being printed anyway
            if not path.exists():
                write_text_atomically(path, json.dumps({"kind": kind, "message": message, "time": time.time()}) + "\n")


def claim(run_dir: Path, number: int | None = None) -> Attempt:
    """Take the next number of a run, or this one.

    Raises:
        FileExistsError: the number that was asked for is taken.
    """
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    while True:
        wanted = newest_number(run_dir) + 1 if number is None else number
        folder = _folder(logs, wanted)
        try:
            folder.mkdir()
        except FileExistsError:
            if number is not None:
                raise
            continue
        return Attempt(wanted, folder)


def newest_number(run_dir: Path) -> int:
    """Number of the newest attempt, 0 where there is none."""
    logs = run_dir / "logs"
    names = [path.name for path in logs.iterdir()] if logs.is_dir() else []
    return max((int(match.group(1)) for name in names if (match := _NAME.fullmatch(name))), default=0)


def attempt(run_dir: Path, number: int) -> Attempt:
    """An attempt by its number, whether it is there or not."""
    return Attempt(number, _folder(run_dir / "logs", number))


def newest_attempt(run_dir: Path) -> Attempt | None:
    """The newest attempt of a run."""
    number = newest_number(run_dir)
    return attempt(run_dir, number) if number else None


def how_it_ended(attempt: Attempt) -> dict[str, Any] | None:
    """What ``note_end`` recorded; None where the attempt said nothing."""
    try:
        found = json.loads((attempt.folder / "end.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def saved_step(run_dir: Path) -> int:
    """Step of the newest checkpoint, 0 without one; the checkpoint itself is not opened."""
    try:
        return int((run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip().rpartition("_")[2])
    except (OSError, ValueError):
        return 0


def _folder(logs: Path, number: int) -> Path:
    return logs / f"attempt_{number:04d}"
