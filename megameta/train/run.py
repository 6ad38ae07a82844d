"""``megameta train`` on one rank: from a configuration file to an exit code."""

import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from megameta.config import RunConfig
from megameta.errors import EXIT_FAILURE, UserError
from megameta.parallel.launch import initialize_process_group, make_topology, pick_device
from megameta.parallel.topology import Topology
from megameta.train.data import MakeProbe, PretrainingData, RunData
from megameta.train.loop import Trainer
from megameta.train.setup import load_run_config
from megameta.validate import validate

#: What gloo and the store say where the process at the other end is gone.
_LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|Connection was likely closed")


def train(
    path: str | os.PathLike[str],
    overrides: list[str],
    make_data: Callable[[RunConfig, Topology], RunData] = PretrainingData,
    make_probe: MakeProbe | None = None,
) -> NoReturn:
    """Run the training of a configuration on this rank, and end the process with an exit code of ``megameta.errors``.

    What stops the run is said once: by the rank that gets there first, or before the ranks know each other by the first
    of each machine. The others leave at once with the same exit code, and the launcher ends those that wait for them.
    """
    # DeepSpeed calls collectives by names that torch has renamed: nothing that the reader could change.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    try:
        config = load_run_config(path, overrides)
        device = pick_device(config.run.device)
        parallel = config.parallel
        topology = make_topology(
            device,
            tensor_parallel_size=parallel.tensor_parallel_size,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
        )
        validate(config, world_size=topology.world_size, device=device)
        initialize_process_group(topology)
        code = Trainer(config, topology, make_data, make_probe).run()
        dist.barrier()  # nobody leaves while another rank is still in a collective
        _leave(code)
    except UserError as error:
        if _may_speak():
            print(f"error: {error}", file=sys.stderr, flush=True)
        _let_others_leave()
        _leave(EXIT_FAILURE)
    except RuntimeError as error:
        if not _has_been_said():
            if not _LOST.search(str(error)):
                raise
            # A rank that was killed has no message. Which, and of what, its launcher knows.
            if _may_speak():
                print(f"rank {os.environ.get('RANK', '0')} leaves: another rank has ended", file=sys.stderr, flush=True)
            _let_others_leave()
        _leave(EXIT_FAILURE)  # a collective broke off because a rank has left


def _leave(code: int) -> NoReturn:
    """End the process here, with everything written.

    A normal exit after a failure could wait for ranks that are gone; and after a whole run one in some dozens was seen
    to abort while gloo's threads were torn down ("terminate called without an active exception"), which would turn a
    finished run into a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _has_been_said() -> bool:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    try:
        return dist.distributed_c10d._get_default_store().add("megameta/error", 0) > 0
    except RuntimeError:  # the store went with its rank, which has spoken
        return True


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


def _may_speak() -> bool:
    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("megameta/error", 1) == 1
    except RuntimeError:  # the store went with its rank, which has spoken
        return False
