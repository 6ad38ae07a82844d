"""Which layouts a number of GPUs allows, which of them fit into memory, and which are fastest by the cost model."""

from collections.abc import Iterator
from dataclasses import dataclass

from megameta.config import RunConfig
from megameta.config.validate import layout_problems
from megameta.plan.cost import Evaluation, Hardware, evaluate
from megameta.plan.layout import Layout

#: Share of a GPU's memory left to CUDA's context, NCCL's buffers and fragmentation.
HEADROOM = 0.08
#: Times this close are the same: the cost model is no finer.
AS_GOOD = 1.02
#: Largest micro-batch that is tried; larger ones gain nothing by the cost model.
MOST_SEQUENCES = 64


@dataclass(frozen=True)
class Plan:
    """``best``: layouts that fit, fastest first, one for each division of the ranks and ZeRO stage.

    ``leanest`` is the layout that needs least memory, None where the ranks cannot be divided at all.
    """

    best: list[Evaluation]
    leanest: Evaluation | None
    num_considered: int
    num_fitting: int


def plan(config: RunConfig, num_gpus: int, gpu_memory: float, hardware: Hardware) -> Plan:
    """Judge every layout of ``num_gpus``; ``gpu_memory`` in bytes."""
    usable = gpu_memory * (1 - HEADROOM)
    leanest: Evaluation | None = None
    groups: dict[tuple, list[Evaluation]] = {}
    considered = 0
    for layout in layouts(config, num_gpus, hardware.gpus_per_node):
        found = evaluate(config, layout, hardware)
        considered += 1
        if leanest is None or found.memory < leanest.memory:
            leanest = found
        if found.memory > usable:
            continue
        groups.setdefault((layout.tensor, layout.pipeline, layout.zero_stage), []).append(found)
    best = sorted(map(_representative, groups.values()), key=lambda found: found.time.total)
    return Plan(best, leanest, considered, sum(map(len, groups.values())))


def _representative(group: list[Evaluation]) -> Evaluation:
    """Of those that are as good as the fastest, the one that needs least memory."""
    limit = AS_GOOD * min(found.time.total for found in group)
    return min((found for found in group if found.time.total <= limit), key=lambda found: found.memory)


def layouts(config: RunConfig, num_gpus: int, gpus_per_node: int) -> Iterator[Layout]:
    """Every valid layout: tensor parallelism inside a node and with sequence parallelism where the length allows it;
    ZeRO 0 for one replica, 1 for pipelines; micro-batches of every size that divides a rank's share."""
    for tensor in tensor_sizes(config, num_gpus, gpus_per_node):
        sequence_parallel = tensor > 1 and config.data.sequence_length % tensor == 0
        for pipeline in _divisors(num_gpus // tensor):
            if pipeline > config.model.num_layers:
                continue
            data = num_gpus // (tensor * pipeline)
            for zero_stage in _zero_stages(pipeline, data):
                if not _works(config, tensor, pipeline, zero_stage, sequence_parallel):
                    continue
                for micro in _micro_batches(config, data):
                    accumulation = config.train.global_batch_size // (micro * data)
                    for checkpointing in (False, True):
                        yield Layout(
                            tensor,
                            pipeline,
                            data,
                            zero_stage,
                            sequence_parallel,
                            micro,
                            accumulation,
                            checkpointing,
                        )


def _works(config: RunConfig, tensor: int, pipeline: int, zero_stage: int, sequence_parallel: bool) -> bool:
    """Whether ``validate`` lets the layout start."""
    sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline, "zero_stage": zero_stage}
    parallel = config.parallel.model_copy(update={**sizes, "sequence_parallel": sequence_parallel})
    return not layout_problems(config.model_copy(update={"parallel": parallel}), "cuda")


def tensor_sizes(config: RunConfig, num_gpus: int, gpus_per_node: int) -> list[int]:
    """Sizes that divide the ranks, a node and everything that is sharded."""
    model = config.model
    sharded = (num_gpus, gpus_per_node, model.num_heads, model.num_key_value_heads, model.intermediate_size)
    return [n for n in _divisors(num_gpus) if n == 1 or all(size % n == 0 for size in sharded)]


def _zero_stages(pipeline: int, data: int) -> tuple[int, ...]:
    if pipeline > 1:
        return (1,)
    return (0,) if data == 1 else (0, 1, 2, 3)


def _micro_batches(config: RunConfig, data: int) -> list[int]:
    share, left = divmod(config.train.global_batch_size, data)
    if left or not share:
        return []
    sizes = {*range(1, MOST_SEQUENCES + 1), config.train.micro_batch_size}
    return [size for size in sorted(sizes) if share % size == 0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def smallest_batch(config: RunConfig, num_gpus: int, gpus_per_node: int) -> int | None:
    """The smallest global batch, from the configuration's on, that some division of the ranks can share; None where
    the one given will do."""
    wanted = config.train.global_batch_size
    sizes = {
        num_gpus // (tensor * pipeline)
        for tensor in tensor_sizes(config, num_gpus, gpus_per_node)
        for pipeline in _divisors(num_gpus // tensor)
        if pipeline <= config.model.num_layers
    }
    if any(wanted % data == 0 for data in sizes):
        return None
    return min(-(-wanted // data) * data for data in sizes)
