"""Start a few ranks on this machine, collect what each returns or how it failed, and never hang or leave one behind."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

#: Seconds that the other ranks get to report once one has failed; they often wait for the one that is gone.
GRACE_SECONDS = 5.0
_FIXED = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


class RankError(AssertionError):
    """Some ranks failed or did not end in time; ``failures`` holds what each said, by rank."""

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures
        super().__init__("\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(failures.items())))


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(topology, *args)`` on every rank of a gloo group of fresh processes; their results by rank.

    The function and its arguments are pickled: a function at the top level of a test module.

    Raises:
        RankError: an exception (with its traceback), a death or a hang, by rank. All processes have ended by then.
    """
    from megameta.parallel.launch import free_port

    context = multiprocessing.get_context("spawn")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    processes, pipes = [], []
    deadline = time.monotonic() + timeout
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(theirs, function, args, rank, world_size), daemon=True)
            # A spawned process reads its environment before our code runs in it, and torch its thread count with that.
            with _environment({**_FIXED, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}):
                process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _collect(processes, pipes, deadline, timeout)
    finally:
        for process in processes:
            process.join(timeout=2.0 if sys.exc_info()[0] is None else 0.0)
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _collect(processes: list[Any], pipes: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(zip(pipes, range(len(pipes))))
    while waiting and time.monotonic() < deadline:
        for pipe in wait(list(waiting), timeout=min(0.5, max(0.0, deadline - time.monotonic()))):
            rank = waiting.pop(pipe)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(timeout=2.0)
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


def _rank(pipe: Connection, function: Callable[..., Any], args: tuple, rank: int, world_size: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # die with the test process, however that ends (Linux)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    try:
        import torch
        import torch.distributed as dist

        from megameta.parallel.launch import initialize_process_group
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


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
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
