"""From a launcher's environment to a Topology, and a launcher of our own for one machine.

torchrun, deepspeed and ``megameta train --nproc-per-node`` set RANK, WORLD_SIZE and LOCAL_RANK; under srun the same
comes from SLURM's variables, and the ranks meet on the first host of the step; without any of them a process is alone.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megameta.cluster.slurm.environment import expand_hosts, host_name, in_step, one_device_each, rendezvous
from megameta.errors import EXIT_LOST, MachineError, UserError
from megameta.parallel.topology import Topology

#: Seconds that the other ranks get to end by themselves once one has failed.
GRACE_SECONDS = 20.0
#: Seconds in which all ranks of an srun step must have come: python starts slowly from a shared file system.
MEETING_SECONDS = 600.0


def pick_device(wanted: str, environment: Mapping[str, str] = os.environ) -> str:
    """ "cuda" or "cpu" for run.device = auto, cpu or cuda.

    Raises:
        UserError: no GPU is seen where the configuration or SLURM says that there is one.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError(
            f"run.device is cuda, but torch sees no CUDA device on {host_name(environment)}; set run.device=cpu"
        )
    # Else this node would compute on its CPU, and wait for ever for the others, which talk over NCCL.
    granted = environment.get("SLURM_GPUS_ON_NODE", "0")
    if wanted == "auto" and not available and in_step(environment) and granted != "0":
        raise UserError(
            f"node {host_name(environment)}: SLURM gave {granted} GPU(s) to this job there, but torch (built for CUDA"
            f" {torch.version.cuda}) sees none: look at nvidia-smi there; --exclude the node, or set run.device=cpu"
        )
    return "cuda" if available and wanted != "cpu" else "cpu"


