"""Memory of a rank and what it sends, stage by stage, for a configuration on a number of ranks; nothing is started."""

from dataclasses import dataclass

from megameta.config import RunConfig, device_of
from megameta.config.deepspeed import REDUCE_BUCKET, overlaps_reduction, zero_option
from megameta.plan.activations import Activations, Widths, activations
from megameta.plan.layout import (
    Layout,
    Weights,
    stage_blocks,
    stage_weights,
)
from megameta.plan.traffic import Transfer, live_parameters, transfers


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
    last = stage == layout.pipeline - 1
    counts = blocks[1] - blocks[0], config.model.count_meta_layers(*blocks)
    kept = layout.in_flight(stage) * per_micro_batch.kept(*counts, last=last, recompute=layout.checkpointing)
    if layout.pipeline > 1:  # buffers for what comes in and its gradient; two micro-batches' logits
        kept += (3 * per_micro_batch.block_input if stage > 0 else 0.0) + (2 * per_micro_batch.logits if last else 0.0)
    workspace = _workspace(config, layout, width * count, (*counts, last), per_micro_batch, kept)
    return MemoryEstimate(model, gradients, optimizer, kept, workspace)


def _workspace(
    config: RunConfig,
    layout: Layout,
    gradients: float,
    blocks: tuple[int, int, bool],
    per_micro_batch: Activations,
    kept: float,
) -> float:
    """The most of three moments: at the loss, inside a block's backward pass, in the update.

    DeepSpeed's bucket (two that take turns, where sums overlap the pass) comes with the first gradient of a backward
    pass; ZeRO 2 gives it back with the last one, ZeRO 1 only after the reduction of the last micro-batch, ZeRO 3 never.
    What is reduced is copied once more.

    Args:
        gradients: bytes of all gradients of the stage's shard.
        blocks: their number, how many have the meta branch, and whether the head follows.
    """
    zero, (num_blocks, num_branches, last) = layout.zero_stage, blocks
    width = Widths.of(config.train.precision, zero).weight
    bucket = width * zero_option(config, "reduce_bucket_size", REDUCE_BUCKET) if zero > 0 else 0.0
    ranks = {"pipeline": layout.pipeline, "data": layout.data}
    if overlaps_reduction(config, device_of(config), zero_stage=zero, **ranks, num_parameters=int(gradients / width)):
        bucket *= 2
    reduced = min(gradients, width * zero_option(config, "reduce_bucket_size", REDUCE_BUCKET))
    stays = zero == 3 or (zero == 1 and layout.accumulation > 1)
    at_loss = per_micro_batch.at_loss(num_blocks, num_branches, last=last, recompute=layout.checkpointing)
    at_loss += bucket if stays else 0.0
    in_block = per_micro_batch.in_block(num_branches, last=last, recompute=layout.checkpointing)
    in_block += bucket + (reduced if zero >= 2 and gradients > bucket else 0.0)  # else reduced when the pass is over
    if zero == 0:
        in_update = reduced if layout.data > 1 else 0.0  # flattened for the all-reduce
    else:
        in_update = bucket + reduced + 8.0 / width * gradients / layout.data  # two float32 copies of this rank's part
    return max(at_loss, in_block, in_update - kept)
