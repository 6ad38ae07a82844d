"""DeepSpeed behind one small interface: a step over micro-batches, an evaluation pass, and state by canonical name."""

import contextlib
import importlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megameta.config import RunConfig
from megameta.config.deepspeed import clips_itself, deepspeed_config, overlaps_reduction, zero_stage
from megameta.data.loader import Batch
from megameta.engine.build import build_part, settle_on
from megameta.engine.clipping import Clipping
from megameta.engine.compile import as_written, compile_blocks, compile_loss
from megameta.engine.determinism import use_deterministic_kernels
from megameta.engine.forward_timer import ForwardTimer
from megameta.engine.loss_module import LossModule, Scores, make_scores, sum_scores
from megameta.engine.optimizer import make_optimizer
from megameta.engine.state import EngineState
from megameta.errors import UserError
from megameta.parallel.groups import ModelParallelUnit, make_groups
from megameta.parallel.losses import scaled
from megameta.parallel.topology import Topology

#: State of DeepSpeed's dynamic loss scaler.
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class StepResult:
    """One optimiser step. ``loss`` is the mean over all valid targets of the step, in nats."""

    loss: float
    grad_norm: float
    num_targets: int
    applied: bool
    """False where fp16's loss scaling skipped the update after an overflow."""


class NonFiniteLoss(UserError):
    """The loss is not finite; the optimiser has not been touched."""


class NonFiniteGradient(UserError):
    """The loss is finite and its gradient is not.

    Args:
        updated: the update has been made: weights may be lost, and no checkpoint may be made of them.
    """

    def __init__(self, message: str, *, updated: bool) -> None:
        super().__init__(message)
        self.updated = updated


def _nothing() -> None:
    """What is done before an update where nobody asks for anything."""


def import_deepspeed(topology: Topology) -> Any:
    """DeepSpeed, quiet, for this rank's device and the process group that is there.

    On a CPU its shared-memory op would be compiled at start-up: switched off.

    Raises:
        UserError: this process has used it for devices of another kind, and it remembers.
    """
    os.environ.update(deepspeed_environment(topology))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.WARNING)
    found = deepspeed.accelerator.get_accelerator().device_name()
    if found != topology.device_type:
        raise UserError(
            f"run.device is {topology.device_type}, but this process has imported DeepSpeed for {found} and keeps it:"
            " start the run in a process of its own"
        )
    _import_muon_as_written()
    if topology.device_type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def deepspeed_environment(topology: Topology) -> dict[str, str]:
    """Variables by which DeepSpeed picks its device: the run's, whatever a user or a launcher has set.

    It takes LOCAL_RANK for the number of a GPU. Where each process sees one GPU alone, that is 0 on every rank.
    """
    device = torch.device(topology.device)
    found = {"DS_ACCELERATOR": device.type}
    return found if device.index is None else {**found, "LOCAL_RANK": str(device.index)}


def _import_muon_as_written() -> None:
    """Every engine of DeepSpeed asks whether its optimiser is a Muon. Importing that one compiles its kernels, which
    brings torch's whole compiler in: a third of a start, for code that no run of ours calls. So it stays as written."""
    from deepspeed.runtime import compiler

    compiled = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compiled


