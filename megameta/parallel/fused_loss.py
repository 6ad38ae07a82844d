"""Cross-entropy straight from hidden states: logits exist for a few rows at a time, never for all of them (B · T · N).

While a chunk's logits are at hand its gradients are made too, and the backward pass only scales them: no product is
computed twice. From the forward to the backward pass are kept the gradients of the hidden states (R · D) and of the
output weight (N · D) in place of R · N log-probabilities.

Letters: R rows, C rows of a chunk, D model width, N entries of the vocabulary here (all V, or this rank's), P those
with padding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megameta.model.attention import product_dtype
from megameta.parallel.collectives import cross_entropy_and_gradient
from megameta.parallel.groups import TensorParallel

#: A chunk has at least as many rows: less would make thin matrix products, and the weight's gradient is read and
#: written once a chunk.
MIN_ROWS = 256


def row_multiple(device_type: str) -> int:
    """Products are made with a multiple of so many entries: rows of logits whose bytes do not divide by 16 take a GPU's
    slow kernels."""
    return 64 if device_type == "cuda" else 1


def chunk_rows(rows: int, width: int, entries: int) -> int:
    """Rows of a chunk: as many as make its logits about as large as all hidden states."""
    return min(rows, max(MIN_ROWS, rows * width // max(1, entries)))


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weight_ND: Tensor, label_R: Tensor, start: int, tp: TensorParallel | None, rows: int
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
                chunk_CP = (x_CD @ w_PD.t()).to(exact)
                total += cross_entropy_and_gradient(chunk_CP[:, :entries], label_C, start, tp)[0]
                chunk_CP = chunk_CP.to(dtype)
                grad_CD.copy_(chunk_CP @ w_PD)
                if dtype == exact:
                    grad_weight_PD.addmm_(chunk_CP.t(), x_CD)
                else:
                    grad_weight_PD += chunk_CP.t() @ x_CD
                del chunk_CP  # or it would live beside the next chunk's
        ctx.save_for_backward(grad_x_RD, grad_weight_PD[:entries].to(weight_ND.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_x_RD, grad_weight_ND = ctx.saved_tensors
        return grad_x_RD.mul_(grad), grad_weight_ND.mul_(grad), None, None, None, None


def fused_cross_entropy_sum(
    x_BTD: Tensor,
    weight_ND: Tensor,
    label_BT: Tensor,
    start: int = 0,
    tp: TensorParallel | None = None,
    entries: int | None = None,
) -> Tensor:
    """``cross_entropy_sum`` of the logits x · weightᵀ without holding them: a scalar in nats, at least float32.

    The gradient is made in the forward pass, so it is for training alone; a second backward pass is an error. Under
    autocast the products are made in its dtype, softmax and the sum over chunks in float32.

    Args:
        x_BTD: hidden states behind the final norm, in full on every rank.
        weight_ND: logical rows of the output weight that this rank holds; the first is entry ``start``.
        label_BT: in full on every rank.
        tp: where the vocabulary is spread over ranks: 3 · B · T numbers travel, as in ``vocabulary_cross_entropy_sum``,
            in two all-reduces a chunk. The gradient of x is then this rank's part of it.
        entries: N for the size of chunks. Ranks that hold different numbers of entries must name one, the same on all:
            they meet in every chunk.
    """
    rows = chunk_rows(label_BT.numel(), x_BTD.shape[-1], len(weight_ND) if entries is None else entries)
    return _FusedCrossEntropy.apply(x_BTD.flatten(0, -2), weight_ND, label_BT.flatten(), start, tp, rows)
