"""What a real step on gloo sends, keeps and needs, in bytes; run on every rank (see ranks.py)."""

import gc
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megameta.config import RunConfig, build_config
from megameta.data.loader import Batch
from megameta.engine.pipeline_engine import make_engine
from megameta.parallel.topology import Topology
from tests.support.live_tensors import LiveTensors, SavedTensors

VOCABULARY = 700
#: Bytes of a rank's norms, loss sums and flags: not part of the estimate.
SMALL = 32
KINDS = {
    "c10d.allreduce_.default": ("all_reduce", 0),
    "c10d._allgather_base_.default": ("all_gather", 0),
    "c10d._reduce_scatter_base_.default": ("reduce_scatter", 1),
    "c10d.send.default": ("send", 0),
    "c10d.broadcast_.default": ("broadcast", 0),
}
#: The other end of a send, and what moves nothing.
PASSIVE = {"c10d.recv_.default", "c10d.barrier.default"}


def step_config(**changes) -> RunConfig:
    """A tiny run; ``changes`` are section__key."""
    values: dict = {
        "run": {"device": "cpu"},
        "model": {"vocab_size": VOCABULARY, "hidden_size": 64, "num_layers": 4, "num_heads": 4},
        "data": {"sequence_length": 64, "meta_token_fraction": 0.125},
        "train": {"num_steps": 10, "micro_batch_size": 2, "global_batch_size": 8, "precision": "fp32"},
        "optimizer": {"warmup_steps": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    values["model"].setdefault("max_position_embeddings", values["data"]["sequence_length"])
    return build_config(values)


def make_topology(topology: Topology, config: RunConfig) -> Topology:
    """The topology of the configuration at this process's place."""
    parallel = config.parallel
    sizes = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    return Topology(topology.world_size, topology.rank, topology.local_rank, "cpu", *sizes)


def make_batches(config: RunConfig, topology: Topology, step: int) -> list[Batch]:
    """A rank's micro-batches of a step, with as many meta-tokens a sequence as the configuration has."""
    data, train = config.data, config.train
    count = train.global_batch_size // (train.micro_batch_size * topology.data_parallel_size)
    draw = torch.Generator().manual_seed(100 * step + topology.data_parallel_rank)
    shape = (train.micro_batch_size, data.sequence_length)
    batches = []
    for _ in range(count):
        token_BT = torch.randint(0, config.model.vocab_size - 1, shape, generator=draw)
        for row_T in token_BT:
            row_T[torch.randperm(shape[1], generator=draw)[: data.num_meta_tokens]] = config.model.meta_token_id
        label_BT = torch.randint(0, config.model.vocab_size - 1, shape, generator=draw)
        document_BT = position_BT = None
        if data.document_mask:
            document_BT = (torch.arange(shape[1]) // 20).expand(shape).contiguous()
        if data.reset_positions:
            position_BT = (torch.arange(shape[1]) % 20).expand(shape).contiguous()
        batches.append(Batch(token_BT, label_BT, document_BT, position_BT, data.num_meta_tokens, (0,) * shape[0]))
    return batches


class Counter(TorchDispatchMode):
    """Bytes of every collective inside, by (ranks of its group, kind)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[tuple[int, ...], str], int] = defaultdict(int)
        self.calls: list[tuple[tuple[int, ...], str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("c10d."):
            self._count(name, args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name in PASSIVE:
            return
        kind, place = KINDS[name]  # a collective that nobody expected is a KeyError
        tensors: Iterable[Tensor] = args[place] if isinstance(args[place], list | tuple) else [args[place]]
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        ranks = tuple(sorted(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))))
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.calls.append((ranks, kind, size))
        if size > SMALL * (len(ranks) if kind == "all_gather" else 1) and len(ranks) > 1:
            self.found[ranks, kind] += size


@dataclass(frozen=True)
class Step:
    """What one rank did."""

    traffic: dict[tuple[str, str], int]
    """Bytes that entered collectives in a step, by (group, kind)."""
    saved: float
    """Bytes saved for backward by a micro-batch."""
    peak: int
    """Most bytes that a step had allocated at once: gradients, activations and what comes and goes."""


def observe(topology: Topology, config: RunConfig) -> Step:
    """Run a few steps; the first ones, in which DeepSpeed gets to know the model, are not looked at."""
    topology = make_topology(topology, config)
    engine = make_engine(config, topology)
    for step in range(2):
        engine.train_step(make_batches(config, topology, step), 1e-3)
    with Counter() as counter:
        engine.train_step(make_batches(config, topology, 2), 1e-3)
    traffic: dict[tuple[str, str], int] = defaultdict(int)
    for (ranks, kind), size in counter.found.items():
        traffic[group_of(topology, ranks, kind), kind] += size
    with LiveTensors() as live:
        live.known(thing for thing in gc.get_objects() if isinstance(thing, Tensor) and thing.device.type == "cpu")
        engine.train_step(make_batches(config, topology, 3), 1e-3)
    batches = make_batches(config, topology, 4)
    with SavedTensors(engine.model.parameters()) as saved:
        engine._accumulate(batches, 1.0)
    return Step(dict(traffic), saved.num_bytes / len(batches), live.peak)


def group_of(topology: Topology, ranks: tuple[int, ...], kind: str) -> str:
    """Which of the estimate's groups these ranks are."""
    own = topology.rank
    if kind == "send":
        return "pipeline"
    if topology.tensor_parallel_size > 1 and list(ranks) in topology.tensor_parallel_groups() and own in ranks:
        return "tensor"
    if topology.data_parallel_size > 1 and list(ranks) in topology.data_parallel_groups() and own in ranks:
        return "data"
    if topology.pipeline_parallel_size > 1:
        return "embedding"
    raise AssertionError(f"{kind} over ranks {ranks}, which are no group of the layout")
