"""A run directory and the processes that train in it, seen and killed from outside. For ``kills.py``."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megameta.checkpoint import latest_checkpoint, open_checkpoint
from megameta.errors import UserError
from tests.support.commands import plain_environment
from tests.support.runs import hashes, last_step, records

RANKS, KEEP = 2, 2
#: Seconds for a start on a machine that is busy with other things.
PATIENCE = 1800.0


class Run:
    """A run directory, and the processes that train in it when there are some."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.directory = folder, folder / name
        self.checkpoints = self.directory / "checkpoints"
        self.output = folder / f"{name}.log"
        self.saved = 0
        self.began = self.began_at = 0.0
        self._said_before = 0
        self._launcher: subprocess.Popen | None = None

    # --- processes --------------------------------------------------------------------------------------------------

    def start(self, interval: int) -> None:
        """Start, or start again."""
        command = [sys.executable, "-m", "megameta", "train", "run.yaml", f"run.dir={self.directory.name}"]
        command += [f"checkpoint.interval={interval}", "--nproc-per-node", str(RANKS)]
        self.began, self.began_at = time.monotonic(), time.time()
        with self.output.open("a") as output:
            self._said_before = output.tell()
            self._launcher = subprocess.Popen(
                command, cwd=self.folder, env=plain_environment(), stdout=output, stderr=output, start_new_session=True
            )

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._launcher.poll()

    @property
    def said(self) -> str:
        """What the last start printed."""
        return self.output.read_bytes()[self._said_before :].decode(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """Those that the launcher has started so far, in order."""
        try:
            return sorted(
                psutil.Process(self._launcher.pid).children(), key=lambda child: (child.create_time(), child.pid)
            )
        except psutil.NoSuchProcess:
            return []

    def strike(self, target: str) -> bool:
        """SIGKILL: no clean-up of any kind runs in what is hit. False where it has ended by itself."""
        if self.code is not None:
            return False
        if target == "everything":
            os.killpg(self._launcher.pid, signal.SIGKILL)
            return True
        try:
            rank = self.ranks()[int(target[-1])]
            alive = rank.status() != psutil.STATUS_ZOMBIE
            rank.kill()
        except (IndexError, psutil.NoSuchProcess):
            return False
        return alive

    def left(self) -> list[int]:
        """Processes of the last start that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == self._launcher.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def wait_for_the_end(self, timeout: float) -> list[int]:
        """Wait for the launcher; the processes that are there when it is not, which are ended here, then."""
        try:
            self._launcher.wait(timeout)
            end = time.monotonic() + 60  # of processes that have been killed, in the kernel
            while (left := self.left()) and time.monotonic() < end:
                time.sleep(0.05)
            return left
        except subprocess.TimeoutExpired:
            return self.left()
        finally:
            self.end()

    def end(self) -> None:
        """Kill what is left of it."""
        if self._launcher is not None:
            for pid in self.left():
                os.kill(pid, signal.SIGKILL)
            self._launcher.wait()

    # --- what it is doing -------------------------------------------------------------------------------------------

    def wait_until(self, condition: Callable[[], bool], pause: float) -> bool:
        """Wait for something that the run does; False where it ends without."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.code is not None:
                return False
            if time.monotonic() > end:
                raise TimeoutError(f"{self.directory}: waited {PATIENCE:g} s in vain; it said\n{self.said}")
            time.sleep(pause)
        return True

    def holds_lock(self) -> bool:
        """Whether rank 0 has come to the run directory: everything before is start-up."""
        ranks = self.ranks()
        try:
            return bool(ranks) and any(file.path.endswith("/.lock") for file in ranks[0].open_files())
        except psutil.Error:
            return False

    def writing(self) -> bool:
        """Whether a checkpoint is being written; what an earlier start has left does not count."""
        return any(self._is_of_this_start(path) for path in self.checkpoints.glob(".step_*.writing"))

    def step(self) -> int:
        """The last step of this start; before there is one, the one that it goes on from."""
        path = self.directory / "metrics.jsonl"
        return last_step(self.directory) if self._is_of_this_start(path) else self.saved

    def moment(self) -> str:
        """What the run is doing now, as far as its files show."""
        if self.writing():
            return "saving: files being written"
        latest = self.checkpoints / "latest"
        steps = sorted(self.checkpoints.glob("step_*"))
        if steps and self._is_of_this_start(steps[-1]) and steps[-1] != latest_checkpoint(self.directory):
            return "saving: named, not yet latest"
        old = any(self._is_of_this_start(path) for path in self.checkpoints.glob(".step_*.old"))
        if old or (len(steps) > KEEP and self._is_of_this_start(latest)):
            return "saving: older ones being removed"
        if self.step() > self.saved:
            return "training"
        return "loading" if self.holds_lock() else "start-up"

    def _is_of_this_start(self, path: Path) -> bool:
        try:
            return path.stat().st_ctime >= self.began_at  # a rename, too, changes it
        except FileNotFoundError:
            return False

    # --- what has to hold -------------------------------------------------------------------------------------------

    def check_after_kill(self) -> list[str]:
        """Note the checkpoint that is there; what is wrong with it."""
        try:
            step = open_checkpoint(self.directory).trainer().step
        except UserError as error:
            return [f"no checkpoint after step {self.saved} had been saved: {error}"] if self.saved else []
        problems = [f"step {self.saved} was saved, and {step} is left"] if step < self.saved else []
        self.saved = step
        return problems

    def check_completed(self, whole: "Run") -> list[str]:
        """How the completed run differs from the undisturbed one."""
        problems = []
        if records(self.directory) != records(whole.directory):
            problems.append("its metrics.jsonl is not that of the undisturbed run")
        if hashes(self.directory) != hashes(whole.directory):
            problems.append("the tensors of its last checkpoint are not those of the undisturbed run")
        names = sorted(path.name for path in self.checkpoints.iterdir())
        if len(names) != 1 + KEEP or names[0] != "latest" or not all(name.startswith("step_") for name in names[1:]):
            problems.append(f"left in checkpoints/: {', '.join(names)}")
        beside = [path.name for path in self.directory.glob(".*") if path.name != ".lock"]
        return problems + [f"left in the run: {', '.join(sorted(beside))}"] * bool(beside)
