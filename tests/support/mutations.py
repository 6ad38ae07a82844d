"""Ways to break a layout, each put in while a case runs: the comparison must see every one of them."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megameta.parallel import collectives, tensor_parallel


def unsummed_norms() -> Any:
    """Gradients of norms and row biases stay partial under sequence parallelism."""
    return mock.patch.object(tensor_parallel, "PARTIAL_BY_ROWS", tensor_parallel.re.compile("none"))


def unsummed_head_norms() -> Any:
    """Gradients of query and key norms stay partial."""
    return mock.patch.object(tensor_parallel, "PARTIAL_BY_HEADS", tensor_parallel.re.compile("none"))


def summed_twice() -> Any:
    """norm_meta, whose gradient is whole on every rank, is summed as if it were partial."""
    pattern = tensor_parallel.PARTIAL_BY_ROWS.pattern.replace("norm_[12]", "norm_(1|2|meta)")
    return mock.patch.object(tensor_parallel, "PARTIAL_BY_ROWS", tensor_parallel.re.compile(pattern))


def one_norm_unsummed() -> Any:
    """The final norm alone is forgotten."""
    pattern = tensor_parallel.PARTIAL_BY_ROWS.pattern.replace("head", "tail")
    return mock.patch.object(tensor_parallel, "PARTIAL_BY_ROWS", tensor_parallel.re.compile(pattern))


def unreduced_copy() -> Any:
    """No all-reduce in the backward pass of copy_to_shards."""
    return mock.patch.object(collectives._CopyToShards, "backward", staticmethod(lambda ctx, grad: (grad, None)))


def sliced_gather() -> Any:
    """gather_sequence's backward takes own rows without summing the ranks'."""

    def backward(ctx: Any, grad: Any) -> Any:
        return grad.chunk(ctx.tp.size, dim=1)[ctx.tp.rank].contiguous(), None

    return mock.patch.object(collectives._GatherSequence, "backward", staticmethod(backward))


def averaged_gather() -> Any:
    """gather_sequence's backward averages where it should sum: a scale by 1/world size."""
    right = collectives._GatherSequence.backward

    def backward(ctx: Any, grad: Any) -> Any:
        return right(ctx, grad)[0] / ctx.tp.size, None

    return mock.patch.object(collectives._GatherSequence, "backward", staticmethod(backward))


def doubled_reduce() -> Any:
    """reduce_shards' backward sums gradients that are the same on every rank."""

    def forward(ctx: Any, x: Any, tp: Any) -> Any:
        ctx.tp = tp
        return collectives.all_reduce(x, tp)

    def backward(ctx: Any, grad: Any) -> Any:
        return collectives.all_reduce(grad, ctx.tp), None

    return mock.patch.multiple(
        collectives._ReduceShards, forward=staticmethod(forward), backward=staticmethod(backward)
    )


def unreduced_meta() -> Any:
    """The meta branch's output gradients stay on the rank whose rows they are of (no copy_to_shards in add_)."""
    rows = tensor_parallel.ShardedMetaRows

    def add(self: Any, x: Any, y: Any) -> Any:
        own = dataclasses.replace(self, is_real_BM=self.is_own_BM)
        return tensor_parallel.MetaRows.add_(own, x, y)

    return mock.patch.object(rows, "add_", add)


@contextlib.contextmanager
def scaled_loss() -> Iterator[None]:
    """The loss is averaged over data-parallel ranks once more."""
    from megameta.engine.engine import Engine

    right = Engine._accumulate

    def accumulate(self: Any, batches: Any, scale: float) -> Any:
        return right(self, batches, scale / self.topology.data_parallel_size)

    with mock.patch.object(Engine, "_accumulate", accumulate):
        yield


@contextlib.contextmanager
def untied() -> Iterator[None]:
    """No sum of the tied table's gradients over the first and the last stage."""
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.schedule import ReduceTiedGrads

    broken = {**PipelineEngine._INSTRUCTION_MAP, ReduceTiedGrads: lambda _engine: None}
    with mock.patch.object(PipelineEngine, "_INSTRUCTION_MAP", broken):
        yield


