"""What an engine holds, by canonical name: weights, moments and gradients, in full or as shards, under every layout."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megameta.checkpoint import StateEntry
from megameta.checkpoint.ranks import exchange
from megameta.engine.build import read_shard
from megameta.model import ModelConfig
from megameta.model.shapes import parameter_shapes
from megameta.parallel.groups import TensorParallel
from megameta.parallel.tensor_parallel import shard_dim, shard_of
from megameta.parallel.topology import Topology

#: AdamW's state that has the shape of its parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")
#: Ranks of one pipeline stage that write checkpoint files; more would make many small ones.
MAX_WRITERS = 8


class EngineState:
    """Access to the parameters of a DeepSpeed engine by their names in the plain ``GPT``; the source of a save.

    Args:
        engine: DeepSpeed's, made.
        optimizer: the client's, which ZeRO wraps and feeds with flat partitions.
        model: the GPT or stage inside the engine's module.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        config: ModelConfig,
        topology: Topology,
        tp: TensorParallel | None,
    ) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.topology = topology
        self.config = config
        self.tp = tp
        self.parameters = dict(model.named_parameters())
        self.shapes = parameter_shapes(config)
        self.zero_stage = engine.zero_optimization_stage()

    @property
    def owned_names(self) -> list[str]:
        """Parameters that this pipeline stage answers for: all of its own but a tied table's second copy."""
        first = self.topology.pipeline_parallel_rank == 0
        return [n for n in self.parameters if first or n != "embedding.tokens.weight"]

    # --- out --------------------------------------------------------------------------------------------------------

    @cached_property
    def entries(self) -> Sequence[StateEntry]:
        """Tensors of a checkpoint that this rank helps to gather, in the order in which all of its stage do so."""
        t = self.topology
        ranks = [
            t.rank_of(pipeline=t.pipeline_parallel_rank, data=data, tensor=tensor)
            for data in range(t.data_parallel_size)
            for tensor in range(t.tensor_parallel_size)
        ][:MAX_WRITERS]
        return [
            StateEntry(
                "model" if key is None else "optimizer",
                _entry_name(name, key),
                self.shapes[name],
                ranks[i % len(ranks)],
            )
            for i, name in enumerate(self.owned_names)
            for key in (None, *MOMENTS)
        ]

    def gather(self, entry: StateEntry) -> Tensor | None:
        """An entry in full, float32, on the CPU, where this rank owns it; None elsewhere. Collective in the stage."""
        name, key = _name_and_key(entry)
        full = self.full(name, self.local(name, key))
        # copied: the state goes on changing while it is written
        return full.float().cpu().clone() if entry.owner == self.topology.rank else None

    def local(self, name: str, key: str | None = None) -> Tensor:
        """This rank's shard of a weight, or of a moment, whole over data-parallel ranks: collective among those."""
        parameter = self.parameters[name]
        if self.zero_stage == 0:
            return (parameter if key is None else self.optimizer.state[parameter][key]).detach()
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensor = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        return tensor.detach()

    def gradient(self, name: str) -> Tensor:
        """The whole averaged gradient of the step, between backward and update: collective (tests use it)."""
        from deepspeed.utils import safe_get_full_grad

        return self.full(name, safe_get_full_grad(self.parameters[name]).detach()).float().cpu().clone()

    def full(self, name: str, local: Tensor) -> Tensor:
        """A logical tensor from the tensor-parallel ranks' shards: collective among those. Padding is left out."""
        dim, shape = shard_dim(name), self.shapes[name]
        local = local.to(self.topology.device)  # from the CPU, where DeepSpeed offloads
        if self.tp is not None and dim is not None:
            parts = local.new_empty(self.tp.size * local.shape[0], *local.shape[1:])
            dist.all_gather_into_tensor(parts, local.contiguous(), group=self.tp.group)
            local = parts if dim == 0 else torch.cat(parts.chunk(self.tp.size), dim)
        return local[: shape[0]]

    # --- out, in parts: without a collective, so that a thread may copy and send them ---------------------------------

    def holders(self, entry: StateEntry) -> dict[int, int]:
        """How many elements each rank has to give of an entry; ranks that need not give any are left out. Collective
        over all ranks at the first call."""
        return self._holders[entry]

    @cached_property
    def _holders(self) -> dict[StateEntry, dict[int, int]]:
        # Once: every save asks for all of them before training goes on, and there may be many ranks.
        return {entry: self._holders_of(entry) for entry in self.entries}

    def _holders_of(self, entry: StateEntry) -> dict[int, int]:
        name, _ = _name_and_key(entry)
        owner, t = replace(self.topology, rank=entry.owner), self.topology
        shards = range(t.tensor_parallel_size) if self._is_sharded(name) else [owner.tensor_parallel_rank]
        replicas = range(t.data_parallel_size) if self.zero_stage else [owner.data_parallel_rank]
        stage = t.pipeline_parallel_rank
        ranks = [t.rank_of(pipeline=stage, data=data, tensor=tensor) for tensor in shards for data in replicas]
        counts = {rank: self._fragments[rank][name][1] for rank in ranks}
        return {rank: count for rank, count in counts.items() if count}

    def part(self, entry: StateEntry) -> Tensor:
        """This rank's part of an entry, flat, where it is: a view, which changes with the state. Not collective.

        Only of ranks among the ``holders``.
        """
        name, key = _name_and_key(entry)
        parameter: Any = self.parameters[name]
        if self.zero_stage == 0:
            tensor = parameter if key is None else self.optimizer.state[parameter][key]
        elif self.zero_stage < 3:
            tensor = parameter._hp_mapping.get_hp_fragment(key)
        else:
            # safe_get_local_fp32_param would copy what is offloaded back to the device.
            zero = self.engine.optimizer
            group, start, size = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[group]
            tensor = (flat if key is None else zero.optimizer.state[flat][key])[start : start + size]
        return tensor.detach().view(-1)[: self._fragments[self.topology.rank][name][1]]

    def assemble(self, entry: StateEntry, parts: Mapping[int, Tensor]) -> Tensor:
        """The whole tensor, contiguous, from its holders' parts. Not collective; the inverse of ``part``."""
        name, _ = _name_and_key(entry)
        shape = self._shard_shape(name)
        shards: dict[int, Tensor] = {}
        for rank, part in parts.items():
            first, count = self._fragments[rank][name]
            tensor_rank = replace(self.topology, rank=rank).tensor_parallel_rank
            if count == math.prod(shape):
                shards[tensor_rank] = part
            else:
                shards.setdefault(tensor_rank, part.new_empty(math.prod(shape)))[first : first + count] = part
        whole = [shards[tensor_rank].view(shape) for tensor_rank in sorted(shards)]
        full = whole[0] if len(whole) == 1 else torch.cat(whole, shard_dim(name) or 0)
        return full[: self.shapes[name][0]]

    @cached_property
    def _fragments(self) -> list[dict[str, tuple[int, int]]]:
        """Of each rank by parameter: which elements of its flattened shard it holds, as (first, count). Collective."""
        return exchange({name: self._fragment(name) for name in self.owned_names}, self.topology)

    def _fragment(self, name: str) -> tuple[int, int]:
        parameter: Any = self.parameters[name]
        if self.zero_stage == 0:
            return 0, parameter.numel()
        if self.zero_stage < 3:
            if parameter._hp_mapping is None:  # in other ranks' partitions
                return 0, 0
            address = parameter._hp_mapping.lp_fragment_address
            return address.start, address.numel
        first = min(self.topology.data_parallel_rank * parameter.ds_tensor.numel(), parameter.ds_numel)
        return first, min(parameter.ds_tensor.numel(), parameter.ds_numel - first)

    def _shard_shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor-parallel rank, whole over data-parallel ranks."""
        parameter: Any = self.parameters[name]
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def _is_sharded(self, name: str) -> bool:
        return self.tp is not None and shard_dim(name) is not None

    # --- in ---------------------------------------------------------------------------------------------------------

    def shard(self, tensors: Mapping[str, Tensor], name: str, key: str | None = None) -> Tensor:
        """This rank's shard of a logical tensor, with zeros for vocabulary padding, on the engine's device."""
        size, rank = (self.tp.size, self.tp.rank) if self.tp is not None else (1, 0)
        piece = read_shard(tensors, _entry_name(name, key), shard_of(name, self.shapes[name], self.config, rank, size))
        piece = piece.to(self.topology.device)
        whole = piece.new_zeros(self._shard_shape(name))
        whole[: piece.shape[0]] = piece
        return whole

    def load_moments(self, moments: Mapping[str, Tensor], step: int) -> None:
        """Put saved moments (by entry name) and AdamW's step count in place.

        The weights must have been in the model when the engine was made.
        """
        state = self.inner_optimizer.state
        for tensor in self.partitions():
            state[tensor]["step"].fill_(step)
        for group in self.inner_optimizer.param_groups:
            if "step" in group:  # apex counts by group
                group["step"] = step
        for name, parameter in self.parameters.items():
            for key in MOMENTS:
                value = self.shard(moments, name, key)
                if self.zero_stage == 0:
                    state[parameter][key].copy_(value)
                else:
                    self._set(parameter, value, key)

    def restore_masters(self, exact: dict[str, Tensor]) -> None:
        """DeepSpeed's fp16 section makes its float32 master weights from halves; put the exact ones in their place."""
        for name, tensor in exact.items():
            self._set(self.parameters[name], tensor.to(self.topology.device), None)

    def _set(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """Put a master weight (no key) or a moment in place under ZeRO 1 to 3, from this rank's whole shard."""
        from deepspeed import utils

        if self.zero_stage == 3:
            # Its safe_set_full_… does not pad, and fails where the data-parallel size does not divide the parameter.
            size = parameter.ds_tensor.numel()
            first = self.topology.data_parallel_rank * size
            part = value.flatten()[first : first + size]
            part = torch.nn.functional.pad(part, (0, size - part.numel()))
            if key is None:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)

    # --- the optimiser ----------------------------------------------------------------------------------------------

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The client's optimiser."""
        return self.optimizer if self.zero_stage == 0 else self.engine.optimizer.optimizer

    def partitions(self) -> list[Tensor]:
        """The tensors that the inner optimiser updates: parameters, or this rank's flat partitions of them."""
        zero = self.engine.optimizer
        if self.zero_stage == 3:
            return list(zero.fp32_partitioned_groups_flat)
        if self.zero_stage > 0:
            return list(zero.single_partition_of_fp32_groups)
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def make_moments(self) -> None:
        """Make AdamW's state before the first step, which would make it itself, and link it to the parameters.

        ZeRO 1 and 2 link after the first parameter group's first step, when the second group has no state yet, and
        never again, so that safe_get_full_optimizer_state fails for that group (seen with DeepSpeed 0.19.8).
        """
        state = self.inner_optimizer.state
        for tensor in self.partitions():
            state[tensor] = {key: torch.zeros_like(tensor) for key in MOMENTS}
            state[tensor]["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        if self.zero_stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def optimizer_step(self) -> int:
        """Updates that AdamW has made (fp16 may have skipped some steps)."""
        by_group = self.inner_optimizer.param_groups[0].get("step")  # apex
        return int(by_group if by_group is not None else self.inner_optimizer.state[self.partitions()[0]]["step"])


def _name_and_key(entry: StateEntry) -> tuple[str, str | None]:
    """The parameter, and which of its moments (None: the weight itself)."""
    if entry.kind == "model":
        return entry.name, None
    key, name = entry.name.split(".", 1)
    return name, key


def _entry_name(name: str, key: str | None) -> str:
    return name if key is None else f"{key}.{name}"
