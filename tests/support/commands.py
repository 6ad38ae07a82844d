"""Commands as a person starts them: argv, working directory, environment, pid, signals, exit code, captured streams.

They are forked from the tests' server (``server.py``) in place of starting an interpreter, and so is what they start
(``forking.py``). Not for a test whose subject is that start: imports, early signals, the launcher, variables
that libraries read while they are imported, what works where megameta is not installed. Those call ``true_process``.
"""

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import psutil

from tests.support.forking import run_program
from tests.support.paths import ROOT
from tests.support.runs import last_step
from tests.support.server import FIXED, fork_process, leave, redirect
from tests.support.waiting import wait_until

#: A limit against hanging, in seconds; everything here takes less than a tenth of it on an idle machine.
TIMEOUT = 1200.0
#: What a launcher, a test runner or SLURM would pass on to a command that a person did not start under them.
_NOT_PASSED_ON = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTEST_CURRENT_TEST",
    "PYTHONDONTWRITEBYTECODE",
)


def plain_environment(**changes: str) -> dict[str, str]:
    """This process's variables without those of launchers, on CPUs, with megameta to be imported from here."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    return {**kept, **FIXED, "PYTHONPATH": str(ROOT), **changes}


@cache
def _folder_of_streams() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="megameta-tests-")  # removed when the interpreter ends


class Command:
    """A command in the background: ``Command(folder, "megameta", "train", …)``, ``Command(folder, "tools/x.py", …)``.

    Args:
        folder: the working directory.
        program: ``megameta``, or a script's path from the root of the repository.
        session: whether it leads a session, and so a group of processes, of its own.
    """

    _started = 0

    def __init__(
        self,
        folder: Path,
        program: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        session: bool = False,
    ) -> None:
        Command._started += 1
        self.folder = folder
        self.arguments = [*map(str, (program, *arguments))]
        self.output, self.errors = (
            Path(_folder_of_streams().name) / f"{Command._started}-{stream}" for stream in ("stdout", "stderr")
        )
        for file in (self.output, self.errors):
            file.touch()
        words = (self.arguments, str(folder), str(self.output), str(self.errors), session)
        environment = plain_environment() if environment is None else environment
        self.process = fork_process(_run, *words, environment=environment)
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float = TIMEOUT) -> int:
        """The exit code. A command that does not end in time is killed, with all that it has started.

        Raises:
            subprocess.TimeoutExpired: that.
        """
        self.process.join(timeout)
        code = self.poll()
        if code is None:
            self.end()
            raise subprocess.TimeoutExpired(self.arguments, timeout, self.said)
        return code

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Kill what is left of it, by pid."""
        if self.poll() is None:
            try:
                family = [*psutil.Process(self.pid).children(recursive=True), psutil.Process(self.pid)]
            except psutil.NoSuchProcess:
                family = []
            for member in family:
                member.kill()
        self.process.join()

    @property
    def stdout(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self.errors.read_text(errors="replace")

    @property
    def said(self) -> str:
        """Both streams, the errors last."""
        return self.stdout + self.stderr

    def wait_for_step(self, run: str, step: int, timeout: float = TIMEOUT) -> None:
        """Until the run directory's metrics hold this step."""
        wait_until(lambda: last_step(self.folder / run) >= step, unless=self._how_it_ended, limit=timeout)

    def _how_it_ended(self) -> str | None:
        return None if self.poll() is None else f"code {self.poll()}: {self.said}"


def run_command(
    folder: Path,
    program: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    check: bool = False,
    timeout: float = TIMEOUT,
) -> subprocess.CompletedProcess[str]:
    """A command to its end: its code and what it printed. ``check``: fail where the code is not 0."""
    command = Command(folder, program, *arguments, environment=environment)
    code = command.wait(timeout)
    done = subprocess.CompletedProcess(command.arguments, code, command.stdout, command.stderr)
    assert not check or code == 0, done
    return done


def true_process(
    *words: object,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
) -> subprocess.CompletedProcess[str]:
    """Run a program in a new process that shares nothing with this one: its code and what it printed."""
    environment = plain_environment() if environment is None else environment
    return subprocess.run(
        [*map(str, words)],
        cwd=folder,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def one_error(said: str) -> str:
    """The message of a command that failed: said once, without a stack trace."""
    assert "Traceback" not in said, said
    assert said.count("error: ") == 1, said
    return said[said.index("error: ") :]


# --- in the forked process ----------------------------------------------------------------------------------------


def _run(arguments: Sequence[str], folder: str, output: str, errors: str, session: bool) -> None:
    if session:
        os.setsid()
    redirect(output, errors)
    os.chdir(folder)
    leave(run_program(arguments[0], arguments[1:]))
