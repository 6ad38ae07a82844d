"""The norm of a step's whole gradient, and clipping by it, without a wait of the host for either.

DeepSpeed reads the norm on the host at ZeRO 1 and 2 once for each group of parameters, and at ZeRO 0 makes two tensors
of numbers on the host. What it cannot leave to others (ZeRO 3, pipeline stages, fp16's scaled gradients, gradients that
are elsewhere or of another type) it still does by itself.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megameta.parallel.groups import ProcessGroups
from megameta.parallel.tensor_parallel import shard_dim
from megameta.parallel.topology import Topology


class Clipping:
    """Over the gradients of one engine, at ZeRO 0 to 2.

    Args:
        engine: DeepSpeed's.
        parameters: of this rank, by canonical name.
        limit: the largest norm; 0: gradients are not clipped.
    """

    def __init__(
        self,
        engine: Any,
        parameters: Mapping[str, nn.Parameter],
        topology: Topology,
        groups: ProcessGroups,
        limit: float,
    ) -> None:
        self._engine, self._parameters, self._limit = engine, parameters, limit
        self._name_of = {id(parameter): name for name, parameter in parameters.items()}
        self._counts_all = topology.tensor_parallel_rank == 0
        self._group: Any = None
        if engine.zero_optimization_stage() > 0 and topology.world_size > 1:
            self._group = dist.group.WORLD  # there are no pipeline stages: the ranks that share are all
        elif groups.tensor is not None:
            self._group = groups.tensor.group

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The unclipped norm over all parameters, a float64 scalar on the device. Collective. Gradients are there, and
        reduced."""
        # What the ranks of a tensor-parallel group all hold counts once.
        gradients = [g for name, g in self._gradients() if self._counts_all or shard_dim(name) is not None]
        square = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        if gradients:
            square += torch.nn.utils.get_total_norm(gradients).double() ** 2
        if self._group is not None:
            dist.all_reduce(square, group=self._group)
        return square.sqrt()

    @torch.no_grad()
    def clip(self, norm: Tensor) -> None:
        """Scale all gradients so that their norm is the limit at most."""
        if self._limit > 0:
            factor = (self._limit / (norm + 1e-6)).clamp(max=1.0).float()
            torch._foreach_mul_([gradient for _, gradient in self._gradients()], factor)

    def _gradients(self) -> list[tuple[str, Tensor]]:
        """By name: those of all parameters, or under ZeRO of this rank's partition."""
        if self._engine.zero_optimization_stage() == 0:
            return [(name, p.grad) for name, p in self._parameters.items() if p.grad is not None]
        optimizer = self._engine.optimizer
        found: list[tuple[str, Tensor]] = []
        for group, gradients in optimizer.averaged_gradients.items():
            names = [self._name_of[id(parameter)] for parameter in optimizer.params_in_partition[group]]
            # Padding belongs to no parameter: it is marked, or one last tensor (where ranks do not divide a group).
            own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
            found += zip(names, own[: len(names)], strict=True)
        return found
