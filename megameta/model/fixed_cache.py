"""A decoding cache of fixed size: no shape in it changes while decoding, so that a step can be compiled once.

Letters: B batch, T rows of this pass, M meta columns of this pass, S rows that there is room for, R meta rows that
there is room for, G key–value heads, K head width.
"""

import torch
from torch import Tensor

from megameta.model.cache import NOWHERE, DecodingCache, see_earlier

#: Sizes are rounded up to multiples of this, so that fewer of them occur (each is compiled anew).
ROOM = 64


class FixedCache(DecodingCache):
    """Keys and values are written by index into tensors that the first pass, which should run eagerly, allocates.

    Its meta rows stand side by side in each sequence, those of the first pass and as many more as rows can follow: R is
    no guess and cannot be exceeded. Rows beyond S raise torch's error of an index out of range.

    Args:
        max_rows: S, rounded up to a multiple of ``ROOM``.
        num_meta_layers: layers that have the branch.
    """

    #: Rows so far; a number before the first pass, then a tensor of one number, which a compiled step can count up.
    length: int | Tensor  # type: ignore[assignment]

    def __init__(self, max_rows: int, num_meta_layers: int) -> None:
        super().__init__()
        self.max_rows = _rounded(max_rows)
        self.num_meta_layers = num_meta_layers
        self.max_meta_rows = 0  # R; the first pass settles it
        self.document_BS: Tensor
        self.meta_order_BM: Tensor  # R columns, and one that takes the padding of ragged batches
        self.meta_document_BM: Tensor
        self._meta_count_B: Tensor
        self._row_T: Tensor
        self._slot_BM: Tensor
        self._seen_BTS: Tensor | None = None

    def extend_rows(self, document_BT: Tensor | None, is_meta_BT: Tensor) -> Tensor | None:
        """Account for new rows; return their documents, in the first pass None while there is but one."""
        new_BT = document_BT if document_BT is not None else torch.zeros_like(is_meta_BT, dtype=torch.int64)
        num_new = is_meta_BT.shape[1]
        is_first = not isinstance(self.length, Tensor)
        if is_first:
            self._allocate(is_meta_BT)
        self._row_T = torch.arange(num_new, device=is_meta_BT.device) + self.length
        self.document_BS.index_copy_(1, self._row_T, new_BT)
        self.length += num_new
        if is_first:
            return document_BT  # the rows of this pass see each other alone, as without a cache
        row_S = torch.arange(self.max_rows, device=is_meta_BT.device)
        earlier_TS = row_S[None, :] <= self._row_T[:, None]
        self._seen_BTS = earlier_TS[None] & (new_BT[:, :, None] == self.document_BS[:, None, :])
        return new_BT

    def _allocate(self, is_meta_BT: Tensor) -> None:
        batch, num_new = is_meta_BT.shape
        device = is_meta_BT.device
        if self.num_meta_layers:
            self.max_meta_rows = _rounded(int(is_meta_BT.sum(dim=1).max()) + max(0, self.max_rows - num_new))
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        self.document_BS = torch.zeros((batch, self.max_rows), dtype=torch.int64, device=device)
        shape = (batch, self.max_meta_rows + 1)
        self.meta_order_BM = torch.full(shape, NOWHERE, device=device)
        self.meta_document_BM = torch.zeros(shape, dtype=torch.int64, device=device)
        self._meta_count_B = torch.zeros(batch, dtype=torch.int64, device=device)
        for x in (self.length, self.document_BS, self.meta_order_BM, self.meta_document_BM, self._meta_count_B):
            _stay(x)

    def seen_rows(self) -> Tensor | None:
        """Which of S each new row sees, bool (B, T, S); None in the first pass."""
        return self._seen_BTS

    def update_causal(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values; return all S, in the first pass the new ones."""
        is_first = layer == len(self.causal)
        if is_first:
            self.causal.append(_room(k_BGTK, v_BGTK, self.max_rows))
        if not self.meta:  # here, because the first meta-token may come in a compiled step
            self.meta = [_room(k_BGTK, v_BGTK, self.max_meta_rows + 1) for _ in range(self.num_meta_layers)]
        keys, values = self.causal[layer]
        keys.index_copy_(2, self._row_T, k_BGTK)
        values.index_copy_(2, self._row_T, v_BGTK)
        return (k_BGTK, v_BGTK) if is_first else (keys, values)

    def extend_meta(self, order_BM: Tensor, document_BM: Tensor, index_BM: Tensor) -> Tensor:
        """Find places for new meta columns; return which of all each of them sees, bool (B, new, R + 1)."""
        is_real_BM = order_BM != NOWHERE
        next_BM = self._meta_count_B[:, None] + torch.arange(order_BM.shape[1], device=order_BM.device)
        self._slot_BM = torch.where(is_real_BM, next_BM, self.max_meta_rows)
        self.meta_order_BM.scatter_(1, self._slot_BM, order_BM)
        self.meta_document_BM.scatter_(1, self._slot_BM, document_BM)
        self._meta_count_B += is_real_BM.sum(dim=1)
        return see_earlier(order_BM, document_BM, self.meta_order_BM, self.meta_document_BM)

    def update_meta(self, layer: int, k_BGMK: Tensor, v_BGMK: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values of the meta branch; return all R + 1."""
        keys, values = self.meta[layer]
        keys.scatter_(2, self._slot_BM[:, None, :, None].expand_as(k_BGMK), k_BGMK)
        values.scatter_(2, self._slot_BM[:, None, :, None].expand_as(v_BGMK), v_BGMK)
        return keys, values

    def select(self, index_B: Tensor) -> None:
        """Keep, repeat or reorder sequences of the batch (beam search)."""
        super().select(index_B)
        self._meta_count_B = self._meta_count_B.index_select(0, index_B)

    def crop(self, length: int) -> None:
        """Keeps all rows or raises ValueError: a cache of fixed size does not go back."""
        if length < int(self.length):
            raise ValueError(
                "a cache of fixed size cannot go back: assisted and speculative generation need one that grows"
                " (leave cache_implementation unset)"
            )


def _rounded(size: int) -> int:
    return -(-size // ROOM) * ROOM


def _room(k_BGTK: Tensor, v_BGTK: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Zeros for ``size`` keys and values of these heads: what is not written yet is masked, but must be finite."""
    batch, heads, _, width = k_BGTK.shape
    return tuple(_stay(x.new_zeros(batch, heads, size, width)) for x in (k_BGTK, v_BGTK))  # type: ignore[return-value]


def _stay(x: Tensor) -> Tensor:
    """Tell the compiler that x is written in place at one address; CUDA graphs are not used otherwise."""
    if x.is_cuda and not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
    return x
