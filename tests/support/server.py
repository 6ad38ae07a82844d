"""Processes for tests, forked from a server that has imported torch, DeepSpeed and megameta already.

A new interpreter spends four seconds on these imports; a fork of the server spends 0.05 s, and nothing that a test does
in its process reaches another one: the process ends with the test. The server itself only imports (``preload.py``).
One server a pytest process, started when it is first needed; it ends with that process, and what it has forked too.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from tests.support.paths import ROOT

#: Imports of the server: what ranks need, and with what commands need beside it.
CORE, ALL = "tests.support.preload_core", "tests.support.preload"
#: Read by libraries while they are imported, so that the server must have them. Everything else a process sets itself.
FIXED = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
#: What the server of this process imports; empty until it is started.
_preloaded: list[str] = []


def fork_process(function: Callable[..., Any], *args: Any, environment: Mapping[str, str]) -> BaseProcess:
    """Start ``function(*args)`` in a process forked from the server, with this whole environment.

    Function and arguments are pickled: a function at the top level of a module. It ends by SIGKILL with the server.
    """
    context = start()
    process = context.Process(target=_enter, args=(_preloaded[0], function, args, dict(environment)))
    process.start()
    return process


def start(preload: str = ALL) -> ForkServerContext:
    """Start the server, which then imports by itself, if there is none yet; its context."""
    context = multiprocessing.get_context("forkserver")
    if not _preloaded:
        _preloaded.append(preload)
        forkserver.set_forkserver_preload([preload])
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        with changed_environment({**FIXED, "PYTHONPATH": path}):
            forkserver.ensure_running()
    return context


def _enter(preload: str, function: Callable[..., Any], args: tuple, environment: dict[str, str]) -> None:
    if preload not in sys.modules:  # multiprocessing passes over an import that fails
        raise ImportError(f"the fork server could not import {preload}: python -c 'import {preload}' says why")
    with contextlib.suppress(OSError, AttributeError):  # Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environment)
    function(*args)


def redirect(output: str, errors: str) -> None:
    """Nothing to read, and two files that are appended to, as a forked process's standard streams."""
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY), (2, errors, os.O_WRONLY)):
        opened = os.open(path, mode | (os.O_APPEND if number else 0))
        os.dup2(opened, number)
        os.close(opened)


def leave(code: int) -> NoReturn:
    """End a forked process as an interpreter ends: its threads, its ``atexit`` functions, its buffers, its code."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def changed_environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables are set inside the ``with``."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
