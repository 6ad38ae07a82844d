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

    def extend_rows(self, document_BT: Tensor | None, num_new: int, batch: int) -> Tensor | None:
        """Account for ``num_new`` new rows; return the documents of all rows (B, S), None while there is but one."""
        if document_BT is not None and self.document_BS is None:
            self.document_BS = document_BT.new_zeros(batch, self.length)
        if self.document_BS is not None:
            if document_BT is None:
                document_BT = self.document_BS.new_zeros(batch, num_new)
            self.document_BS = torch.cat((self.document_BS, document_BT), dim=1)
        self.length += num_new
        return self.document_BS

    def extend_meta(self, order_BM: Tensor, document_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Append the order and document of new meta columns; return those of all columns."""
        if self.meta_order_BM is not None and self.meta_document_BM is not None:
            order_BM = torch.cat((self.meta_order_BM, order_BM), dim=1)
            document_BM = torch.cat((self.meta_document_BM, document_BM), dim=1)
        self.meta_order_BM, self.meta_document_BM = order_BM, document_BM
        return order_BM, document_BM

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


def _append(layers: list[tuple[Tensor, Tensor]], layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if layer == len(layers):
        layers.append((k, v))
    else:
        old_k, old_v = layers[layer]
        layers[layer] = (torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2))
    return layers[layer]
