"""The training loss, and the scores of an evaluation, over a vocabulary that may be spread over ranks.

The fused loss comes straight from hidden states: logits exist for a few rows at a time, never for all of them
(B · T · N). While a chunk's logits are at hand its gradients are made too, and the backward pass only scales them: no
product is computed twice. From the forward to the backward pass are kept the gradients of the hidden states (R · D)
and of the output weight (N · D) in place of R · N log-probabilities. torch has the same since 2.13, and on a CPU its
code is used where this rank holds all of the vocabulary. It knows no vocabulary that is spread over ranks, and under
autocast to bf16 it returns the loss in bf16: ours does the rest.

Letters: R rows, C rows of a chunk, D model width, N entries of the vocabulary here (all V, or this rank's), P those
with padding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megameta.model import ModelConfig, cross_entropy_sum
from megameta.model.attention import product_dtype
from megameta.model.loss import IGNORE_INDEX
from megameta.parallel.collectives import all_reduce
from megameta.parallel.groups import TensorParallel
from megameta.parallel.tensor_parallel import vocabulary_multiple

#: Rows that a chunk has at least, by device: fewer would make thin matrix products, and the weight's gradient is read
#: and written once a chunk.
MIN_ROWS = {"cpu": 256, "cuda": 4096}


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
        top_R = all_reduce(top_R, tp, dist.ReduceOp.MAX)
    logits_RN.sub_(top_R[:, None])
    own_R = (label_R >= start) & (label_R < start + width)
    column_R1 = (label_R - start).masked_fill(~own_R, 0)[:, None]
    target_R = logits_RN.gather(1, column_R1)[:, 0].masked_fill(~own_R, 0) if width else torch.zeros_like(top_R)
    exp_RN = logits_RN.exp_()
    sums = torch.stack((exp_RN.sum(dim=1), target_R))
    total_R, target_R = sums if tp is None else all_reduce(sums, tp)
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
    best_BT = all_reduce(own_BT.clone(), tp, dist.ReduceOp.MAX)
    nobody = torch.iinfo(torch.int64).max
    return all_reduce(torch.where(own_BT == best_BT, token_BT + start, nobody), tp, dist.ReduceOp.MIN)


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


def row_multiple(device_type: str) -> int:
    """Products are made with a multiple of so many entries: rows of logits whose bytes do not divide by 16 take a GPU's
    slow kernels."""
    return 64 if device_type == "cuda" else 1


def chunk_rows(rows: int, width: int, entries: int, device_type: str) -> int:
    """Rows of a chunk: as many as make its logits about as large as all hidden states."""
    return min(rows, max(MIN_ROWS[device_type], rows * width // max(1, entries)))


def is_torchs(device_type: str, ranks: int) -> bool:
    """Whether it is torch's code that takes the loss, of a vocabulary over so many ranks."""
    return device_type == "cpu" and ranks == 1 and hasattr(F, "linear_cross_entropy")


def _torchs_cross_entropy_sum(x_RD: Tensor, weight_ND: Tensor, label_R: Tensor, rows: int) -> Tensor:
    # In the weight's dtype under autocast, too: for bf16 torch would make float32 copies, multiply those, and round.
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    with torch.autocast("cpu", enabled=False):
        return F.linear_cross_entropy(
            x_RD.to(weight_ND.dtype), weight_ND, label_R, reduction="sum", ignore_index=IGNORE_INDEX, options=options
        )


