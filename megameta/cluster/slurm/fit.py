"""How a run fits the nodes that a job has got, which may be fewer than it asked for: the global batch stays."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megameta.config import RunConfig
from megameta.config.validate import problems
from megameta.errors import UserError


@dataclass(frozen=True)
class Fit:
    """Nodes to use, and the micro-batch with which the global batch comes out."""

    nodes: int
    micro_batch_size: int

    def apply(self, config: RunConfig) -> RunConfig:
        """The configuration with it."""
        train = config.train.model_copy(update={"micro_batch_size": self.micro_batch_size})
        return config.model_copy(update={"train": train})

    def overrides(self, config: RunConfig) -> list[str]:
        """What to give to ``megameta train`` beyond the configuration."""
        same = self.micro_batch_size == config.train.micro_batch_size
        return [] if same else [f"train.micro_batch_size={self.micro_batch_size}"]


def fit(config: RunConfig, nodes: int, per_node: int, device: str = "cuda") -> Fit:
    """The most nodes, up to those given, on which the run is valid, with the largest micro-batch up to its own.

    Raises:
        UserError: none; with the problems at the number given.
    """
    for used in range(nodes, 0, -1):
        if found := fit_exactly(config, used, per_node, device):
            return found
    listed = problems(config, world_size=nodes * per_node, device=device)
    raise UserError("\n  ".join([f"the run does not fit {nodes} node(s) of {per_node} ranks:", *listed]))


def fit_exactly(config: RunConfig, nodes: int, per_node: int, device: str = "cuda") -> Fit | None:
    """The same for this number of nodes alone."""
    world, parallel = nodes * per_node, config.parallel
    replicas, left = divmod(world, parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    if left or not replicas or config.train.global_batch_size % replicas:
        return None
    share = config.train.global_batch_size // replicas
    micro = next(m for m in range(min(config.train.micro_batch_size, share), 0, -1) if share % m == 0)
    found = Fit(nodes, micro)
    return None if problems(found.apply(config), world_size=world, device=device) else found


def granted(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(nodes, tasks a node) of the job around.

    Raises:
        UserError: there is none, or it does not say.
    """
    try:
        nodes = int(environment["SLURM_JOB_NUM_NODES"])
        return nodes, int(environment.get("SLURM_NTASKS_PER_NODE", "1"))
    except (KeyError, ValueError) as error:
        raise UserError(f"not in a job ({error}): use sbatch, or give --nodes and --per-node") from error
