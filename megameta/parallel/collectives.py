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

from megameta.model.loss import IGNORE_INDEX
from megameta.parallel.groups import TensorParallel


def _all_reduce(x: Tensor, tp: TensorParallel, op: Any = dist.ReduceOp.SUM) -> Tensor:
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
        return _all_reduce(grad, ctx.tp), None


class _ReduceShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        return _all_reduce(x, tp)

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


def cross_entropy_and_gradient(
    logits_RN: Tensor, label_R: Tensor, start: int, tp: TensorParallel | None
) -> tuple[Tensor, Tensor]:
    """The sum of the rows' cross-entropies, and its gradient (R, N), which takes the place of the logits.

    Args:
        logits_RN: at least float32; they are overwritten. With ``tp`` this rank's columns, else all of them.
        start: entry of the vocabulary in the first column.
    """
    width = logits_RN.shape[1]
    # A rank may hold nothing but padding rows of the vocabulary.
    top_R = logits_RN.amax(dim=1) if width else logits_RN.new_full(label_R.shape, -torch.inf)
    if tp is not None:
        top_R = _all_reduce(top_R, tp, dist.ReduceOp.MAX)
    logits_RN.sub_(top_R[:, None])
    own_R = (label_R >= start) & (label_R < start + width)
    column_R1 = (label_R - start).masked_fill(~own_R, 0)[:, None]
    target_R = logits_RN.gather(1, column_R1)[:, 0].masked_fill(~own_R, 0) if width else torch.zeros_like(top_R)
    exp_RN = logits_RN.exp_()
    sums = torch.stack((exp_RN.sum(dim=1), target_R))
    total_R, target_R = sums if tp is None else _all_reduce(sums, tp)
    valid_R = label_R != IGNORE_INDEX
    # not a product with valid_R: a row without a target may hold anything, and 0 · inf is not 0
    loss = (total_R.log() - target_R).masked_fill(~valid_R, 0).sum()
    grad_RN = exp_RN.div_(total_R.masked_fill(~valid_R, torch.inf)[:, None])
    if width:
        grad_RN.scatter_add_(1, column_R1, -own_R[:, None].to(grad_RN.dtype))
    return loss, grad_RN


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_RN: Tensor, label_R: Tensor, start: int, tp: TensorParallel) -> Tensor:
        exact = torch.promote_types(logits_RN.dtype, torch.float32)
        loss, grad_RN = cross_entropy_and_gradient(logits_RN.to(exact, copy=True), label_R, start, tp)
        ctx.save_for_backward(grad_RN)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0].mul_(grad), None, None, None


def vocabulary_argmax(logits_BTN: Tensor, start: int, tp: TensorParallel) -> Tensor:
    """The most likely token, of the first of equals, where the logits' columns are spread over the ranks: (B, T) int64,
    the same on every rank. Two numbers a position travel. No gradient.

    Args: as of ``vocabulary_cross_entropy_sum``.
    """
    shape, width = logits_BTN.shape[:-1], logits_BTN.shape[-1]
    exact = torch.promote_types(logits_BTN.dtype, torch.float32)  # gloo does not reduce all of the shorter types
    own_BT = logits_BTN.new_full(shape, -torch.inf, dtype=exact)
    token_BT = torch.zeros(shape, dtype=torch.int64, device=logits_BTN.device)
    if width:  # a rank may hold nothing but padding rows of the vocabulary
        top, token_BT = logits_BTN.max(dim=-1)
        own_BT = top.to(exact)
    best_BT = _all_reduce(own_BT.clone(), tp, dist.ReduceOp.MAX)
    nobody = torch.iinfo(torch.int64).max
    return _all_reduce(torch.where(own_BT == best_BT, token_BT + start, nobody), tp, dist.ReduceOp.MIN)


def vocabulary_cross_entropy_sum(logits_BTN: Tensor, label_BT: Tensor, start: int, tp: TensorParallel) -> Tensor:
    """``cross_entropy_sum`` of logits whose columns are spread over the ranks, never gathered: B · T numbers travel for
    the largest logit, and twice as many for the sum of exponentials and the label's logit (Megatron-LM's form).

    Args:
        logits_BTN: this rank's columns; the first is entry ``start`` of the vocabulary.
        label_BT: in full on every rank.

    Returns:
        The same scalar on every rank, in nats. Backward: each rank gets the gradient of its own columns.
    """
    return _VocabularyCrossEntropy.apply(logits_BTN.flatten(0, -2), label_BT.flatten(), start, tp)
