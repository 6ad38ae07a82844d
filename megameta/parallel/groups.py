"""Process groups of a topology, made once and passed in; and the view of them that DeepSpeed asks for."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megameta.parallel.topology import Topology


@dataclass(frozen=True)
class TensorParallel:
    """What a layer needs to know of its tensor-parallel group."""

    group: ProcessGroup
    size: int
    rank: int
    sequence_parallel: bool = False
    """Whether residuals are sharded along the sequence inside the group."""


@dataclass(frozen=True)
class ProcessGroups:
    """Groups that this process belongs to. ``tensor`` is None where layers are whole."""

    tensor: TensorParallel | None
    data: ProcessGroup


def make_groups(topology: Topology, *, sequence_parallel: bool = False) -> ProcessGroups:
    """Make the groups: collective, every rank of the world in the same order."""
    tensor = None
    tensor_group = _own_group(topology.tensor_parallel_groups(), topology.rank)
    if topology.tensor_parallel_size > 1:
        tensor = TensorParallel(
            tensor_group, topology.tensor_parallel_size, topology.tensor_parallel_rank, sequence_parallel
        )
    return ProcessGroups(tensor, _own_group(topology.data_parallel_groups(), topology.rank))


def _own_group(groups: list[list[int]], rank: int) -> ProcessGroup:
    made = [dist.new_group(ranks) for ranks in groups]
    return next(group for group, ranks in zip(made, groups) if rank in ranks)


class ModelParallelUnit:
    """The ``mpu`` of ``deepspeed.initialize`` where there is no pipeline (a PipelineModule brings its own)."""

    def __init__(self, topology: Topology, tensor: TensorParallel, data: ProcessGroup) -> None:
        self._topology, self._tensor, self._data = topology, tensor, data

    def get_model_parallel_group(self) -> ProcessGroup:
        """The ranks that share layers."""
        return self._tensor.group

    def get_model_parallel_rank(self) -> int:
        """This rank among them."""
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._tensor.size

    def get_data_parallel_group(self) -> ProcessGroup:
        """The ranks that hold the same shards."""
        return self._data

    def get_data_parallel_rank(self) -> int:
        """This rank among them."""
        return self._topology.data_parallel_rank

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self._topology.data_parallel_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