def ranks_from_environment(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world size, local rank).

    Raises:
        UserError: half-set variables, or values that are not numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in environment and in_step(environment):
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    elif "RANK" not in environment:
        return 0, 1, 0
    try:
        rank, size, local = (int(environment[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(f"the launcher's variables {', '.join(names)} are not all set to numbers: {error}") from error
    return rank, size, local


def make_topology(
    device: str,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    environment: Mapping[str, str] = os.environ,
) -> Topology:
    """The place of this process.

    Raises:
        UserError: the launcher started a number of processes that model replicas of this size do not divide, or more
            on this machine than it has GPUs.
    """
    rank, size, local = ranks_from_environment(environment)
    number = local
    if device == "cuda" and torch.cuda.device_count() == 1 and one_device_each(environment):
        number = 0
    if device == "cuda" and number >= torch.cuda.device_count():
        raise MachineError(
            f"node {host_name(environment)}: rank {rank} is number {local} on this machine, of which torch sees"
            f" {torch.cuda.device_count()} GPU(s); start as many processes as there are GPUs, or if one is missing"
            " (nvidia-smi), --exclude the node"
        )
    if size % (tensor_parallel_size * pipeline_parallel_size):
        raise UserError(
            f"{size} process(es) cannot be divided into model replicas of parallel.tensor_parallel_size"
            f" {tensor_parallel_size} × parallel.pipeline_parallel_size {pipeline_parallel_size} ranks: start a"
            f" multiple of {tensor_parallel_size * pipeline_parallel_size}, or lower these"
        )
    return Topology(
        world_size=size,
        rank=rank,
        local_rank=local,
        device=f"cuda:{number}" if device == "cuda" else "cpu",
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
    )


def initialize_process_group(
    topology: Topology, timeout: timedelta | None = None, connect_seconds: float = 120.0
) -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs. A lone process makes a group of one.

    Args:
        timeout: of collectives; torch's own where there is none.
        connect_seconds: in which ranks of an srun step, once all have come, must reach one another; else the process
            ends with ``EXIT_LOST`` and says so: no collective can tell more, and torch would wait for ``timeout``.
    """
    srun = in_step(os.environ) and "RANK" not in os.environ and "MASTER_ADDR" not in os.environ
    set_rendezvous(topology, os.environ)
    connected: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if srun and topology.world_size > 1:
        _meet(topology)
        connected = _within(connect_seconds, topology)
    with connected:
        if topology.device_type == "cuda":
            torch.cuda.set_device(topology.device)
            dist.init_process_group("nccl", device_id=torch.device(topology.device), timeout=timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)
        dist.barrier()  # NCCL connects in the first collective


@contextlib.contextmanager
def _within(seconds: float, topology: Topology) -> Iterator[None]:
    """End the process where the body does not end in time: it may wait in C code that no exception reaches."""

    def give_up() -> None:
        if topology.local_rank == 0:
            print(
                f"error: node {host_name()}, rank {topology.rank}: all {topology.world_size} ranks have come, but do"
                f" not connect to each other within {seconds:g} s. Do the nodes reach each other on the network that"
                " NCCL_SOCKET_IFNAME, NCCL_IB_HCA or GLOO_SOCKET_IFNAME name (slurm/env.sh; NCCL_DEBUG=INFO tells)?"
                " megameta slurm check on pairs of nodes finds the bad one; cluster.preflight_seconds is the limit",
                file=sys.stderr,
                flush=True,
            )
        os._exit(EXIT_LOST)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _meet(topology: Topology, seconds: float = MEETING_SECONDS) -> None:
    """Wait for every rank of an srun step with names at hand: torch's own meeting says only how many came.

    Raises:
        UserError: ranks are missing; their nodes are named.
    """
    here, address = host_name(), os.environ["MASTER_ADDR"]
    port, size = int(os.environ["MASTER_PORT"]) + 1, topology.world_size
    limit = timedelta(seconds=seconds)
    try:
        store = dist.TCPStore(address, port, size, topology.is_main, limit, wait_for_workers=False)
        store.set(f"here/{topology.rank}", here)
        if topology.is_main:
            store.set("missing", _missing(store, size, time.monotonic() + seconds))
        missing = store.get("missing").decode()
        store.add("left", 1)
        while topology.is_main and store.add("left", 0) < size and not missing:
            time.sleep(0.02)  # its store goes with it
    except (RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"rank {topology.rank} on {here} does not reach rank 0 at {address}:{port} ({why}): is node {address} up,"
            " and may nodes of a job open connections to each other?"
        ) from error
    if missing:
        raise UserError(missing)


def _missing(store: dist.Store, size: int, end: float) -> str:
    """What to say where ranks have not come in time; "" where all have."""
    came: dict[int, str] = {}
    for rank in range(size):
        with contextlib.suppress(RuntimeError):
            store.wait([f"here/{rank}"], timedelta(seconds=max(0.05, end - time.monotonic())))
            came[rank] = store.get(f"here/{rank}").decode()
    late = [rank for rank in range(size) if rank not in came]
    if not late:
        return ""
    hosts = expand_hosts(os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"])
    silent = [host for host in hosts if host not in came.values()]
    names = f"nodes from which none came: {', '.join(silent)}" if silent else "some have come from every node"
    return f"{len(late)} of {size} ranks have not come, the first of them rank {late[0]}; {names}"


def set_rendezvous(topology: Topology, environment: MutableMapping[str, str]) -> None:
    """Complete the variables by which torch.distributed finds the other ranks; what a launcher has set stays."""
    under_srun = in_step(environment) and "RANK" not in environment
    environment.setdefault("RANK", str(topology.rank))
    environment.setdefault("WORLD_SIZE", str(topology.world_size))
    environment.setdefault("LOCAL_RANK", str(topology.local_rank))
    if "MASTER_ADDR" in environment:
        return
    if topology.world_size == 1:
        environment["MASTER_ADDR"], environment["MASTER_PORT"] = "127.0.0.1", str(free_port())
    elif under_srun:
        address, port = rendezvous(environment)
        environment["MASTER_ADDR"] = address
        environment.setdefault("MASTER_PORT", str(port))


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_local(arguments: Sequence[str], num_processes: int) -> int:
    """Run ``python -m megameta ARGUMENTS`` as ``num_processes`` ranks on this machine; return the exit code.

    Ends when all ranks have; the code is that of the first rank that failed. When one fails the others get
    ``GRACE_SECONDS`` and are then ended. SIGTERM, SIGINT and SIGUSR1 are passed on to every rank. A rank that something
    else has killed could not say so: it is said here.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_processes)}
    # A rank that is left alone would print C++ stack traces beside the message of the one that failed.
    quiet = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    ranks: list[subprocess.Popen] = []
    passed_on: set[int] = set()

    def forward(number: int, _frame: object) -> None:
        passed_on.add(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        for rank in range(num_processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": threads}
            command = [sys.executable, "-m", "megameta", *arguments]
            ranks.append(subprocess.Popen(command, env={**os.environ, **address, **own, **quiet}))
        code = _wait(ranks)
        _say_which_was_killed(ranks, passed_on)
        return code
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen]) -> int:
    deadline, failed = None, 0
    while any(process.poll() is None for process in ranks):
        codes = [process.poll() for process in ranks]
        if deadline is None and any(codes):
            failed = next(code for code in codes if code)
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.1)
    failed = failed or next((process.returncode for process in ranks if process.returncode), 0)
    return failed if failed >= 0 else 128 - failed


def _say_which_was_killed(ranks: Sequence[subprocess.Popen], passed_on: Collection[int]) -> None:
    """One line for the first rank that died of a signal which did not come through this launcher."""
    for rank, process in enumerate(ranks):
        number = -(process.poll() or 0)
        if number > 0 and number not in passed_on:
            name = next((known.name for known in signal.Signals if known == number), f"signal {number}")
            cause = " (if nobody did that, memory may have run out: see dmesg)" if number == signal.SIGKILL else ""
            remedy = "start the run again: it goes on from its last checkpoint"
            print(f"error: rank {rank} was ended by {name}{cause}; {remedy}", file=sys.stderr, flush=True)
            return
