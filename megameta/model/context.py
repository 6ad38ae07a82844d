"""What a batch's tokens say about positions, documents and meta-tokens: computed once a batch, read by every block.

Letters: B batch, T rows of this pass, S rows that keys come from (T without a cache), M meta columns, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megameta.model.cache import NOWHERE, DecodingCache, see_earlier
from megameta.model.config import ModelConfig
from megameta.model.rope import Rotation, rotation_at


@dataclass(frozen=True)
class Mask:
    """Who attends to whom. Without ``allowed_BTS``: everyone to all earlier rows if ``causal``, else to all rows."""

    causal: bool = True
    allowed_BTS: Tensor | None = None
    document_BT: Tensor | None = None
    """Documents of the rows where the mask is causal within documents and nothing else (varlen kernels use it)."""


@dataclass(frozen=True)
class MetaRows:
    """The meta rows of a batch, compactly: each sequence's in order, padded to the batch's largest number M."""

    index_R: Tensor
    """(B · M) int64 rows in the flattened (B · T); padding points at row 0 of its sequence."""
    is_real_BM: Tensor
    """Whether the column is a meta-token, not padding."""
    mask: Mask
    rotation: Rotation | None

    def gather(self, x_BTD: Tensor) -> Tensor:
        """The meta rows of x: (B, M, D)."""
        rows = x_BTD.flatten(0, 1).index_select(0, self.index_R)
        return rows.view(*self.is_real_BM.shape, x_BTD.shape[-1])

    def scatter_add(self, x_BTD: Tensor, y_BMD: Tensor) -> Tensor:
        """x with y added at the meta rows; every other row of x is untouched."""
        y_BMD = torch.where(self.is_real_BM[..., None], y_BMD, 0).to(x_BTD.dtype)
        return x_BTD.flatten(0, 1).index_add(0, self.index_R, y_BMD.flatten(0, 1)).view_as(x_BTD)


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
        mask = Mask(causal=False, allowed_BTS=seen_BTS)
    else:
        mask = _row_mask(order_T, past, query_document_BT, key_document_BS)
    meta = None
    if config.meta_attention:
        meta = _meta_rows(config, is_meta_BT, position_BT, query_document_BT, order_T, num_meta_columns, cache)
    return Context(
        is_meta_BT=is_meta_BT,
        position_BT=position_BT,
        mask=mask,
        rotation=_rotation(config, position_BT),
        meta=meta,
    )


def _rotation(config: ModelConfig, position_BT: Tensor) -> Rotation | None:
    return rotation_at(position_BT, config) if config.uses_rope else None


def _row_mask(order_T: Tensor, past: int, document_BT: Tensor | None, document_BS: Tensor | None) -> Mask:
    if document_BT is None or document_BS is None:
        if past == 0:
            return Mask(causal=True)
        if len(order_T) == 1:  # one new row sees all that came before
            return Mask(causal=False)
    order_S = torch.arange(past + len(order_T), device=order_T.device)
    allowed = (order_S[None, :] <= order_T[:, None])[None]
    if document_BT is not None and document_BS is not None:
        allowed = allowed & (document_BT[:, :, None] == document_BS[:, None, :])
    return Mask(causal=False, allowed_BTS=allowed, document_BT=document_BT if past == 0 else None)


def _meta_rows(
    config: ModelConfig,
    is_meta_BT: Tensor,
    position_BT: Tensor,
    document_BT: Tensor | None,
    order_T: Tensor,
    num_columns: int | None,
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
    # A stable sort of "is not a meta-token" brings the meta rows to the front in their order.
    index_BM = torch.argsort(~is_meta_BT, dim=1, stable=True)[:, :num_columns]
    is_real_BM = torch.arange(num_columns, device=index_BM.device) < count_B[:, None]
    index_BM = index_BM.masked_fill(~is_real_BM, 0)
    order_BM = order_T[index_BM].masked_fill(~is_real_BM, NOWHERE)
    position_BM = position_BT.expand(batch, length).gather(1, index_BM)
    document_BM = torch.zeros_like(index_BM) if document_BT is None else document_BT.gather(1, index_BM)
    if cache is None and document_BT is None:
        mask = Mask(causal=True)  # columns are in order, and padding comes last
    else:
        if cache is not None:
            allowed = cache.extend_meta(order_BM, document_BM, index_BM)
        else:
            allowed = see_earlier(order_BM, document_BM, order_BM, document_BM)
        mask = Mask(causal=False, allowed_BTS=allowed, document_BT=None)
    offset_B1 = torch.arange(batch, device=index_BM.device)[:, None] * length
    return MetaRows((index_BM + offset_B1).flatten(), is_real_BM, mask, _rotation(config, position_BM))
