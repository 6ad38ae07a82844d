"""Memory of a rank and what it sends, stage by stage, for a configuration on a number of ranks; nothing is started."""

from dataclasses import dataclass

from megameta.config import RunConfig
from megameta.parallel.activations import Activations, Widths, activations
from megameta.parallel.layout import Layout, Weights, stage_blocks, stage_weights
from megameta.parallel.traffic import Transfer, live_parameters, transfers, zero_option

#: DeepSpeed's default reduce_bucket_size, in elements.
REDUCE_BUCKET = 5e8


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    model: float
    """Parameters; under ZeRO 3 this rank's part of them and those that are gathered."""
    gradients: float
    optimizer: float
    """Moments, and under ZeRO float32 master weights (DeepSpeed copies them although the weights are float32)."""
    activations: float
    """Kept for backward, of all micro-batches in flight."""
    workspace: float
    """At the worst moment beside the above: gradients inside a backward pass, DeepSpeed's bucket, the update."""

    @property
    def total(self) -> float:
        """All of it; CUDA's context, NCCL's buffers and fragmentation come on top."""
        return self.model + self.gradients + self.optimizer + self.activations + self.workspace


@dataclass(frozen=True)
class StageEstimate:
    """One pipeline stage, a rank of it."""

    stage: int
    blocks: tuple[int, int]
    """First and one past the last."""
    weights: Weights
    memory: MemoryEstimate
    transfers: list[Transfer]


def estimate(config: RunConfig, layout: Layout) -> list[StageEstimate]:
    """Every stage of a layout; the configuration's own layout plays no part."""
    per_micro_batch = activations(config, layout)
    found = []
    for stage, blocks in enumerate(stage_blocks(config, layout.pipeline)):
        weights = stage_weights(config.model, layout, blocks)
        memory = memory_estimate(config, layout, stage, blocks, weights, per_micro_batch)
        found.append(StageEstimate(stage, blocks, weights, memory, transfers(config, layout, stage, blocks)))
    return found


def worst(stages: list[StageEstimate]) -> StageEstimate:
    """The stage whose ranks need most memory."""
    return max(stages, key=lambda stage: stage.memory.total)


def memory_estimate(
    config: RunConfig,
    layout: Layout,
    stage: int,
    blocks: tuple[int, int],
    weights: Weights,
    per_micro_batch: Activations,
) -> MemoryEstimate:
    """A rank of one stage.

    DeepSpeed 0.19.8 keeps, for P parameters of w bytes on n data-parallel ranks: w·P parameters (ZeRO 3: /n), w·P
    gradients (ZeRO 2, 3: /n), 8·P moments and from ZeRO 1 on 4·P master weights (/n). From ZeRO 1 on a bucket of
    reduce_bucket_size gradients is allocated during backward, however small the model.
    """
    count, n, zero = weights.count, layout.data, layout.zero_stage
    width = Widths.of(config.train.precision, zero).weight
    model = float(width * count)
    if zero == 3:
        prefetched = zero_option(config, "stage3_prefetch_bucket_size", 5e7)
        model = width * (count / n + min(count, live_parameters(config, layout, weights) + prefetched))
    gradients = width * count / (n if zero >= 2 else 1)
    optimizer = 8.0 * count if zero == 0 else 12.0 * count / n
    last, recompute = stage == layout.pipeline - 1, layout.checkpointing
    num_blocks = blocks[1] - blocks[0]
    kept = layout.in_flight(stage) * per_micro_batch.kept(num_blocks, last=last, recompute=recompute)
    in_backward = per_micro_batch.at_peak(num_blocks, last=last, recompute=recompute)
    bucket = zero_option(config, "reduce_bucket_size", REDUCE_BUCKET)
    reduced = min(count, bucket)
    if zero == 0:
        in_step = width * reduced if n > 1 else 0.0  # gradients are flattened for the all-reduce
    else:
        in_backward += width * bucket + (width * reduced if zero >= 2 else 0.0)
        in_step = width * (bucket + reduced) + 8.0 * count / n  # two copies of this rank's gradients
    workspace = max(in_backward, in_step - kept)
    return MemoryEstimate(model, gradients, optimizer, kept, workspace)
