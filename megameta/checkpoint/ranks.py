"""What saving and opening ask of the processes around them, and of the start of a run that they belong to.

``megameta.parallel.topology.Topology`` and ``megameta.cluster.attempt.Attempt`` fit.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks(Protocol):
    """The place of this process among those of torch.distributed's default group."""

    @property
    def rank(self) -> int:
        """Number of this process."""

    @property
    def world_size(self) -> int:
        """Number of processes."""


class Attempt(Protocol):
    """One of the starts of a run."""

    @property
    def number(self) -> int:
        """Files are written in a directory of this number until they have their name."""

    def check(self) -> None:
        """Raise Superseded where a newer start has the run directory."""


@dataclass(frozen=True)
class Alone:
    """One process, which talks to no other even where there is a process group."""

    rank: int = 0
    world_size: int = 1


def exchange(value: T, ranks: Ranks) -> list[T]:
    """Every rank's value, by rank: collective."""
    if ranks.world_size == 1:
        return [value]
    values: list = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


def from_main(value: T, ranks: Ranks) -> T:
    """Rank 0's value on every rank: collective."""
    values = [value]
    if ranks.world_size > 1:
        dist.broadcast_object_list(values)
    return values[0]
