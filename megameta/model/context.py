"""What a batch's tokens say about positions, documents and meta-tokens: computed once a batch, read by every block.

Letters: B batch, T rows of this pass, S rows that keys come from (T without a cache), M meta columns, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megameta.model.attention import Documents, Mask, Runs, find_runs, has_varlen
from megameta.model.cache import NOWHERE, DecodingCache
from megameta.model.config import ModelConfig
from megameta.model.rope import Rotation, rotation_at


class DocumentRuns(NamedTuple):
    """Runs of documents among the rows of a batch, and among its meta rows, where they are known beforehand."""

    rows: Runs
    meta: Runs | None

    def with_each(self, change: Callable[[Tensor], Tensor]) -> "DocumentRuns":
        """The same with a change made of the tensors: another device, page-locked memory."""
        meta = self.meta and Runs(change(self.meta.bounds_N), self.meta.longest)
        return DocumentRuns(Runs(change(self.rows.bounds_N), self.rows.longest), meta)


def find_document_runs(
    token_BT: Tensor, document_BT: Tensor, meta_token_id: int, num_meta_columns: int
) -> DocumentRuns:
    """For ``make_context``, from a batch that is still on the host."""
    is_meta_BT = token_BT == meta_token_id
    index_BM, is_real_BM = _meta_columns(is_meta_BT, is_meta_BT.sum(dim=1), num_meta_columns)
    document_BM = _documents_of(index_BM, is_real_BM, document_BT)
    return DocumentRuns(find_runs(document_BT), find_runs(document_BM) if index_BM.shape[1] else None)


@dataclass(frozen=True)
class MetaRows:
    """The meta rows of a batch, compactly: each sequence's in order, padded to the batch's largest number M."""

    index_R: Tensor
    """(B · M) int64 rows in the flattened (B · T); padding points at row 0 of its sequence."""
    is_real_BM: Tensor
    """Whether the column is a meta-token, not padding."""
    mask: Mask
    rotation: Rotation | None

    def take(self, x_BTD: Tensor, y_BTD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x, or its sum with y; the meta rows (B, M, D) of it). Who reads on in what is returned, and no longer in x,
        has both gradients added in a pass over the meta rows, in place of one over all rows."""
        if torch.compiler.is_compiling():  # which fuses the plain operations
            x_BTD = x_BTD if y_BTD is None else x_BTD + y_BTD
            rows_RD = x_BTD.flatten(0, 1).index_select(0, self.index_R)
        else:
            x_BTD, rows_RD = _SumAndRows.apply(x_BTD, y_BTD, self.index_R)
        return x_BTD, rows_RD.view(*self.is_real_BM.shape, x_BTD.shape[-1])

    def add_(self, x_BTD: Tensor, y_BMD: Tensor) -> Tensor:
        """x with y added at the meta rows, in place; every other row of x is untouched."""
        y_RD = y_BMD.masked_fill(~self.is_real_BM[..., None], 0).to(x_BTD.dtype).flatten(0, 1)
        if torch.compiler.is_compiling():
            return x_BTD.flatten(0, 1).index_add(0, self.index_R, y_RD).view_as(x_BTD)
        return _AddRows.apply(x_BTD, y_RD, self.index_R)


class _SumAndRows(torch.autograd.Function):
    """(x (B, T, D), y or None, index (R,)) to (x + y, its rows (R, D) at the index in the flattened (B · T))."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, y_BTD: Tensor | None, index_R: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index_R)
        ctx.dtypes = x_BTD.dtype, None if y_BTD is None else y_BTD.dtype
        sum_BTD = x_BTD.view_as(x_BTD) if y_BTD is None else x_BTD + y_BTD
        return sum_BTD, sum_BTD.flatten(0, 1).index_select(0, index_R)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor, grad_RD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        # Not in place: others may hold the gradient that came.
        (index_R,), (x_dtype, y_dtype) = ctx.saved_tensors, ctx.dtypes
        grad_BTD = grad_BTD.flatten(0, 1).index_add(0, index_R, grad_RD).view_as(grad_BTD)
        return grad_BTD.to(x_dtype), None if y_dtype is None else grad_BTD.to(y_dtype), None


class _AddRows(torch.autograd.Function):
    """(x (B, T, D), y (R, D), index (R,)) to x, with y added in place at the index in the flattened (B · T)."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, y_RD: Tensor, index_R: Tensor) -> Tensor:
        ctx.save_for_backward(index_R)
        ctx.mark_dirty(x_BTD)
        x_BTD.view(-1, x_BTD.shape[-1]).index_add_(0, index_R, y_RD)
        return x_BTD

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, Tensor, None]:
        (index_R,) = ctx.saved_tensors
        return grad_BTD, grad_BTD.flatten(0, 1).index_select(0, index_R), None


@dataclass(frozen=True)
class Context:
    """Passed to every block beside the hidden states."""

    is_meta_BT: Tensor
    position_BT: Tensor
    """(B or 1, T) int64, as the positional encodings count; 0 at meta-tokens under zero_meta_positions with rope."""
    mask: Mask
    rotation: Rotation | None
    meta: MetaRows | None


