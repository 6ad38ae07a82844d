"""A run directory taken by one start: lock, attempt, logs, and what watches over the ranks."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch.distributed as dist

from megameta.cluster.attempt import LOST, Attempt, saved_step
from megameta.cluster.heartbeat import FAILED, Heartbeat, SlowRanks
from megameta.cluster.liveness import Liveness, gather_hosts, watch_nodes
from megameta.cluster.monitor import Monitor
from megameta.cluster.records import write_records
from megameta.cluster.run_lock import lock_run
from megameta.config import RunConfig
from megameta.errors import EXIT_LOST, UserError
from megameta.log import LOG, close_log, open_log
from megameta.parallel.topology import Topology


@dataclass
class RunSession:
    """What a rank holds of the run directory."""

    attempt: Attempt
    hosts: list[str]
    """By rank."""
    monitor: Monitor
    slow_ranks: SlowRanks
    liveness: Liveness | None
    lock: IO[str] | None
    """Held by rank 0 alone."""

    def enter(self, phase: str) -> None:
        """Something else than before begins: for the heartbeat and the watchdog."""
        self.monitor.progress()
        if self.monitor.heartbeat is not None:
            self.monitor.heartbeat.phase = phase

    def close(self, phase: str = FAILED) -> None:
        """Let go of everything; ``phase`` is what ``megameta status`` will show."""
        self.monitor.close(phase)
        if self.liveness is not None:
            self.liveness.close()
        close_log()
        if self.lock is not None:
            self.lock.close()


def open_run(config: RunConfig, topology: Topology) -> RunSession:
    """Take the run directory: collective.

    Raises:
        UserError: on every rank, where another run is using it.
    """
    directory = Path(config.run.dir)
    lock: IO[str] | None = None
    said: list = [None, None]
    if topology.is_main:
        try:
            lock, attempt = lock_run(directory)
            said = [attempt, None]
        except UserError as error:
            said = [None, str(error)]
    dist.broadcast_object_list(said)
    if said[1] is not None:
        raise UserError(said[1])
    attempt = said[0]
    open_log(directory / "logs" / f"rank_{topology.rank}.log", echo=topology.is_main)
    hosts = gather_hosts(topology)
    LOG.info(
        "attempt %d: rank %d of %d on %s", attempt.number, topology.rank, topology.world_size, hosts[topology.rank]
    )
    if topology.is_main:
        write_records(attempt.folder, config, hosts)
    slow = SlowRanks(hosts, config.cluster.slow_rank_factor)
    heartbeat = _heartbeat(config, attempt, hosts, slow) if topology.is_main else None
    monitor = Monitor(attempt, topology, hosts, heartbeat, 60 * config.cluster.step_timeout_minutes)
    monitor.groups = {"world": dist.group.WORLD}
    monitor.beat()
    monitor.start()

    def on_lost(text: str, speaks: bool) -> None:
        LOG.info("%s", text)
        if speaks:
            attempt.note_end(LOST, text)
            print(f"error: {text}", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST)

    liveness = watch_nodes(topology, config.cluster.lost_node_seconds, on_lost)
    return RunSession(attempt, hosts, monitor, slow, liveness, lock)


def _heartbeat(config: RunConfig, attempt: Attempt, hosts: list[str], slow: SlowRanks) -> Heartbeat:
    fixed = {
        "attempt": attempt.number,
        "host": hosts[0],
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "ranks": len(hosts),
        "hosts": list(dict.fromkeys(hosts)),
        "num_steps": config.train.num_steps,
    }
    step = saved_step(Path(config.run.dir))  # until the checkpoint is read: a run that starts again is not at step 0
    return Heartbeat(attempt.folder / "heartbeat.json", fixed, slow, step=step, saved_step=step)
