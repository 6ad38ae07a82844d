"""Whether ranks that should hold the same numbers hold the same bits (train.check_replicas_every)."""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megameta.engine.state import EngineState
from megameta.errors import UserError
from megameta.parallel.tensor_parallel import shard_dim

#: Bytes that are summed at a time; a multiple of 4.
CHUNK = 2**24


def checksum(tensor: Tensor) -> int:
    """A sum over the bits of a tensor, weighted by place, in wrapping 64-bit integers: any one changed bit changes it.
    Computed where the tensor is."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    total = 0
    for number, part in enumerate(flat.split(CHUNK)):  # a large table's copies in 64 bits would not fit beside it
        words = torch.nn.functional.pad(part, (0, -part.numel() % 4)).view(torch.int32).long()
        weights = (torch.arange(words.numel(), device=words.device) + number * (CHUNK // 4)) * 2654435761 * 2 + 1
        total += int((words * weights).sum())
    return total % 2**64


def differing_replicas(state: EngineState) -> list[str]:
    """Parameters whose replicas differ, with the ranks that hold which bits: the same answer on every rank, collective.

    A shard has replicas on the data-parallel ranks (under ZeRO 3 none: each holds another part), a parameter that is
    not sharded on all ranks of its stage, a tied table on the first and the last stage.
    """
    topology = state.topology
    mine: dict[tuple[str, int, int], int] = {}
    parameter: Any
    for name, parameter in state.parameters.items():
        shard = topology.tensor_parallel_rank if shard_dim(name) is not None else -1
        part = topology.data_parallel_rank if state.zero_stage == 3 else -1
        mine[name, shard, part] = checksum(parameter.ds_tensor if state.zero_stage == 3 else parameter)
    everyone: list[dict[tuple[str, int, int], int]] = [{}] * topology.world_size
    dist.all_gather_object(everyone, mine)
    holders: dict[tuple[str, int, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, sums in enumerate(everyone):
        for key, value in sums.items():
            holders[key][value].append(rank)
    return [
        f"{key[0]}: " + " / ".join(f"ranks {ranks}" for ranks in values.values())
        for key, values in holders.items()
        if len(values) > 1
    ]


def check_replicas(state: EngineState, step: int) -> None:
    """Raise UserError on every rank where replicas differ: the run has gone wrong silently."""
    if found := differing_replicas(state):
        raise UserError(
            "\n  ".join(
                [
                    f"step {step}: {len(found)} parameter(s) are not the same on all ranks that hold them:",
                    *found[:10],
                    "a device, its memory or a collective has computed wrongly: go on from a checkpoint before this"
                    " step (write its name into checkpoints/latest) without the machine in question",
                ]
            )
        )