def make_context(
    config: ModelConfig,
    token_BT: Tensor,
    *,
    position_BT: Tensor | None = None,
    document_BT: Tensor | None = None,
    num_meta_columns: int | None = None,
    document_runs: DocumentRuns | None = None,
    cache: DecodingCache | None = None,
) -> Context:
    """Build the context of a batch; with a cache, account for its new rows there.

    Args:
        token_BT: int64 token ids.
        position_BT: positions, where they are not 0, 1, 2, … (document restarts, left padding); (B or 1, T).
        document_BT: int64 document of each row; attention, in both branches, stays inside one. Padding is a document.
            The rows of a document, padding apart, are neighbours.
        num_meta_columns: M, at least the largest number of meta-tokens in a sequence, where the caller knows it (saves
            a host synchronisation on a GPU). Fewer would drop meta-tokens.
        document_runs: of ``find_document_runs`` for this batch, where the caller has it (saves two more).
    """
    length = token_BT.shape[1]
    past = cache.length if cache is not None else 0
    order_T = torch.arange(length, device=token_BT.device) + past
    if position_BT is None:
        position_BT = order_T[None]
    is_meta_BT = token_BT == config.meta_token_id
    if config.zero_meta_positions and config.uses_rope:
        position_BT = position_BT.masked_fill(is_meta_BT, 0)
    key_document_BS = cache.extend_rows(document_BT, is_meta_BT) if cache is not None else document_BT
    query_document_BT = key_document_BS[:, -length:] if key_document_BS is not None else None
    seen_BTS = cache.seen_rows() if cache is not None else None
    if seen_BTS is not None:
        mask = Mask(causal=False, explicit_BTS=seen_BTS)
    elif past == 0 and query_document_BT is not None:
        mask = _inside_documents(query_document_BT.expand(token_BT.shape), document_runs and document_runs.rows)
    else:
        mask = _row_mask(order_T, past, query_document_BT, key_document_BS)
    meta = None
    if config.meta_attention:
        runs = document_runs and document_runs.meta
        meta = _meta_rows(config, is_meta_BT, position_BT, query_document_BT, order_T, num_meta_columns, runs, cache)
    return Context(
        is_meta_BT=is_meta_BT,
        position_BT=position_BT,
        mask=mask,
        rotation=_rotation(config, position_BT),
        meta=meta,
    )


def _rotation(config: ModelConfig, position_BT: Tensor) -> Rotation | None:
    return rotation_at(position_BT, config) if config.uses_rope else None


def _inside_documents(document_BT: Tensor, runs: Runs | None) -> Mask:
    if not document_BT.is_cuda or torch.compiler.is_compiling():  # of a whole model, which cannot wait for numbers
        return Mask(documents=Documents(document_BT, runs))
    return Mask(documents=Documents(document_BT, runs or find_runs(document_BT), has_varlen()))


def _row_mask(order_T: Tensor, past: int, document_BT: Tensor | None, document_BS: Tensor | None) -> Mask:
    """Of rows that come after ``past`` others, or that know no documents."""
    if document_BT is None or document_BS is None:
        if past == 0:
            return Mask(causal=True)
        if len(order_T) == 1:  # one new row sees all that came before
            return Mask(causal=False)
    order_S = torch.arange(past + len(order_T), device=order_T.device)
    allowed = (order_S[None, :] <= order_T[:, None])[None]
    if document_BT is not None and document_BS is not None:
        allowed = allowed & (document_BT[:, :, None] == document_BS[:, None, :])
    return Mask(causal=False, explicit_BTS=allowed)


def _meta_columns(is_meta_BT: Tensor, count_B: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """(places (B, M) of the meta-tokens in their order, 0 in columns of padding; whether a column is one)."""
    # A stable sort of "is not a meta-token" brings the meta rows to the front in their order.
    index_BM = torch.argsort(~is_meta_BT, dim=1, stable=True)[:, :num_columns]
    is_real_BM = torch.arange(index_BM.shape[1], device=index_BM.device) < count_B[:, None]
    return index_BM.masked_fill(~is_real_BM, 0), is_real_BM


def _documents_of(index_BM: Tensor, is_real_BM: Tensor, document_BT: Tensor) -> Tensor:
    """Documents of the meta rows; padding, which comes last, is one of its own."""
    document_BM = document_BT.expand(len(index_BM), -1).gather(1, index_BM)
    return document_BM.masked_fill(~is_real_BM, NOWHERE)


def _meta_rows(
    config: ModelConfig,
    is_meta_BT: Tensor,
    position_BT: Tensor,
    document_BT: Tensor | None,
    order_T: Tensor,
    num_columns: int | None,
    runs: Runs | None,
    cache: DecodingCache | None,
) -> MetaRows | None:
    batch, length = is_meta_BT.shape
    count_B = is_meta_BT.sum(dim=1)
    if num_columns is None:
        num_columns = int(count_B.max())
    num_columns = min(num_columns, length)  # a fixed number may exceed the rows of a decoding step
    if num_columns == 0:
        if not torch.is_grad_enabled():
            return None
        num_columns = 1  # one padding column: the branch's parameters get zero gradients, not none
    index_BM, is_real_BM = _meta_columns(is_meta_BT, count_B, num_columns)
    position_BM = position_BT.expand(batch, length).gather(1, index_BM)
    if cache is not None:
        order_BM = order_T[index_BM].masked_fill(~is_real_BM, NOWHERE)
        document_BM = torch.zeros_like(index_BM) if document_BT is None else document_BT.gather(1, index_BM)
        mask = Mask(causal=False, explicit_BTS=cache.extend_meta(order_BM, document_BM, index_BM))
    elif document_BT is None:
        mask = Mask(causal=True)  # columns are in order, and padding comes last
    else:
        mask = _inside_documents(_documents_of(index_BM, is_real_BM, document_BT), runs)
    offset_B1 = torch.arange(batch, device=index_BM.device)[:, None] * length
    return MetaRows((index_BM + offset_B1).flatten(), is_real_BM, mask, _rotation(config, position_BM))
