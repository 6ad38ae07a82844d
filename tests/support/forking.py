"""What megameta starts from a forked command is forked as well: ranks, jobs, the programs of a line.

``run_program`` runs a program of the repository as a new interpreter would, in this process; ``Forked`` stands for
``subprocess.Popen`` where megameta calls it.
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

from tests.support.paths import ROOT
from tests.support.server import leave


def run_program(program: str, arguments: Sequence[str]) -> int:
    """As ``python -m PROGRAM …`` (megameta, megameta.x) or ``python tools/x.py …`` from the root; the exit code."""
    from megameta.cluster import launch
    from megameta.paper.reproduce import jobs
    from megameta.quickstart import stages

    for module in (launch, jobs, stages):
        module.subprocess = _FORKING  # type: ignore[attr-defined]
    sys.argv = [program, *arguments]
    try:
        if program.endswith(".py"):
            sys.argv[0] = str(ROOT / program)
            sys.path.insert(0, str((ROOT / program).parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class Forked:
    """What megameta uses of ``subprocess.Popen``, for a command of this interpreter that runs a program of ours."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], process_group: int = -1, **streams: Any):
        assert command[0] == sys.executable, command
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if process_group >= 0:
                os.setpgid(0, process_group)
            self._become(command[1:], env, streams)
        if process_group >= 0:  # in both processes: whichever comes first, and here it may run another program by now
            with contextlib.suppress(PermissionError):
                os.setpgid(self.pid, process_group or self.pid)

    @staticmethod
    def _become(words: Sequence[str], env: Mapping[str, str], streams: Mapping[str, Any]) -> NoReturn:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            if name in streams:
                stream = streams[name]
                opened = os.open(os.devnull, os.O_RDWR) if stream == subprocess.DEVNULL else stream.fileno()
                os.dup2(opened, number)
        os.environ.clear()
        os.environ.update(env)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if words[0] == "-m":
            leave(run_program(words[1], words[2:]))
        if words[0].startswith("tools/"):
            leave(run_program(words[0], words[1:]))
        os.execv(sys.executable, [sys.executable, *words])  # an option of the interpreter, another program

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int | None:
        if timeout is None:
            return self._reap(0)
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return self.returncode

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


#: In place of the module ``subprocess`` where megameta starts programs of its own.
_FORKING = SimpleNamespace(**{name: getattr(subprocess, name) for name in subprocess.__all__} | {"Popen": Forked})