@contextlib.contextmanager
def counted_twice() -> Iterator[None]:
    """The tied table counts in the norm on both stages."""
    from megameta.parallel import pipeline

    right = pipeline.make_pipeline

    def make(*arguments: Any) -> Any:
        module = right(*arguments)
        for parameter in module.parameters():
            parameter.ds_pipe_replicated = False
        return module

    with mock.patch("megameta.engine.pipeline_engine.make_pipeline", make):
        yield


@contextlib.contextmanager
def unmarked_shards() -> Iterator[None]:
    """DeepSpeed's norm is not told which parameters are shards."""
    from megameta.engine import build

    right = build.prepare_parameters

    def prepare(model: Any, tp: Any) -> None:
        right(model, tp)
        for parameter in model.parameters():
            parameter.tensor_model_parallel = False

    with mock.patch.object(build, "prepare_parameters", prepare):
        yield


@contextlib.contextmanager
def whole_counted_twice() -> Iterator[None]:
    """Our norm counts what every rank of a tensor-parallel group holds once for each of them."""
    from megameta.engine.clipping import Clipping

    right = Clipping.__init__

    def make(self: Any, *args: Any) -> None:
        right(self, *args)
        self._counts_all = True

    with mock.patch.object(Clipping, "__init__", make):
        yield


@contextlib.contextmanager
def other_draws() -> Iterator[None]:
    """Each tensor-parallel rank draws its weights from a seed of its own."""
    from megameta.engine import build

    right = build.draw_parameter

    def draw(name: str, shape: Any, config: Any, seed: int) -> Any:
        return right(name, shape, config, seed + dist.get_rank())

    with mock.patch.object(build, "draw_parameter", draw):
        yield


@contextlib.contextmanager
def drifting() -> Iterator[None]:
    """The tied table's second copy is left to its own update, which here differs in its last bits."""
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.module import PipelineModule

    right = PipelineEngine._exec_optimizer_step

    def step(self: Any) -> None:
        right(self)
        if self.is_last_stage():
            with torch.no_grad():
                self.module.tied_modules["embedding"].embedding.tokens.weight.mul_(1 + 2e-7)

    once = PipelineModule._synchronize_tied_weights
    calls: list[int] = []

    def synchronize(self: Any) -> None:
        if not calls:  # at construction alone
            once(self)
        calls.append(1)

    with (
        mock.patch.object(PipelineEngine, "_exec_optimizer_step", step),
        mock.patch.object(PipelineModule, "_synchronize_tied_weights", synchronize),
    ):
        yield


#: Name → (mutation, layout as TP, PP, DP, ZeRO).
MUTATIONS: dict[str, tuple[Any, tuple[int, int, int, int]]] = {
    "norms and row biases not summed over TP": (unsummed_norms, (2, 1, 1, 1)),
    "query and key norms not summed over TP": (unsummed_head_norms, (2, 1, 1, 1)),
    "the final norm not summed over TP": (one_norm_unsummed, (2, 1, 1, 1)),
    "norm_meta summed over TP, though whole": (summed_twice, (2, 1, 1, 1)),
    "copy_to_shards without its all-reduce": (unreduced_copy, (2, 1, 1, 1)),
    "gather_sequence slices in backward": (sliced_gather, (2, 1, 1, 1)),
    "gather_sequence averages in backward": (averaged_gather, (2, 1, 1, 1)),
    "reduce_shards sums again in backward": (doubled_reduce, (2, 1, 1, 1)),
    "meta rows' gradients not summed": (unreduced_meta, (2, 1, 1, 1)),
    "whole gradients counted twice in the norm": (whole_counted_twice, (2, 1, 1, 1)),
    "weights drawn by rank": (other_draws, (2, 1, 1, 1)),
    "loss divided by data-parallel size": (scaled_loss, (1, 1, 2, 1)),
    "tied gradients not summed": (untied, (1, 2, 1, 1)),
    "tied copies not brought together": (drifting, (1, 2, 1, 1)),
    "tied table counted twice in the norm": (counted_twice, (1, 2, 1, 1)),
    "shards not marked for DeepSpeed's norm": (unmarked_shards, (2, 1, 1, 3)),  # last: ZeRO 3 patches torch for good
}
