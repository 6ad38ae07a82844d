"""Who sits where. Explicit and frozen: made once by the launcher's environment and passed in, never looked up."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Places of one process. Sizes multiply to ``world_size``."""

    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    device: str = "cpu"
    """"cpu", or "cuda:N" with N the local rank."""
    data_parallel_size: int = 1
    data_parallel_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes what exists once a run."""
        return self.rank == 0

    @property
    def device_type(self) -> str:
        """ "cpu" or "cuda"."""
        return self.device.partition(":")[0]
