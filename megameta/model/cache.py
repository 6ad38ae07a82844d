"""Keys and values kept while decoding: every row for causal attention, meta rows alone for the meta branch."""

import torch
from torch import Tensor

#: Order of a row that stands for nothing (padding of a ragged batch of meta rows): later than any real row.
NOWHERE = torch.iinfo(torch.int64).max


class DecodingCache:
    """Grows by the rows of each forward pass.

    Letters: B batch, G key–value heads, S rows so far, M meta columns so far (rows of a batch that got no meta-token in
    a pass hold a padding column, whose order is ``NOWHERE``), K head width.
    """

    def __init__(self) -> None:
        self.length = 0
        self.causal: list[tuple[Tensor, Tensor]] = []  # one a layer: keys and values (B, G, S, K)
        self.meta: list[tuple[Tensor, Tensor]] = []  # one a layer with the branch: keys and values (B, G, M, K)
        self.document_BS: Tensor | None = None
        self.meta_order_BM: Tensor | None = None
        self.meta_document_BM: Tensor | None = None

    def update_causal(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values; return all of them."""
        return _append(self.causal, layer, k_BGTK, v_BGTK)

    def update_meta(self, layer: int, k_BGMK: Tensor, v_BGMK: Tensor) -> tuple[Tensor, Tensor]:
        """As ``update_causal``, for the meta branch; ``layer`` counts the layers that have it."""
        return _append(self.meta, layer, k_BGMK, v_BGMK)

    def extend_rows(self, document_BT: Tensor | None, is_meta_BT: Tensor) -> Tensor | None:
        """Account for new rows; return the documents of all rows (B, S), None while there is but one.

        Those of the new rows, the last ones, are enough where ``seen_rows`` says what is seen.
        """
        batch, num_new = is_meta_BT.shape
        if document_BT is not None and self.document_BS is None:
            self.document_BS = document_BT.new_zeros(batch, self.length)
        if self.document_BS is not None:
            if document_BT is None:
                document_BT = self.document_BS.new_zeros(batch, num_new)
            self.document_BS = torch.cat((self.document_BS, document_BT), dim=1)
        self.length += num_new
        return self.document_BS

    def seen_rows(self) -> Tensor | None:
        """Which rows each new row sees, bool (B, T, S), where a cache drops rows; None: all earlier ones of its
        document."""
        return None

    def extend_meta(self, order_BM: Tensor, document_BM: Tensor, index_BM: Tensor) -> Tensor:
        """Append new meta columns; return which columns each of them sees, bool (B, new, all).

        Args:
            index_BM: their places among the new rows.
        """
        key_order, key_document = order_BM, document_BM
        if self.meta_order_BM is not None and self.meta_document_BM is not None:
            key_order = torch.cat((self.meta_order_BM, order_BM), dim=1)
            key_document = torch.cat((self.meta_document_BM, document_BM), dim=1)
        self.meta_order_BM, self.meta_document_BM = key_order, key_document
        return see_earlier(order_BM, document_BM, key_order, key_document)

    def allocated_bytes(self) -> int:
        """Bytes of the storages behind keys and values: of what is held, not of what is looked at."""
        tensors = [x for layers in (self.causal, self.meta) for pair in layers for x in pair]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    def select(self, index_B: Tensor) -> None:
        """Keep, repeat or reorder sequences of the batch (beam search)."""

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, index_B.to(x.device))

        for layers in (self.causal, self.meta):
            layers[:] = [(k.index_select(0, index_B), v.index_select(0, index_B)) for k, v in layers]
        self.document_BS = pick(self.document_BS)
        self.meta_order_BM = pick(self.meta_order_BM)
        self.meta_document_BM = pick(self.meta_document_BM)

    def crop(self, length: int) -> None:
        """Forget all rows from ``length`` on."""
        self.length = min(self.length, length)
        self.causal = [(k[:, :, :length], v[:, :, :length]) for k, v in self.causal]
        if self.document_BS is not None:
            self.document_BS = self.document_BS[:, :length]
        if self.meta_order_BM is not None:  # a forgotten meta row becomes a padding column
            self.meta_order_BM = self.meta_order_BM.masked_fill(self.meta_order_BM >= length, NOWHERE)


def see_earlier(order_BT: Tensor, document_BT: Tensor, order_BS: Tensor, document_BS: Tensor) -> Tensor:
    """Whether rows T see rows S: those whose order is not later and whose document is the same. Bool (B, T, S).

    Padding columns share an order and, per sequence, a document, so that no row is left without a key.
    """
    return (order_BS[:, None, :] <= order_BT[:, :, None]) & (document_BS[:, None, :] == document_BT[:, :, None])


def _append(layers: list[tuple[Tensor, Tensor]], layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if layer == len(layers):
        layers.append((k, v))
    else:
        old_k, old_v = layers[layer]
        layers[layer] = (torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2))
    return layers[layer]
