"""Who sits where. Explicit and frozen: made once from the launcher's environment and passed in, never looked up.

Ranks are numbered with the tensor-parallel rank fastest, then data, then pipeline: the ranks that talk most are
neighbours, and so share a machine. DeepSpeed's PipeModelDataParallelTopology numbers them the same way.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Places of one process. What tensor and pipeline parallelism leave over is data parallelism.

    Raises:
        ValueError: the world cannot be divided into model replicas of that size.
    """

    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    device: str = "cpu"
    """"cpu", or "cuda:N" with N the local rank (0 where each process sees a GPU of its own)."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size % self.model_parallel_size:
            raise ValueError(f"{self.world_size} processes do not divide by {self.model_parallel_size} a replica")

    @property
    def model_parallel_size(self) -> int:
        """Ranks of one model replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Model replicas."""
        return self.world_size // self.model_parallel_size

    @property
    def tensor_parallel_rank(self) -> int:
        """Which shard of its layers this process holds."""
        return self.rank % self.tensor_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Which replica this process belongs to: its share of a step's samples follows."""
        return self.rank // self.tensor_parallel_size % self.data_parallel_size

    @property
    def pipeline_parallel_rank(self) -> int:
        """Which stage this process runs."""
        return self.rank // (self.tensor_parallel_size * self.data_parallel_size)

    def rank_of(self, *, pipeline: int, data: int, tensor: int) -> int:
        """The rank at a place."""
        return (pipeline * self.data_parallel_size + data) * self.tensor_parallel_size + tensor

    def tensor_parallel_groups(self) -> list[list[int]]:
        """Ranks that share layers, for every group of the world."""
        tensor = range(self.tensor_parallel_size)
        return [
            [self.rank_of(pipeline=p, data=d, tensor=t) for t in tensor]
            for p in range(self.pipeline_parallel_size)
            for d in range(self.data_parallel_size)
        ]

    def data_parallel_groups(self) -> list[list[int]]:
        """Ranks that hold the same shards of the same layers, for every group of the world."""
        data = range(self.data_parallel_size)
        return [
            [self.rank_of(pipeline=p, data=d, tensor=t) for d in data]
            for p in range(self.pipeline_parallel_size)
            for t in range(self.tensor_parallel_size)
        ]

    def loss_ranks(self) -> list[int]:
        """One rank of each replica that has its loss: of the last stage, the first of its tensor-parallel group."""
        last = self.pipeline_parallel_size - 1
        return [self.rank_of(pipeline=last, data=d, tensor=0) for d in range(self.data_parallel_size)]

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes what exists once a run."""
        return self.rank == 0

    @property
    def device_type(self) -> str:
        """ "cpu" or "cuda"."""
        return self.device.partition(":")[0]