class Engine:
    """A model under DeepSpeed: whole or tensor-parallel layers, any ZeRO stage (``PipelineEngine`` has the stages).

    Making one is collective.

    Args:
        weights: by canonical name; drawn from run.seed where there are none.
    """

    def __init__(self, config: RunConfig, topology: Topology, weights: Mapping[str, Tensor] | None = None) -> None:
        self.config = config = settle_on(config, topology)
        self.topology = topology
        ranks = topology.data_parallel_size
        self.accumulation_steps = config.train.global_batch_size // (config.train.micro_batch_size * ranks)
        deepspeed = import_deepspeed(topology)
        if config.run.deterministic:
            use_deterministic_kernels()
        if topology.device_type == "cuda":
            torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        self.groups = make_groups(topology, sequence_parallel=config.parallel.sequence_parallel)
        model = build_part(config, topology, self.groups.tensor, weights)
        self.zero_stage = zero_stage(config, ranks)
        halves = config.train.precision == "fp16" and self.zero_stage > 0
        if config.train.compile == "blocks":
            compile_blocks(model, topology.device_type, partitioned=self.zero_stage == 3)
        exact = {name: p.detach().clone() for name, p in model.named_parameters()} if halves else {}
        module = self._wrap(model)
        self.optimizer = make_optimizer(module, config.optimizer)
        count = sum(parameter.numel() for parameter in model.parameters())
        overlap = overlaps_reduction(
            config,
            topology.device_type,
            zero_stage=self.zero_stage,
            pipeline=topology.pipeline_parallel_size,
            data=ranks,
            num_parameters=count,
        )
        settings = deepspeed_config(config, self.accumulation_steps, self.zero_stage, overlap=overlap)
        mpu = self._mpu()
        if self.zero_stage == 3:
            # Partitions one parameter after another, so that no device ever holds the whole model. It does not ask the
            # mpu for the group, and would mix the shards of different tensor-parallel ranks.
            deepspeed.zero.Init(
                module=module, mpu=mpu, config_dict_or_path=settings, data_parallel_group=self.groups.data
            )
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=settings, mpu=mpu, dist_init_required=False
        )
        if self.zero_stage == 0 and ranks == 1:
            # It would flatten all gradients into a copy, sum it over nobody, and copy it back.
            self.engine.enable_backward_allreduce = False
        self.model = model
        self.state = EngineState(self.engine, self.optimizer, model, config.model, topology, self.groups.tensor)
        own = clips_itself(config, self.zero_stage)
        self._clipping: Clipping | None = None
        if own or self.zero_stage == 0:
            limit = config.optimizer.clip_grad_norm if own else 0.0
            self._clipping = Clipping(self.engine, self.state.parameters, topology, self.groups, limit)
        self._scales_loss = config.train.precision == "fp16"
        self._timer = ForwardTimer(topology.device)
        self.before_update: Callable[[], None] = _nothing
        """Called in every step when gradients are there and weights and moments are about to change."""
        self.flags: Callable[[], Sequence[bool]] = tuple
        """Asked in every step; ``flagged`` then has whether each was set on any rank."""
        self.flagged: list[bool] = []
        self.forward_seconds: list[float] = []
        """Of the last step's first micro-batch, by rank (on GPUs of the step before); 0 where it is not measured."""
        self.state.restore_masters(exact)
        self.state.make_moments()

    @property
    def _fuses_loss(self) -> bool:
        """Whether the loss is taken from hidden states."""
        return self.config.train.fused_loss is True

    def _compiled_loss(self) -> Callable[..., Any] | None:
        # A CPU has torch's own code, or gains nothing.
        compiles = self.config.train.compile == "blocks" and self.topology.device_type == "cuda"
        return compile_loss() if self._fuses_loss and compiles else None

    def _wrap(self, model: Any) -> Any:
        """The module for DeepSpeed around the model."""
        module = LossModule(model, self.groups.tensor, fused=self._fuses_loss, compiled=self._compiled_loss())
        return module if self.zero_stage == 3 else module.to(self.topology.device)

    def _mpu(self) -> Any:
        # Given without tensor parallelism too: DeepSpeed keeps the last one that it saw for the rest of the process.
        return ModelParallelUnit(self.topology, self.groups)

    # --- a step -----------------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of one optimiser step.

        Each micro-batch's loss sum is divided by the step's count of valid targets over all ranks (spec §1) and scaled
        to cancel the engine's own averages, over accumulation steps in backward() and over ranks in its reduction.

        Raises:
            NonFiniteLoss: on every rank, before the update.
            NonFiniteGradient: on every rank; after the update where DeepSpeed takes the norm in it.
        """
        own = sum(batch.num_targets for batch in batches)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        total = self._accumulate(batches, self._scale(own, batches))
        on_device = self._norm()
        loss, norm, num_targets = self._read(total, on_device, own, batches)
        if norm is not None:
            self._check_norm(loss, norm, updated=False)
        updates = self.state.optimizer_step if self._scales_loss else 0
        self.before_update()
        if self._clipping is not None and on_device is not None:
            self._clipping.clip(on_device)
        self._update()
        if norm is None:
            norm = float(self.engine.get_global_grad_norm() or 0.0)
            self._check_norm(loss, norm, updated=True)
        applied = not self._scales_loss or self.state.optimizer_step > updates
        return StepResult(loss, norm, num_targets, applied)

    def _scale(self, own: int, batches: Sequence[Batch]) -> Tensor | float:
        """What a micro-batch's loss sum is multiplied by. Of many ranks it stays on the device, where their counts are
        summed: the host goes on."""
        if self.topology.world_size == 1:
            _check_targets(own, batches)
            return self.accumulation_steps / own
        count = torch.full((), float(own), dtype=torch.float64, device=self.topology.device)
        dist.all_reduce(count)  # every rank of a replica has counted the same samples
        return self.accumulation_steps * self.topology.world_size / count

    def _accumulate(self, batches: Sequence[Batch], scale: Tensor | float) -> Tensor:
        """Gradients of all micro-batches, reduced, with the update still to come; this rank's loss sum, float64."""
        self.engine.train()
        total = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        for number, batch in enumerate(batches, 1):
            with self._timer if number == 1 else contextlib.nullcontext():
                loss_sum = self.engine(batch.to(self.topology.device))
            total += loss_sum.detach()
            self.engine.backward(scaled(loss_sum, scale))
            if number < len(batches):
                self.engine.step()  # counts the micro-step; DeepSpeed updates at the last one only
        return total

    def _update(self) -> None:
        self.engine.step()

    def _norm(self) -> Tensor | None:
        """The unclipped norm of the gradient, on the device; None where DeepSpeed takes it in its update."""
        if self._clipping is None:
            return None
        norm = self._clipping.norm()
        scaler = self.engine.torch_autocast_z0_gradscaler
        return norm if scaler is None else norm / scaler.get_scale()

    def _read(
        self, total: Tensor, norm: Tensor | None, own: int, batches: Sequence[Batch]
    ) -> tuple[float, float | None, int]:
        """(mean loss over the step's targets, norm of the gradient or None, targets): the one wait of a step for the
        device. Forward times and flags travel along.

        Args:
            own: this rank's targets.

        Raises:
            NonFiniteLoss: on every rank.
            UserError: on every rank, where there is no target.
        """
        flags, ranks = self.flags(), self.topology.world_size
        parts = [total, total.new_full((), self._timer.seconds)]  # numbers of the host, but no copies of them
        parts += [] if norm is None else [norm]
        first = len(parts)
        if ranks > 1:
            parts += [total.new_full((), float(value)) for value in (own, *flags)]
        numbers = self._gather(torch.stack(parts))
        self._timer.read()
        columns = [numbers[i :: len(parts)] for i in range(len(parts))]
        per_rank, self.forward_seconds = columns[0], columns[1]
        num_targets, self.flagged = own, list(flags)
        if ranks > 1:
            num_targets = int(sum(columns[first])) // self.topology.model_parallel_size
            self.flagged = [any(column) for column in columns[first + 1 :]]
            _check_targets(num_targets, batches)
        bad = [rank for rank, value in enumerate(per_rank) if not math.isfinite(value)]
        if bad:
            samples: list[Any] = [None] * ranks
            dist.all_gather_object(samples, _describe(batches))
            where = "; ".join(f"rank {rank}: samples {samples[rank]}" for rank in bad)
            raise NonFiniteLoss(f"the loss is not finite ({where})")
        loss = sum(per_rank[rank] for rank in self.topology.loss_ranks()) / num_targets
        return loss, columns[2][0] if norm is not None else None, num_targets

    def _check_norm(self, loss: float, norm: float, *, updated: bool) -> None:
        if not math.isfinite(norm) and not self._scales_loss:
            raise NonFiniteGradient(f"the loss is {loss:.4f}, but the norm of its gradient is {norm}", updated=updated)

    # --- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], byte_counts: Tensor | None, num_groups: int = 0) -> Scores:
        """Sums over all ranks. Every rank passes as many batches; with ``num_groups`` all of them have groups."""
        with as_written(self.config):
            total, counts = self._sum_scores(self._equal_shards(batches), byte_counts, num_groups)
        per_rank = [self._gather(part) for part in total]
        sums = [sum(values[rank] for rank in self.topology.loss_ranks()) for values in per_rank]
        return make_scores(sums, self._sum_over_replicas(counts))

    def _sum_scores(
        self, batches: Iterable[Batch], byte_counts: Tensor | None, num_groups: int
    ) -> tuple[Tensor, list[int]]:
        self.engine.eval()
        score = partial(self.engine, score=True, num_groups=num_groups)
        return sum_scores(score, batches, byte_counts, self.topology.device, num_groups)

    def _equal_shards(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Without meta-tokens sequences are shorter, and may not divide by the tensor-parallel size."""
        tp = self.groups.tensor
        multiple = tp.size if tp is not None and tp.sequence_parallel else 1
        filler = 0 if self.config.model.meta_token_id else 1
        return (batch.padded(multiple, filler) for batch in batches)

    # --- agreement between ranks ------------------------------------------------------------------------------------

    def _sum(self, values: list[int]) -> list[int]:
        if self.topology.world_size == 1:
            return values  # no way to a device and back
        tensor = torch.tensor(values, dtype=torch.int64, device=self.topology.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def _sum_over_replicas(self, values: list[int]) -> list[int]:
        """Sums over model replicas, all of whose ranks read the same samples."""
        return [value // self.topology.model_parallel_size for value in self._sum(values)]

    def _gather(self, value: Tensor) -> list[float]:
        """Float64s of every rank, in rank order, so that their sum does not depend on how a reduction is done."""
        value = value.reshape(-1)
        if self.topology.world_size == 1:
            return value.tolist()
        values = value.new_empty(self.topology.world_size * value.numel())
        dist.all_gather_into_tensor(values, value)
        return values.tolist()

    def any_rank(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any rank; every rank gets the same answers, from one collective."""
        return [count > 0 for count in self._sum([int(flag) for flag in flags])]

    # --- loss scale -------------------------------------------------------------------------------------------------

    def loss_scale_state(self) -> dict[str, Any] | None:
        """fp16's dynamic loss scale, None without one."""
        if (scaler := self.engine.torch_autocast_z0_gradscaler) is not None:
            return scaler.state_dict()
        if self.engine.fp16_enabled():
            return {key: getattr(self.engine.optimizer.loss_scaler, key) for key in LOSS_SCALE}
        return None

    def load_loss_scale(self, state: dict[str, Any] | None) -> None:
        """Inverse of ``loss_scale_state``. ZeRO 0 scales by other rules; between the two the scale starts anew."""
        scaler = self.engine.torch_autocast_z0_gradscaler
        if state is None or (scaler is None) == ("cur_scale" not in state):
            return
        if scaler is not None:
            scaler.load_state_dict(state)
        else:
            for key in LOSS_SCALE:
                setattr(self.engine.optimizer.loss_scaler, key, state[key])

    def destroy(self) -> None:
        """Let go of DeepSpeed's hooks and buffers."""
        self.engine.destroy()


def _check_targets(count: int, batches: Sequence[Batch]) -> None:
    if count == 0:
        raise UserError(
            f"no position of samples {_describe(batches)} has a target; check data.document_mask and the documents"
        )


def _describe(batches: Sequence[Batch]) -> str:
    return " ".join(f"{batch.sample_ids[0]}–{batch.sample_ids[-1]}" for batch in batches)