def loss_and_gradient(logits_CP: Tensor, label_C: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """``cross_entropy_and_gradient`` of a chunk as torch.compile likes it: two passes over the logits, nothing between.

    Args:
        logits_CP: from column ``entries`` on they are padding.

    Returns:
        The sum of the rows' cross-entropies, at least float32; its gradient (C, P) in the logits' dtype.
    """
    exact = torch.promote_types(logits_CP.dtype, torch.float32)
    column_P = torch.arange(logits_CP.shape[1], device=logits_CP.device)
    exact_CP = logits_CP.to(exact).masked_fill(column_P >= entries, -torch.inf)
    log_total_C = exact_CP.logsumexp(dim=1)
    valid_C = label_C != IGNORE_INDEX
    target_C = logits_CP.gather(1, label_C.masked_fill(~valid_C, 0)[:, None])[:, 0].to(exact)
    loss = (log_total_C - target_C).masked_fill(~valid_C, 0).sum()
    grad_CP = (exact_CP - log_total_C[:, None]).exp() - (column_P == label_C[:, None]).to(exact)
    return loss, grad_CP.masked_fill(~valid_C[:, None], 0).to(logits_CP.dtype)


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_ND: Tensor,
        label_R: Tensor,
        start: int,
        tp: TensorParallel | None,
        rows: int,
        compiled: Callable[..., tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        kind, exact = x_RD.device.type, torch.promote_types(x_RD.dtype, torch.float32)
        dtype = product_dtype(x_RD)
        entries = len(weight_ND)
        padding = -entries % row_multiple(kind)
        grad_x_RD = torch.empty_like(x_RD)
        grad_weight_PD = weight_ND.new_zeros(entries + padding, weight_ND.shape[1], dtype=exact)
        total = x_RD.new_zeros((), dtype=exact)
        with torch.autocast(kind, enabled=False):
            w_PD = F.pad(weight_ND.to(dtype), (0, 0, 0, padding)) if padding else weight_ND.to(dtype)
            for x_CD, label_C, grad_CD in zip(x_RD.split(rows), label_R.split(rows), grad_x_RD.split(rows)):
                x_CD = x_CD.to(dtype)
                # Logits, and in their place their gradient; in the columns of padding both are products with 0.
                chunk_CP = x_CD @ w_PD.t()
                if compiled is not None:
                    # Of a view torch.compile would look at the size of the whole, too, and compile anew for another.
                    loss, chunk_CP = compiled(chunk_CP, label_C.clone(), entries)
                else:
                    chunk_CP = chunk_CP.to(exact)
                    loss = cross_entropy_and_gradient(chunk_CP[:, :entries], label_C, start, tp)[0]
                    chunk_CP = chunk_CP.to(dtype)
                total += loss
                grad_CD.copy_(chunk_CP @ w_PD)
                _add_product(grad_weight_PD, chunk_CP.t(), x_CD)
                del chunk_CP  # or it would live beside the next chunk's
        ctx.save_for_backward(grad_x_RD, grad_weight_PD[:entries].to(weight_ND.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_RD, grad_weight_ND = ctx.saved_tensors
        return grad_x_RD.mul_(grad), grad_weight_ND.mul_(grad), *[None] * 5


def _add_product(sum_PD: Tensor, a_PC: Tensor, b_CD: Tensor) -> None:
    """Add a · b to a sum that may be in a longer dtype; a GPU then adds inside of the product."""
    if a_PC.dtype == sum_PD.dtype:
        sum_PD.addmm_(a_PC, b_CD)
    elif sum_PD.is_cuda:
        torch.addmm(sum_PD, a_PC, b_CD, out_dtype=sum_PD.dtype, out=sum_PD)
    else:
        sum_PD += a_PC @ b_CD


def fused_cross_entropy_sum(
    x_BTD: Tensor,
    weight_ND: Tensor,
    label_BT: Tensor,
    start: int = 0,
    tp: TensorParallel | None = None,
    entries: int | None = None,
    compiled: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """``cross_entropy_sum`` of the logits x · weightᵀ without holding them: a scalar in nats, at least float32.

    The gradient is made in the forward pass, so it is for training alone; a second backward pass is an error. Under
    autocast the products are made in its dtype (on a CPU, where it is torch's code, in the weight's), softmax and the
    sum over chunks in float32.

    Args:
        x_BTD: hidden states behind the final norm, in full on every rank.
        weight_ND: logical rows of the output weight that this rank holds; the first is entry ``start``.
        label_BT: in full on every rank.
        tp: where the vocabulary is spread over ranks: 3 · B · T numbers travel, as in ``vocabulary_cross_entropy_sum``,
            in two all-reduces a chunk. The gradient of x is then this rank's part of it.
        entries: N for the size of chunks. Ranks that hold different numbers of entries must name one, the same on all:
            they meet in every chunk.
        compiled: ``loss_and_gradient`` compiled; not used where the vocabulary is spread over ranks.
    """
    kind, x_RD, label_R = x_BTD.device.type, x_BTD.flatten(0, -2), label_BT.flatten()
    rows = chunk_rows(len(label_R), x_RD.shape[1], len(weight_ND) if entries is None else entries, kind)
    if is_torchs(kind, 1 if tp is None else tp.size):
        return _torchs_cross_entropy_sum(x_RD, weight_ND, label_R, rows)
    return _FusedCrossEntropy.apply(x_RD, weight_ND, label_R, start, tp, rows, compiled if tp is None else None)


def loss_function(config: ModelConfig, tp: TensorParallel | None) -> Callable[[Tensor, Tensor], Tensor]:
    """(logits, labels) to the sum of cross-entropies, for whole or vocabulary-sharded logits."""
    if tp is None:
        return cross_entropy_sum
    start = tp.rank * vocabulary_multiple(config, tp.size)
    return lambda logits_BTN, label_BT: vocabulary_cross_entropy_sum(logits_BTN, label_BT, start, tp)


def fused_loss_function(
    config: ModelConfig, tp: TensorParallel | None, compiled: Callable[..., Any] | None = None
) -> Callable[..., Tensor]:
    """(x, weight, label_BT) to the sum of cross-entropies, for the whole vocabulary or this rank's entries."""
    entries = vocabulary_multiple(config, tp.size if tp is not None else 1)
    start = tp.rank * entries if tp is not None else 0
    return partial(fused_cross_entropy_sum, start=start, tp=tp, entries=entries, compiled=compiled)


def score_function(config: ModelConfig, tp: TensorParallel | None) -> Callable[..., Tensor]:
    """(logits, labels, groups or None, their number G) to what an evaluation sums up, float64 (3 + G,): cross-entropies
    in nats, targets that are the most likely token, rows all of whose targets are; cross-entropies by group.

    A row whose targets are an answer and its end is one that greedy decoding would answer exactly: each step of it
    sees the answer's earlier tokens, as here.
    """
    loss = loss_function(config, tp)
    start = tp.rank * vocabulary_multiple(config, tp.size) if tp is not None else 0

    def score(logits_BTN: Tensor, label_BT: Tensor, group_BT: Tensor | None = None, num_groups: int = 0) -> Tensor:
        predicted_BT = logits_BTN.argmax(dim=-1) if tp is None else vocabulary_argmax(logits_BTN, start, tp)
        counts_BT = label_BT != IGNORE_INDEX
        right_BT = predicted_BT == label_BT
        exact_B = (right_BT | ~counts_BT).all(dim=1) & counts_BT.any(dim=1)
        sums = [loss(logits_BTN, label_BT), right_BT.sum(), exact_B.sum()]
        if group_BT is not None:
            members = [counts_BT & (group_BT == group) for group in range(num_groups)]  # the same on all of tp's ranks
            # a sum of no losses is left out: it would be a collective over nothing
            sums += [
                loss(logits_BTN[m_BT], label_BT[m_BT]) if m_BT.any() else sums[0].new_zeros(()) for m_BT in members
            ]
        return torch.stack([value.double() for value in sums])

    return score


def fused_score_function(config: ModelConfig, tp: TensorParallel | None) -> Callable[..., Tensor]:
    """``score_function`` from (x, weight) in place of logits, of which those of one sequence exist at a time."""
    score = score_function(config, tp)

    def score_sequences(
        x_BTD: Tensor, weight_ND: Tensor, label_BT: Tensor, group_BT: Tensor | None = None, num_groups: int = 0
    ) -> Tensor:
        groups = [None] * len(x_BTD) if group_BT is None else group_BT.split(1)
        rows = zip(x_BTD.split(1), label_BT.split(1), groups, strict=True)
        scores = [score(F.linear(x_1TD, weight_ND), label, group, num_groups) for x_1TD, label, group in rows]
        return torch.stack(scores).sum(dim=0)

    return score_sequences


def loss_functions(
    config: ModelConfig, tp: TensorParallel | None, *, fused: bool, compiled: Callable[..., Any] | None = None
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(cross-entropy, score) of logits, or where the loss is fused of (x, weight).

    Args:
        compiled: of ``fused_cross_entropy_sum``.
    """
    if fused:
        return fused_loss_function(config, tp, compiled), fused_score_function(config, tp)
    return loss_function(config, tp), score_function(config, tp)


def scaled(loss_sum: Tensor, scale: Tensor | float) -> Tensor:
    """The product in the loss's own type, which a scalar tensor of another type would change."""
    return loss_sum * (scale.to(loss_sum.dtype) if isinstance(scale, Tensor) else scale)
