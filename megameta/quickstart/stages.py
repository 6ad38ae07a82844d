"""Stages of a long job that goes on where it was interrupted, and the commands that they run.

A stage's stamp holds a fingerprint of what it and all stages before it depend on. A finished stage with the same
fingerprint is skipped; an unfinished one goes on with the files it left; one whose fingerprint differs starts anew.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megameta.errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from megameta.files import write_text_atomically

#: Signals that end the job: the command that runs gets SIGTERM, at which training saves a checkpoint.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """The job was asked to stop; it goes on when started again."""


@dataclass(frozen=True)
class Stage:
    """A part of the job.

    Attributes:
        name: of its stamp.
        title: what a person reads.
        run: does the work.
        inputs: everything JSON that the outputs depend on beside the stages before.
        outputs: files and directories that go when the stage starts anew.
    """

    name: str
    title: str
    run: Callable[[], None]
    inputs: Any
    outputs: tuple[Path, ...]


@dataclass(frozen=True)
class StageTime:
    """What a stage took, summed over interruptions."""

    title: str
    seconds: float


def duration(seconds: float) -> str:
    """m:ss"""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


class StageRunner:
    """Runs stages in order under ``directory``, which keeps their stamps in stages/."""

    def __init__(self, directory: Path, total: int) -> None:
        self._stamps = directory / "stages"
        self._total = total
        self._number = 0
        self._fingerprint = ""
        self._start = time.monotonic()
        self.times: list[StageTime] = []

    def header(self, title: str, note: str = "") -> None:
        """Announce a stage."""
        self._number += 1
        since = duration(time.monotonic() - self._start)
        print(f"\n[{self._number}/{self._total}] {title} ({note or f'at {since}'})", flush=True)

    def run(self, stage: Stage) -> None:
        """Run a stage unless it is done already."""
        text = json.dumps([self._fingerprint, stage.inputs], sort_keys=True, default=str)
        self._fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        stamp = self._stamps / f"{stage.name}.json"
        known = _read(stamp)
        same = known.get("fingerprint") == self._fingerprint
        if same and known["done"] and all(path.exists() for path in stage.outputs):
            self.header(stage.title, f"done before, in {duration(known['seconds'])}")
            self.times.append(StageTime(stage.title, known["seconds"]))
            return
        if not same:
            for path in stage.outputs:
                remove(path)
        self.header(stage.title)
        before = known["seconds"] if same else 0.0
        done = False
        self._stamps.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        self._write(stamp, before, done)
        try:
            stage.run()
            done = True
        finally:
            seconds = before + time.monotonic() - start
            self._write(stamp, seconds, done)
        self.times.append(StageTime(stage.title, seconds))

    def _write(self, stamp: Path, seconds: float, done: bool) -> None:
        values = {"fingerprint": self._fingerprint, "seconds": round(seconds, 1), "done": done}
        write_text_atomically(stamp, json.dumps(values) + "\n")


def _read(stamp: Path) -> dict[str, Any]:
    return json.loads(stamp.read_text(encoding="utf-8")) if stamp.exists() else {}


def remove(path: Path) -> None:
    """A file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Commands:
    """Runs the public commands as a user would."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = {**os.environ, **environment}
        self._process: subprocess.Popen | None = None
        self._stop_time: float | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def python(self, *arguments: str) -> None:
        """Print and run ``python ARGUMENTS``; its output goes where ours goes.

        Raises:
            UserError: it failed (it has said why).
            Stopped: a signal came in the meantime.
        """
        if self._stop_time is not None:
            raise Stopped
        print(f"$ {shown(arguments)}", flush=True)
        # A process group of its own: Ctrl-C reaches this process alone, which then asks the command to save and stop.
        self._process = subprocess.Popen([sys.executable, *arguments], env=self.environment, process_group=0)
        code = self._process.wait()
        self._process = None
        if self._stop_time is not None or code == EXIT_INTERRUPTED:
            raise Stopped
        if code != EXIT_OK:
            raise UserError(
                f"the command above failed (exit code {code}) and has said why. When that is mended, start again:"
                " what is done is kept (--fresh starts over)"
            )

    def _on_signal(self, _number: int, _frame: object) -> None:
        now = time.monotonic()
        first = self._stop_time is None
        if first:
            self._stop_time = now
        if self._process is None:
            raise Stopped
        if first:
            print("\nstopping; training saves a checkpoint first (once more: stop now)", file=sys.stderr, flush=True)
            self._process.terminate()
        elif now - (self._stop_time or now) > 1:  # not the same key press by way of make
            os.killpg(self._process.pid, signal.SIGKILL)


def shown(arguments: Sequence[str]) -> str:
    """A command as a person would type it."""
    return shlex.join(["python", *arguments])
