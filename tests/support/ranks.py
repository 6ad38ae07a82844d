"""Start a few ranks on this machine, collect what each returns or how it failed, and never hang or leave one behind.

Every call gets processes that nothing has touched: DeepSpeed patches torch's functions, keeps groups and counters in
modules, and starts threads, and none of that is undone when an engine is destroyed. A fork costs less than a reset.
"""

import contextlib
import itertools
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.support.server import FIXED, fork_process, redirect

#: Seconds that the other ranks get to report once one has failed; they often wait for the one that is gone.
GRACE_SECONDS = 60.0
#: Below the ports that the kernel hands out by itself, so that no connection of another process takes one meanwhile.
_PORTS = itertools.cycle(range(20000 + os.getpid() % 100 * 100, 20000 + os.getpid() % 100 * 100 + 100))


class RankError(AssertionError):
    """Some ranks failed or did not end in time; ``failures`` holds what each said, by rank."""

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures
        super().__init__("\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(failures.items())))


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 1200) -> list[Any]:
    """Call ``function(topology, *args)`` on every rank of a gloo group of fresh processes; their results by rank.

    The function and its arguments are pickled: a function at the top level of a test module. ``timeout`` is a limit
    against hanging, not a claim about speed.

    Raises:
        RankError: an exception (with its traceback), a death or a hang, by rank. All processes have ended by then.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world_size)}
    processes, pipes = [], []
    deadline = time.monotonic() + timeout
    folder = tempfile.TemporaryDirectory(prefix="ranks-")
    printed = [Path(folder.name) / f"rank-{rank}" for rank in range(world_size)]
    for file in printed:
        file.touch()
    try:
        for rank in range(world_size):
            ours, theirs = Pipe(duplex=False)
            environment = {**os.environ, **FIXED, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            words = (theirs, function, args, rank, world_size, str(printed[rank]))
            processes.append(fork_process(_rank, *words, environment=environment))
            theirs.close()
            pipes.append(ours)
        return _collect(processes, pipes, deadline, timeout)
    except RankError as error:
        for rank in error.failures:
            error.add_note(f"--- rank {rank} printed:\n{printed[rank].read_text(errors='replace')[-4000:]}")
        raise
    finally:
        for process in processes:
            process.join(timeout=5.0 if sys.exc_info()[0] is None else 0.0)
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()
        folder.cleanup()


def _free_port() -> int:
    for port in itertools.islice(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port for a test's ranks")


def _collect(processes: list[BaseProcess], pipes: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(zip(pipes, range(len(pipes))))
    while waiting and time.monotonic() < deadline:
        for pipe in wait(list(waiting), timeout=min(0.5, max(0.0, deadline - time.monotonic()))):
            rank = waiting.pop(pipe)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join()
                succeeded, value = False, f"ended with code {processes[rank].exitcode} and no result"
            (results if succeeded else failures)[rank] = value
            if not succeeded:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    for rank in waiting.values():
        reason = f"within {GRACE_SECONDS:g} s of another's failure" if failures else f"within {timeout:g} s"
        failures[rank] = f"did not end {reason}"
    if failures:
        raise RankError(failures)
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, function: Callable[..., Any], args: tuple, rank: int, world_size: int, printed: str
) -> None:
    redirect(output=printed, errors=printed)
    try:
        import torch
        import torch.distributed as dist

        from megameta.cluster.launch import initialize_process_group
        from megameta.parallel.topology import Topology

        torch.set_num_threads(1)
        topology = Topology(world_size, rank, rank)
        initialize_process_group(topology)
        _send(pipe, True, function(topology, *args))
        dist.barrier()  # rank 0 holds the store that the others may still need
    except BaseException:
        with contextlib.suppress(OSError):
            _send(pipe, False, traceback.format_exc())
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a normal exit can wait for peers that are gone


def _send(pipe: Connection, succeeded: bool, value: Any) -> None:
    # Pickled plainly: Connection.send would pass tensors as shared memory that goes with its process.
    pipe.send_bytes(pickle.dumps((succeeded, value)))
