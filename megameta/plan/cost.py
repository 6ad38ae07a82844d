"""How long a step of a layout takes, by a model simple enough to check by hand. docs/planning.md states it in words.

    micro-batch of a stage = max(arithmetic + memory traffic, launches) + tensor-parallel traffic + sends
    step = (micro-batches + stages − 1) · slowest stage + data-parallel traffic + tied table + update

Nothing is assumed to overlap. Numbers of hardware are achievable ones, not those of data sheets, where they are
bandwidths; the peak is the data sheet's, and ``efficiency`` what large matrix products reach of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megameta.config import RunConfig
from megameta.model.flops import block_flops, head_flops
from megameta.plan.activations import Activations, Widths, activations
from megameta.plan.estimate import StageEstimate, estimate, worst
from megameta.plan.layout import Layout
from megameta.plan.traffic import Transfer

#: Kernels that eager PyTorch launches for a block's forward and backward pass, and again to recompute it.
LAUNCHES, LAUNCHES_AGAIN = 180, 60
#: Times that a byte kept for backward crosses the memory bus: written, read, and as much again around it.
PASSES = 3.0
#: Bytes moved for a parameter by AdamW over float32: read weight, gradient and moments, write weight and moments.
UPDATE_BYTES = 28.0


@dataclass(frozen=True)
class Hardware:
    """Defaults: H100 SXM, eight to a node, NVLink inside, one 400 Gb/s port a GPU between nodes."""

    gpus_per_node: int = 8
    peak_flops: float = 989e12
    """Of a GPU in the run's precision, dense: 989 TFLOP/s in bf16 and fp16; 495 in TF32; 67 in float32."""
    efficiency: float = 0.6
    """Share of the peak that matrix products reach."""
    memory_bandwidth: float = 3000e9
    """Bytes/s of a GPU's memory."""
    intra_bandwidth: float = 300e9
    """Bytes/s that a GPU sends inside a node."""
    inter_bandwidth: float = 40e9
    """Bytes/s that a GPU sends between nodes."""
    latency: float = 15e-6
    """Seconds of any collective."""
    launch: float = 5e-6
    """Seconds of the host for a kernel."""

    @staticmethod
    def default_peak(config: RunConfig) -> float:
        """Of an H100 SXM, dense."""
        return {"fp32": 67e12, "tf32": 495e12}.get(config.train.products, 989e12)

    def bandwidth(self, stride: int, ranks: int) -> float:
        """Bytes/s of a rank in a ring over ``ranks`` ranks, each ``stride`` after the one before.

        A ring that leaves its node uses the ports of all its members there: NCCL makes as many rings.
        """
        if stride * ranks <= self.gpus_per_node:
            return self.intra_bandwidth
        return min(self.intra_bandwidth, max(1, self.gpus_per_node // stride) * self.inter_bandwidth)


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimiser step on the slowest rank."""

    compute: float
    """Arithmetic and memory traffic of all micro-batches and the update; recomputation included."""
    communication: float
    """All groups."""
    bubble: float
    """Waiting for the first and the last micro-batch to pass through the pipeline."""

    @property
    def total(self) -> float:
        """Seconds."""
        return self.compute + self.communication + self.bubble


@dataclass(frozen=True)
class Evaluation:
    """A layout with its memory and time."""

    layout: Layout
    stages: list[StageEstimate]
    time: StepTime

    @property
    def memory(self) -> float:
        """Bytes on a rank of the worst stage."""
        return worst(self.stages).memory.total


def evaluate(config: RunConfig, layout: Layout, hardware: Hardware) -> Evaluation:
    """Memory and time of a layout."""
    stages = estimate(config, layout)
    return Evaluation(layout, stages, step_time(config, layout, stages, hardware))


def step_time(config: RunConfig, layout: Layout, stages: list[StageEstimate], hardware: Hardware) -> StepTime:
    """Of an optimiser step, from what each stage computes and sends."""
    kept = activations(config, layout)
    work = [_micro_batch(config, layout, stage, kept, hardware) for stage in stages]
    talk = [_seconds(stage.transfers, layout, hardware, "tensor", "pipeline") for stage in stages]
    micro = layout.accumulation
    slowest = max(range(layout.pipeline), key=lambda s: work[s] + talk[s] / micro)
    once = max(_seconds(stage.transfers, layout, hardware, "data", "embedding") for stage in stages)
    update = max(_update(config, layout, stage, hardware) for stage in stages)
    bubble = (layout.pipeline - 1) * (work[slowest] + talk[slowest] / micro)
    return StepTime(micro * work[slowest] + update, talk[slowest] + once, bubble)


def _micro_batch(
    config: RunConfig, layout: Layout, stage: StageEstimate, kept: Activations, hardware: Hardware
) -> float:
    """Seconds of one micro-batch's forward and backward pass on one stage, without communication."""
    model, data = config.model, config.data
    with_meta = model.count_meta_layers(*stage.blocks)
    num_blocks = stage.blocks[1] - stage.blocks[0]
    last = stage.blocks[1] == model.num_layers
    head = head_flops(model, data.sequence_length)
    blocks = sum(
        count * block_flops(model, data.sequence_length, data.num_meta_tokens, has_meta=has_meta)
        for has_meta, count in ((True, with_meta), (False, num_blocks - with_meta))
    )
    passes = 4 if layout.checkpointing else 3
    flops = layout.micro_batch_size * (passes * blocks + (3 * head if last else 0)) / layout.tensor
    moved = PASSES * (num_blocks * kept.block + with_meta * kept.branch) * (passes / 3)
    moved += PASSES * kept.head + 2 * kept.head_temporary if last else 0.0
    moved += _weight_bytes(config, layout) * stage.weights.count
    launches = num_blocks * (LAUNCHES + (LAUNCHES_AGAIN if layout.checkpointing else 0))
    on_device = flops / (hardware.peak_flops * hardware.efficiency) + moved / hardware.memory_bandwidth
    return max(on_device, launches * hardware.launch)


def _weight_bytes(config: RunConfig, layout: Layout) -> float:
    """Bytes moved for a parameter in a micro-batch: read forward and backward, its gradient written and added up; under
    autocast copied to half the size and back as well."""
    widths = Widths.of(config.train.precision, layout.zero_stage)
    copies = 12.0 if widths.linear != widths.weight else 0.0
    return 2 * widths.linear + 4 * widths.weight + copies


def _update(config: RunConfig, layout: Layout, stage: StageEstimate, hardware: Hardware) -> float:
    share = layout.data if layout.zero_stage > 0 else 1
    return UPDATE_BYTES * stage.weights.count / share / hardware.memory_bandwidth


def _seconds(found: Iterable[Transfer], layout: Layout, hardware: Hardware, *groups: str) -> float:
    """Seconds of an optimiser step that a rank spends in these groups."""
    total = 0.0
    for transfer in found:
        if transfer.group in groups:
            total += transfer.calls * hardware.latency + transfer.wire / group_bandwidth(
                transfer.group, layout, hardware
            )
    return total


def group_bandwidth(group: str, layout: Layout, hardware: Hardware) -> float:
    """Bytes/s of a rank in one of its groups; of neighbouring stages the pair farthest apart."""
    if group == "tensor":
        return hardware.bandwidth(1, layout.tensor)
    if group == "data":
        return hardware.bandwidth(layout.tensor, layout.data)
    # One rank talks to one: through its own port, unless the whole pipeline is on one node.
    fits = layout.world_size <= hardware.gpus_per_node
    return hardware.intra_bandwidth if fits else min(hardware.intra_bandwidth, hardware.inter_bandwidth)
