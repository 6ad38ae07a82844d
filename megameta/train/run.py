"""``megameta train`` on one rank: from a configuration file to an exit code."""

import errno
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megameta.cluster.attempt import MISTAKE, SUPERSEDED
from megameta.cluster.heartbeat import FAILED, PHASE_OF
from megameta.cluster.launch import initialize_process_group, make_topology, pick_device
from megameta.cluster.liveness import gather_hosts
from megameta.cluster.preflight import check_nodes
from megameta.cluster.session import RunSession, open_run
from megameta.cluster.stop import StopRequest
from megameta.config import RunConfig
from megameta.config.validate import validate
from megameta.engine.determinism import use_deterministic_kernels
from megameta.errors import EXIT_FAILURE, EXIT_LOST, EXIT_OK, MachineError, Superseded, UserError
from megameta.log import show_log
from megameta.parallel.topology import Topology
from megameta.train.data import MakeProbe, PretrainingData, RunData
from megameta.train.loop import Trainer
from megameta.train.run_config import load_run_config

#: What gloo and the store say where the process at the other end is gone.
_LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|Connection was likely closed")
#: Errors of the file system that its owner can mend, wherever they come up.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def train(
    path: str | os.PathLike[str],
    overrides: list[str],
    make_data: Callable[[RunConfig, Topology], RunData] = PretrainingData,
    make_probe: MakeProbe | None = None,
    stop: StopRequest | None = None,
) -> NoReturn:
    """Run the training of a configuration on this rank, and end the process with an exit code of ``megameta.errors``.

    What stops the run is said once: by the rank that gets there first, or before the ranks know each other by the first
    of each machine (by the rank itself, where it is alone concerned). The others leave at once with the same exit code,
    and the launcher ends those that wait for them.

    Args:
        stop: one that listens already.
    """
    # DeepSpeed calls collectives by names that torch has renamed: nothing that the reader could change.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    stop = StopRequest() if stop is None else stop
    stop.listen()
    session: RunSession | None = None
    try:
        config = load_run_config(path, overrides)
        topology = _join(config)
        session = open_run(config, topology)
        check_nodes(config, topology, session.hosts)
        code = Trainer(config, topology, make_data, make_probe, session, stop).run()
        session.close(PHASE_OF[code])
        dist.barrier()  # nobody leaves while another rank is still in a collective
        _leave(code)
    except UserError as error:
        _refuse(error, session)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            what = f"{error.filename or 'the run directory'}: {error.strerror}"
            _refuse(UserError(f"{what}; free space, or set run.dir to a place that can be written"), session)
        if not isinstance(error, RuntimeError) or not (_LOST.search(str(error)) or _has_been_said(session)):
            traceback.print_exc()
        elif not _has_been_said(session):
            _wait_for_a_name(session)
            # A rank that was killed has no message. Which, and of what, its launcher knows.
            if _may_speak(error):
                rank = os.environ.get("RANK", "0")
                print(f"rank {rank} leaves: another rank has ended{_where(error)}", file=sys.stderr, flush=True)
        _end(session)
        _leave(EXIT_FAILURE)  # a collective broke off because a rank has left


def _refuse(error: UserError, session: RunSession | None) -> NoReturn:
    """Say what is wrong, if this rank is the one to say it, and leave."""
    code = EXIT_LOST if isinstance(error, Superseded) else EXIT_FAILURE
    if _may_speak(error):
        if session is not None:
            session.attempt.note_end(SUPERSEDED if code == EXIT_LOST else MISTAKE, str(error))
        print(f"error: {error}", file=sys.stderr, flush=True)
    _end(session)
    _leave(code)


def preflight(path: str | os.PathLike[str], overrides: list[str]) -> NoReturn:
    """``megameta slurm check`` on one rank: the checks before the first step, and nothing else."""
    topology: Topology | None = None
    try:
        config = load_run_config(path, overrides)
        topology = _join(config)
        if topology.is_main:
            Path(config.run.dir).mkdir(parents=True, exist_ok=True)
            show_log()
        check_nodes(config, topology, gather_hosts(topology), always=True)
        dist.barrier()
        _leave(EXIT_OK)
    except UserError as error:
        if _may_speak(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        _let_others_leave()
        _leave(EXIT_FAILURE)


def _join(config: RunConfig) -> Topology:
    """This rank's place, in a process group."""
    device = pick_device(config.run.device)
    if config.run.deterministic:  # before the checks of nodes multiply
        use_deterministic_kernels()
    parallel, watch = config.parallel, config.cluster
    topology = make_topology(
        device,
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
    )
    validate(config, world_size=topology.world_size, device=device)
    # The watchdog says more than the backend's own timeout, and comes first.
    timeout = timedelta(minutes=watch.step_timeout_minutes + 5) if watch.step_timeout_minutes else None
    initialize_process_group(topology, timeout, watch.preflight_seconds)
    return topology


def _end(session: RunSession | None) -> None:
    """Leave after a failure."""
    if session is not None:
        session.close(FAILED)
    _let_others_leave()


def _wait_for_a_name(session: RunSession | None) -> None:
    """A collective broke off. If that was because a node is gone, the watch over the nodes will say which one, and end
    this process; it needs its time of silence for that. Another rank's message ends the wait, too."""
    watch = session.liveness if session is not None else None
    if watch is None:
        return
    end = time.monotonic() + watch.limit + 5
    while time.monotonic() < end and not _has_been_said(session):
        time.sleep(0.2)


def _where(error: Exception) -> str:
    """The address at the other end of a connection, of gloo's messages."""
    found = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", str(error))
    return f" (at {found.group(1)})" if found else ""


def _leave(code: int) -> NoReturn:
    """End the process here, with everything written.

    A normal exit after a failure could wait for ranks that are gone; and after a whole run one in some dozens was seen
    to abort while gloo's threads were torn down ("terminate called without an active exception"), which would turn a
    finished run into a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _has_been_said(session: RunSession | None) -> bool:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    try:
        return dist.distributed_c10d._get_default_store().add("megameta/error", 0) > 0
    except RuntimeError:  # the store went with its rank, which has spoken, unless its node went with it
        watch = session.liveness if session is not None else None
        return watch is None or watch.has_left(0)


def _let_others_leave(seconds: float = 3.0) -> None:
    """Rank 0 holds the store that the others ask whether they may speak: it goes last, if they go within seconds."""
    if not dist.is_initialized():
        return
    try:
        store = dist.distributed_c10d._get_default_store()
        gone = store.add("megameta/gone", 1)
        end = time.monotonic() + seconds
        while dist.get_rank() == 0 and gone < dist.get_world_size() and time.monotonic() < end:
            time.sleep(0.05)
            gone = store.add("megameta/gone", 0)
    except RuntimeError:  # the store went with its rank
        return


def _may_speak(error: Exception) -> bool:
    if isinstance(error, MachineError):
        return True
    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("megameta/error", 1) == 1
    except RuntimeError:  # the store went with its rank, which has spoken
        return False
