"""DeepSpeed behind one small interface: a step over micro-batches, an evaluation pass, and state by canonical name."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megameta.config import RunConfig
from megameta.data.loader import Batch
from megameta.errors import UserError
from megameta.model import GPT
from megameta.model.init import is_vocabulary_table
from megameta.parallel.topology import Topology
from megameta.train.deepspeed_config import deepspeed_config
from megameta.train.losses import LossModule, sum_losses
from megameta.train.optimizer import make_optimizer

#: AdamW's state that has the shape of its parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")
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
    """The loss is finite and its gradient is not; the weights are lost, and no checkpoint may be made of them."""


def import_deepspeed(device_type: str) -> Any:
    """DeepSpeed, quiet, for this device. On a CPU its shared-memory op would be compiled at start-up: switched off."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if device_type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Engine:
    """A model under DeepSpeed.

    Args:
        model: initialised or loaded, on the CPU; the engine owns it from here on.
    """

    def __init__(self, model: GPT, config: RunConfig, topology: Topology) -> None:
        self.topology = topology
        self.vocab_size = model.config.vocab_size
        ranks = topology.data_parallel_size
        self.accumulation_steps = config.train.global_batch_size // (config.train.micro_batch_size * ranks)
        model.activation_checkpointing = config.train.activation_checkpointing
        module = LossModule(model).to(topology.device)
        self.optimizer = make_optimizer(module, config.optimizer)
        self._names = {f"gpt.{name}": name for name, _ in model.named_parameters()}
        halves = config.train.precision == "fp16" and config.parallel.zero_stage > 0
        exact = {name: p.detach().clone() for name, p in model.named_parameters()} if halves else {}
        deepspeed = import_deepspeed(topology.device_type)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            config=deepspeed_config(config, self.accumulation_steps),
            dist_init_required=False,
        )
        self._scales_loss = config.train.precision == "fp16"
        self._restore_masters(exact)
        self._make_moments()

    # --- a step -----------------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of one optimiser step.

        Each micro-batch's loss sum is divided by the step's count of valid targets over all ranks (spec §1) and scaled
        to cancel the engine's own averages, over accumulation steps in backward() and over ranks in its reduction.

        Raises:
            NonFiniteLoss: on every rank, before the update.
            NonFiniteGradient: on every rank, after it.
        """
        num_targets = int(self._sum([sum(batch.num_targets for batch in batches)])[0])
        if num_targets == 0:
            raise UserError(
                f"no position of samples {_describe(batches)} has a target; check data.document_mask and the documents"
            )
        scale = self.accumulation_steps * self.topology.data_parallel_size / num_targets
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.train()
        total = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        for number, batch in enumerate(batches, 1):
            loss_sum = self.engine(batch.to(self.topology.device))
            total += loss_sum.detach()
            self.engine.backward(loss_sum * scale)
            if number < len(batches):
                self.engine.step()  # counts the micro-step; DeepSpeed updates at the last one only
        loss = self._finite_mean(total, num_targets, batches)
        norm = self._stage0_norm()
        updates = self.optimizer_step if self._scales_loss else 0
        self.engine.step()
        if norm is None:
            norm = float(self.engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm) and not self._scales_loss:
            raise NonFiniteGradient(f"the loss is {loss:.4f}, but the norm of its gradient is {norm}")
        applied = not self._scales_loss or self.optimizer_step > updates
        return StepResult(loss, norm, num_targets, applied)

    def _finite_mean(self, total: Tensor, num_targets: int, batches: Sequence[Batch]) -> float:
        per_rank = self._gather(total)
        bad = [rank for rank, value in enumerate(per_rank) if not torch.isfinite(torch.tensor(value))]
        if bad:
            samples: list[Any] = [None] * self.topology.world_size
            dist.all_gather_object(samples, _describe(batches))
            where = "; ".join(f"rank {rank}: samples {samples[rank]}" for rank in bad)
            raise NonFiniteLoss(f"the loss is not finite ({where})")
        return sum(per_rank) / num_targets

    def _stage0_norm(self) -> float | None:
        """The unclipped norm where the engine reports none (ZeRO 0); gradients are whole and reduced there."""
        if self.engine.zero_optimization_stage() > 0:
            return None
        grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        scaler = self.engine.torch_autocast_z0_gradscaler
        return norm / scaler.get_scale() if scaler is not None else norm

    # --- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], byte_counts: Tensor | None) -> tuple[float, int, int]:
        """(sum of losses in nats, targets, bytes of the targets) over all ranks. Every rank passes as many batches."""
        self.engine.eval()
        total, targets, num_bytes = sum_losses(self.engine, batches, byte_counts, self.topology.device)
        counts = self._sum([targets, num_bytes])
        return sum(self._gather(total)), counts[0], counts[1]

    # --- agreement between ranks ------------------------------------------------------------------------------------

    def _sum(self, values: list[int]) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64, device=self.topology.device)
        if self.topology.world_size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def _gather(self, value: Tensor) -> list[float]:
        """One float64 a rank, in rank order, so that its sum does not depend on how a reduction is done."""
        if self.topology.world_size == 1:
            return [float(value)]
        values = value.new_empty(self.topology.world_size)
        dist.all_gather_into_tensor(values, value.reshape(1))
        return values.tolist()

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank gets the same answer."""
        return self._sum([int(flag)])[0] > 0

    # --- state by canonical name ------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by their name in the plain GPT, in its order."""
        for name, parameter in self.engine.module.named_parameters():
            yield self._names[name], parameter

    def gather_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(weights, optimiser moments) in full, float32, on the CPU: collective; rank 0 gets them, others get {}.

        Weights are keyed by name, moments by "exp_avg.NAME" and "exp_avg_sq.NAME". Vocabulary padding is left out.
        """
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            pieces = {name: self._full(parameter, None)}
            pieces |= {f"{key}.{name}": self._full(parameter, key) for key in MOMENTS}
            if self.topology.is_main:
                for key, tensor in pieces.items():
                    logical = tensor[: self.vocab_size] if is_vocabulary_table(name) else tensor
                    # copied: the state goes on changing while it is written
                    (weights if key == name else moments)[key] = logical.detach().float().cpu().clone()
        return weights, moments

    def gather_gradient(self, parameter: nn.Parameter) -> Tensor:
        """The whole averaged gradient of the step, between backward and step: collective (tests use it)."""
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).detach().float().cpu().clone()

    def _full(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        if self.engine.zero_optimization_stage() == 0:
            return parameter if key is None else self.optimizer.state[parameter][key]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """The client's optimiser, which ZeRO wraps and feeds with flat partitions."""
        return self.optimizer if self.engine.zero_optimization_stage() == 0 else self.engine.optimizer.optimizer

    def _owned(self) -> list[Tensor]:
        """The tensors that the inner optimiser updates: parameters, or this rank's flat partitions of them."""
        zero = self.engine.optimizer
        stage = self.engine.zero_optimization_stage()
        if stage == 3:
            return list(zero.fp32_partitioned_groups_flat)
        if stage > 0:
            return list(zero.single_partition_of_fp32_groups)
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _restore_masters(self, exact: dict[str, Tensor]) -> None:
        """DeepSpeed's fp16 section makes its float32 master weights from halves; put the exact ones in their place."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self.named_parameters():
            if name in exact:
                safe_set_full_fp32_param(parameter, exact[name])

    def _make_moments(self) -> None:
        """Make AdamW's state before the first step, which would make it itself, and link it to the parameters.

        ZeRO 1 and 2 link after the first parameter group's first step, when the second group has no state yet, and
        never again, so that safe_get_full_optimizer_state fails for that group (seen with DeepSpeed 0.19.8).
        """
        state = self._inner_optimizer.state
        for tensor in self._owned():
            state[tensor] = {key: torch.zeros_like(tensor) for key in MOMENTS}
            state[tensor]["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        if self.engine.zero_optimization_stage() in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def load_moments(self, moments: dict[str, Tensor], step: int) -> None:
        """Put saved moments (keyed as by ``gather_state``, in full on every rank) and AdamW's step count in place.

        The weights must have been in the model when the engine was made.
        """
        from deepspeed.utils import safe_set_full_optimizer_state

        state = self._inner_optimizer.state
        for tensor in self._owned():
            state[tensor]["step"].fill_(step)
        for group in self._inner_optimizer.param_groups:
            if "step" in group:  # apex counts by group
                group["step"] = step
        for name, parameter in self.named_parameters():
            for key in MOMENTS:
                value = moments[f"{key}.{name}"].to(self.topology.device)
                if self.engine.zero_optimization_stage() == 0:
                    state[parameter][key][: value.shape[0]] = value
                    continue
                full = value.new_zeros(getattr(parameter, "ds_shape", parameter.shape))
                full[: value.shape[0]] = value
                safe_set_full_optimizer_state(parameter, full, key)

    @property
    def optimizer_step(self) -> int:
        """Updates that AdamW has made (fp16 may have skipped some steps)."""
        by_group = self._inner_optimizer.param_groups[0].get("step")  # apex
        return int(by_group if by_group is not None else self._inner_optimizer.state[self._owned()[0]]["step"])

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


def _describe(batches: Sequence[Batch]) -> str:
    return " ".join(f"{batch.sample_ids[0]}–{batch.sample_ids[-1]}" for batch in batches)
