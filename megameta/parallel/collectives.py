"""Collectives with gradients, in pairs: what one does in the forward pass its partner does in the backward pass.

| function          | forward          | backward       | where (Megatron-LM's name)                        |
|-------------------|------------------|----------------|---------------------------------------------------|
| copy_to_shards    | nothing          | all-reduce     | before column-sharded projections (f)             |
| reduce_shards     | all-reduce       | nothing        | after row-sharded projections (g)                 |
| gather_sequence   | all-gather       | reduce-scatter | before column-sharded projections, sequence (g)   |
| scatter_sequence  | reduce-scatter   | all-gather     | after row-sharded projections, sequence (g bar)   |
| split_sequence    | own slice        | all-gather     | after the embedding, sequence                     |

Shards of a sequence are contiguous and equal: rank r of n holds rows r · T/n … (r + 1) · T/n − 1.
Letters: B batch, T rows, S = T/n rows of one rank, D model width, N vocabulary rows of one rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megameta.parallel.groups import TensorParallel


def all_reduce(x: Tensor, tp: TensorParallel, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The ranks' x reduced, as a new tensor on every rank. No gradient."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, group=tp.group)
    return x


def _all_gather(x_BSD: Tensor, tp: TensorParallel) -> Tensor:
    parts = x_BSD.new_empty(tp.size * x_BSD.shape[0], *x_BSD.shape[1:])  # gloo wants ranks along the first dimension
    dist.all_gather_into_tensor(parts, x_BSD.contiguous(), group=tp.group)
    return parts.unflatten(0, (tp.size, -1)).movedim(0, 1).flatten(1, 2)


def _reduce_scatter(x_BTD: Tensor, tp: TensorParallel) -> Tensor:
    parts = x_BTD.unflatten(1, (tp.size, -1)).movedim(1, 0).flatten(0, 1).contiguous()
    own_BSD = torch.empty_like(parts[: x_BTD.shape[0]])
    dist.reduce_scatter_tensor(own_BSD, parts, group=tp.group)
    return own_BSD


class _CopyToShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.tp), None


class _ReduceShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        return all_reduce(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _all_gather(x_BSD, tp)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad_BTD, ctx.tp), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _reduce_scatter(x_BTD, tp)

    @staticmethod
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad_BSD, ctx.tp), None


class _SplitSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x_BTD.chunk(tp.size, dim=1)[tp.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad_BSD, ctx.tp), None


def copy_to_shards(x: Tensor, tp: TensorParallel) -> Tensor:
    """x, the same on every rank, for work that differs by rank. Backward: the ranks' gradients are summed."""
    return _CopyToShards.apply(x, tp)


def reduce_shards(x: Tensor, tp: TensorParallel) -> Tensor:
    """The sum of the ranks' x. Backward: the gradient, the same on every rank, as it is."""
    return _ReduceShards.apply(x, tp)


def gather_sequence(x_BSD: Tensor, tp: TensorParallel) -> Tensor:
    """The whole sequence, for work that differs by rank. Backward: gradients are summed, and each rank takes its own
    rows."""
    return _GatherSequence.apply(x_BSD, tp)


def scatter_sequence(x_BTD: Tensor, tp: TensorParallel) -> Tensor:
    """Own rows of the sum of the ranks' x. Backward: the gradients of all rows."""
    return _ScatterSequence.apply(x_BTD, tp)


def split_sequence(x_BTD: Tensor, tp: TensorParallel) -> Tensor:
    """Own rows of x, which is the same on every rank. Backward: the gradients of all rows."""
    return _SplitSequence.apply(x_BTD, tp)
