"""Jobs that depend on one another, several at a time, which go on where they were interrupted.

A job's stamp holds a fingerprint of what it and all jobs before it depend on. A finished job with the same fingerprint
is not run again; an unfinished one goes on with the files it left; one whose fingerprint differs starts anew.
"""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megameta.errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from megameta.files import write_text_atomically
from megameta.quickstart.stages import STOP_SIGNALS, Stopped, remove

#: Seconds between lines about what runs.
_REPORT_EVERY = 60.0
#: Seconds that jobs get to save and stop.
_GRACE = 120.0
#: Names that modules had first, which stay in fingerprints: moved code is no reason to delete what a job has made.
_FIRST_NAMES = {
    "megameta.paper.reproduce.prepare": "megameta.reproduce.prepare",
    "megameta.paper.reproduce.speed": "megameta.reproduce.speed",
}


@dataclass(frozen=True)
class Job:
    """A part of the work.

    Attributes:
        name: of its stamp and log; slashes make folders.
        commands: arguments of python, run one after another.
        outputs: files and directories that go when the job starts anew.
        needs: names of the jobs that must be done before.
        weight: what it takes, in any unit that all jobs share.
        inputs: everything JSON that the outputs depend on beside commands and the jobs before.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    outputs: tuple[Path, ...]
    needs: tuple[str, ...] = ()
    weight: float = 0.0
    inputs: Any = None


@dataclass
class _Running:
    job: Job
    log: Path
    start: float
    before: float
    slot: int
    left: deque[tuple[str, ...]] = field(default_factory=deque)
    process: subprocess.Popen | None = None


class JobRunner:
    """Runs jobs under ``directory``: stamps in jobs/, output in logs/."""

    def __init__(
        self, directory: Path, jobs: Sequence[Job], slots: int, *, environments: Sequence[dict[str, str]] = ({},)
    ) -> None:
        """
        Args:
            jobs: each after those that it needs.
            slots: how many run at once.
            environments: of the slots, beside what this process has (a GPU each, say); used round.
        """
        self.directory, self.jobs, self.slots = directory, list(jobs), slots
        self._environments = environments
        self._fingerprints = fingerprints(self.jobs)
        self._running: list[_Running] = []
        self._done = {job.name for job in self.jobs if self.is_done(job)}
        self._stop = False
        self._begun = time.monotonic()
        self._weight_done = 0.0
        self._next_report = self._begun + _REPORT_EVERY

    def is_done(self, job: Job) -> bool:
        known = self._known(job)
        return (
            known.get("fingerprint") == self._fingerprints[job.name]
            and bool(known["done"])
            and all(path.exists() for path in job.outputs)
        )

    def seconds(self) -> dict[str, float]:
        """What each job took so far, by name, interruptions left out."""
        return {job.name: self._known(job).get("seconds", 0.0) for job in self.jobs}

    def run(self, seconds: float | None = None) -> None:
        """Run what is not done.

        Args:
            seconds: then stop, as if asked to.

        Raises:
            UserError: a job failed; the others have been stopped and go on at the next start.
            Stopped: a signal came, or the time is over.
        """
        end = None if seconds is None else self._begun + seconds
        with _exclusive(self.directory), self._signals():
            try:
                while len(self._done) < len(self.jobs):
                    if self._stop or (end is not None and time.monotonic() > end):
                        raise Stopped
                    self._start_ready()
                    self._look_after()
                    self._report()
                    time.sleep(0.1)
            finally:
                self._end_all()

    # --- one job ----------------------------------------------------------------------------------------------------

    def _start_ready(self) -> None:
        busy = {running.job.name for running in self._running}
        for job in self.jobs:
            if len(self._running) >= self.slots:
                return
            if job.name not in self._done | busy and self._done.issuperset(job.needs):
                self._start(job)

    def _start(self, job: Job) -> None:
        known = self._known(job)
        same = known.get("fingerprint") == self._fingerprints[job.name]
        if not same:
            for path in job.outputs:
                remove(path)
        slot = min(set(range(self.slots)) - {running.slot for running in self._running})
        log = self.directory / "logs" / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        running = _Running(job, log, time.monotonic(), known["seconds"] if same else 0.0, slot, deque(job.commands))
        self._running.append(running)
        self._write(running, done=False)
        log.write_text("", encoding="utf-8")
        self._say(f"{job.name}{' goes on' if same and known['seconds'] else ''}")
        self._next_command(running)

    def _next_command(self, running: _Running) -> None:
        environment = {**os.environ, **self._environments[running.slot % len(self._environments)]}
        command = [sys.executable, *running.left.popleft()]
        with running.log.open("a", encoding="utf-8") as log:
            log.write(f"$ python {' '.join(command[1:])}\n")
            log.flush()
            # A group of its own: Ctrl-C reaches this process alone, which then asks the job to save and stop.
            running.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, process_group=0
            )

    def _look_after(self) -> None:
        for running in list(self._running):
            code = running.process.poll() if running.process is not None else EXIT_OK
            if code is None:
                continue
            if code == EXIT_INTERRUPTED:
                raise Stopped
            if code != EXIT_OK:
                raise UserError(self._failure(running, code))
            if running.left:
                self._next_command(running)
                continue
            missing = [str(path) for path in running.job.outputs if not path.exists()]
            if missing:
                raise UserError(f"{running.job.name} ended well but left no {missing[0]}; see {running.log}")
            self._running.remove(running)
            self._write(running, done=True)
            self._done.add(running.job.name)
            self._weight_done += running.job.weight
            self._say(f"{running.job.name} done in {_clock(self._taken(running))}{self._forecast()}")

    def _failure(self, running: _Running, code: int) -> str:
        last = [line for line in running.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        tail = "\n  ".join(last[-12:])
        return (
            f"{running.job.name} failed (exit code {code}); its output is in {running.log}, the end of it:\n  {tail}\n"
            "Once that is mended, start again: what is done is kept"
        )

    def _end_all(self) -> None:
        """Ask all jobs to save and stop; end what does not."""
        alive = [running for running in self._running if running.process is not None]
        for running in alive:
            if running.process.poll() is None:  # type: ignore[union-attr]
                running.process.terminate()  # type: ignore[union-attr]
        end = time.monotonic() + _GRACE
        for running in alive:
            process = running.process
            if process is None:
                continue
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self._write(running, done=False)
        self._running.clear()

    # --- stamps and words -------------------------------------------------------------------------------------------

    def _stamp(self, job: Job) -> Path:
        return self.directory / "jobs" / f"{job.name}.json"

    def _known(self, job: Job) -> dict[str, Any]:
        path = self._stamp(job)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _write(self, running: _Running, *, done: bool) -> None:
        path = self._stamp(running.job)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "fingerprint": self._fingerprints[running.job.name],
            "seconds": round(self._taken(running), 1),
            "done": done,
        }
        write_text_atomically(path, json.dumps(values) + "\n")

    def _taken(self, running: _Running) -> float:
        return running.before + time.monotonic() - running.start

    def _say(self, text: str) -> None:
        print(f"[{len(self._done)}/{len(self.jobs)}] {text}", flush=True)

    def _forecast(self) -> str:
        left = sum(job.weight for job in self.jobs if job.name not in self._done)
        # Small jobs tell nothing about large ones: they are mostly starting.
        if not left or self._weight_done < 0.02 * sum(job.weight for job in self.jobs):
            return ""
        return f", about {_clock(left / self._weight_done * (time.monotonic() - self._begun))} left"

    def _report(self) -> None:
        now = time.monotonic()
        if now < self._next_report:
            return
        self._next_report = now + _REPORT_EVERY
        for running in self._running:
            print(f"    {running.job.name}: {_last_line(running.log)}", flush=True)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(_number: int, _frame: object) -> None:
            self._stop = True

        before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def fingerprints(jobs: Sequence[Job]) -> dict[str, str]:
    """A hash of what each job and those before it depend on, by name."""
    found: dict[str, str] = {}
    for job in jobs:
        before = [found[name] for name in job.needs]
        commands = [[_FIRST_NAMES.get(word, word) for word in command] for command in job.commands]
        text = json.dumps([before, commands, job.inputs], sort_keys=True, default=str)
        found[job.name] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return found


@contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    """Two runs in one directory would overwrite each other's files."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process is at work in {directory}; wait for it, or give another --output"
            ) from error
        yield


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip()[:150] for line in reversed(lines) if line.strip()), "starting")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
