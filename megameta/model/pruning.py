"""A decoding cache that keeps few rows: the newest, the first, and those that a rule picks (meta-tokens).

A row's *rank* is the number of rows of its document before it; padding does not count. The row of rank t sees an
earlier row of its document, of rank s, where s is one of the last W (t − s < W), or one of the first (s < sinks), or
pinned. Rows that no later row can see are dropped from both branches, and their memory is freed, layer by layer while
a pass runs. A pass over many rows computes what as many passes over one row would: the rule is applied to every row of
it, not to the pass.

Letters: B batch, T rows of this pass, S rows of the cache and of this pass, N rows of either branch, C columns kept,
G key–value heads, K head width.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megameta.model.cache import NOWHERE, DecodingCache, see_earlier


@dataclass(frozen=True)
class KeepRule:
    """Which rows a cache keeps.

    Attributes:
        window: W, the newest rows, the row that looks among them; 1 or more.
        sinks: first rows of a document ("attention sinks", Xiao et al. 2024, who number positions inside the cache;
            here kept rows stay where they were).
        pinned: which others stay for ever: meta-tokens, none, or random ones.
        share: random: the probability of a row to stay; a function of (seed, row of the batch, rank).

    Raises:
        ValueError: a number outside its range.
    """

    window: int
    sinks: int = 4
    pinned: Literal["meta", "none", "random"] = "meta"
    share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0 or not 0 <= self.share <= 1:
            raise ValueError(
                f"window={self.window} must be 1 or more, sinks={self.sinks} 0 or more, share={self.share} from 0 to 1"
            )
        if self.pinned not in ("meta", "none", "random"):
            raise ValueError(f"pinned={self.pinned!r} is not one of 'meta', 'none', 'random'")

    def pins(self, is_meta_BT: Tensor, rank_BT: Tensor) -> Tensor:
        """Rows that stay whatever their age: bool (B, T)."""
        if self.pinned == "meta":
            return is_meta_BT
        if self.pinned == "none":
            return torch.zeros_like(is_meta_BT)
        row_B1 = torch.arange(len(rank_BT), device=rank_BT.device)[:, None]
        x_BT = _mix(_mix(row_B1 + _mix(torch.full_like(row_B1, self.seed))) + rank_BT)
        return x_BT < self.share * 2**32

    def reaches(self, rank_BT: Tensor, key_rank_BS: Tensor, key_pinned_BS: Tensor) -> Tensor:
        """Whether a row of that rank sees a row of its document, later ones aside: bool (B, T, S)."""
        recent_BTS = rank_BT[:, :, None] - key_rank_BS[:, None, :] < self.window
        return recent_BTS | (key_pinned_BS | (key_rank_BS < self.sinks))[:, None, :]


def _mix(x: Tensor) -> Tensor:
    """A hash of 32 bits in int64 (a multiplicative finaliser; products stay below 2^63)."""
    for factor in (0x45D9F3B, 0x45D9F3B):
        x = x & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


class Rows(NamedTuple):
    """What masks need to know of rows, each (B, N)."""

    order_BN: Tensor
    """int64 place in the sequence; NOWHERE: a padding column."""
    document_BN: Tensor
    """int64; below 0: padding of the batch."""
    rank_BN: Tensor
    pinned_BN: Tensor

    def pick(self, index_BC: Tensor, is_real_BC: Tensor) -> "Rows":
        """Columns by index; those that are not real become padding columns."""
        order, *rest = (x.gather(1, index_BC) for x in self)
        return Rows(order.masked_fill(~is_real_BC, NOWHERE), *rest)

    def join(self, others: "Rows") -> "Rows":
        """These and the others behind them."""
        return Rows(*(torch.cat(pair, dim=1) for pair in zip(self, others)))


@dataclass(frozen=True)
class _Columns:
    """Columns of a cache that stay, each sequence's own, padded to the batch's largest number C."""

    index_BC: Tensor

    def of(self, x_BGSK: Tensor) -> Tensor:
        """A new tensor of these columns: (B, G, C, K)."""
        shape = (x_BGSK.shape[0], x_BGSK.shape[1], self.index_BC.shape[1], x_BGSK.shape[3])
        return x_BGSK.gather(2, self.index_BC[:, None, :, None].expand(shape))


class PruningCache(DecodingCache):
    """A cache that drops the rows that its rule drops. ``length`` counts the dropped ones, too."""

    def __init__(self, rule: KeepRule) -> None:
        super().__init__()
        self.rule = rule
        self.rows: Rows | None = None
        self.meta_rows: Rows | None = None
        self.lost = False
        """Whether a row was dropped that was no padding: then the cache cannot go back (``crop``)."""
        self._new: Rows  # the rows of the pass that is running
        self._seen_BTS: Tensor | None = None
        self._columns: _Columns | None = None
        self._meta_columns: _Columns | None = None
        #: The document that each sequence is in (−1: none yet), and how many rows of it came so far, (B,) each.
        self._last: tuple[Tensor, Tensor] | None = None

    def extend_rows(self, document_BT: Tensor | None, is_meta_BT: Tensor) -> Tensor:
        """As in the cache that grows; settles, too, what the rows of this pass see and which rows stay after it."""
        batch, length = is_meta_BT.shape
        if document_BT is None:
            document_BT = torch.zeros_like(is_meta_BT, dtype=torch.int64)
        order_BT = torch.arange(self.length, self.length + length, device=is_meta_BT.device).expand(batch, length)
        rank_BT = self._ranks(document_BT)
        new = Rows(order_BT, document_BT, rank_BT, self.rule.pins(is_meta_BT, rank_BT))
        rows = new if self.rows is None else self.rows.join(new)
        self.length += length
        self._enter_last(new)
        self._new, self._seen_BTS = new, self._seen(new, rows)
        self.rows, self._columns = self._drop(rows)
        if self.meta_rows is not None and not bool(is_meta_BT.any()):  # no row of this pass looks at these
            self.meta_rows, columns = self._drop(self.meta_rows)
            if columns is not None:
                self.meta = [(columns.of(k), columns.of(v)) for k, v in self.meta]
        return rows.document_BN

    def seen_rows(self) -> Tensor | None:
        """Which rows of cache and pass each row of the pass sees: bool (B, T, S)."""
        return self._seen_BTS

    def update_causal(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values, return all of them, and keep those that stay."""
        both = super().update_causal(layer, k_BGTK, v_BGTK)
        if self._columns is not None:
            self.causal[layer] = (self._columns.of(both[0]), self._columns.of(both[1]))
        return both

    def extend_meta(self, order_BM: Tensor, document_BM: Tensor, index_BM: Tensor) -> Tensor:
        """As in the cache that grows."""
        new = self._new.pick(index_BM, order_BM != NOWHERE)
        rows = new if self.meta_rows is None else self.meta_rows.join(new)
        self.meta_rows, self._meta_columns = self._drop(rows)
        return self._seen(new, rows)

    def update_meta(self, layer: int, k_BGMK: Tensor, v_BGMK: Tensor) -> tuple[Tensor, Tensor]:
        """As ``update_causal``, for the meta branch."""
        both = super().update_meta(layer, k_BGMK, v_BGMK)
        if self._meta_columns is not None:
            self.meta[layer] = (self._meta_columns.of(both[0]), self._meta_columns.of(both[1]))
        return both

    def select(self, index_B: Tensor) -> None:
        """Keep, repeat or reorder sequences of the batch (beam search)."""

        def pick(rows: Rows | None) -> Rows | None:
            return None if rows is None else Rows(*(x.index_select(0, index_B.to(x.device)) for x in rows))

        super().select(index_B)
        self.rows, self.meta_rows = pick(self.rows), pick(self.meta_rows)
        if self._last is not None:
            self._last = (self._last[0].index_select(0, index_B), self._last[1].index_select(0, index_B))

    def crop(self, length: int) -> None:
        """Forget all rows from ``length`` on.

        Raises:
            ValueError: the window would reach rows that were dropped.
        """
        if length >= self.length or self.rows is None:
            return
        if self.lost and length > 0:
            raise ValueError(
                "this cache has dropped rows, so it cannot go back: assisted and speculative generation need a cache"
                " that keeps all rows (pass no past_key_values)"
            )
        self.length, self.lost, self._last = length, False, None
        if length == 0:
            self.rows, self.meta_rows, self.causal, self.meta = None, None, [], []
            return
        self.rows, columns = _keep(self.rows, self.rows.order_BN < length)
        if columns is not None:
            self.causal = [(columns.of(k), columns.of(v)) for k, v in self.causal]
        if self.meta_rows is not None:
            self.meta_rows, columns = _keep(self.meta_rows, self.meta_rows.order_BN < length)
            if columns is not None:
                self.meta = [(columns.of(k), columns.of(v)) for k, v in self.meta]
        self._enter_last(self.rows)

    def _ranks(self, document_BT: Tensor) -> Tensor:
        """Rows of the same document before each new row; those that came in earlier passes count."""
        same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
        rank_BT = same_BTT.tril(-1).sum(dim=2)
        if self._last is None:
            return rank_BT
        document_B, count_B = self._last
        return rank_BT + torch.where(document_BT == document_B[:, None], count_B[:, None], 0)

    def _enter_last(self, rows: Rows) -> None:
        """Note the document of each sequence's last row that is not padding, and how many rows of it there are."""
        is_real_BN = (rows.document_BN >= 0) & (rows.order_BN != NOWHERE)
        # The last real column; rows are in order.
        column_B1 = (is_real_BN * torch.arange(1, is_real_BN.shape[1] + 1, device=is_real_BN.device)).argmax(1)[:, None]
        found_B = is_real_BN.any(dim=1)
        document_B, rank_B = (x.gather(1, column_B1)[:, 0] for x in (rows.document_BN, rows.rank_BN))
        old = self._last or (torch.full_like(document_B, -1), torch.zeros_like(rank_B))
        self._last = (torch.where(found_B, document_B, old[0]), torch.where(found_B, rank_B + 1, old[1]))

    def _seen(self, new: Rows, rows: Rows) -> Tensor:
        """Which rows each new row sees: bool (B, T, S). Each sees itself."""
        earlier_BTS = see_earlier(new.order_BN, new.document_BN, rows.order_BN, rows.document_BN)
        return earlier_BTS & self.rule.reaches(new.rank_BN, rows.rank_BN, rows.pinned_BN)

    def _drop(self, rows: Rows) -> "tuple[Rows, _Columns | None]":
        """Keep the rows that the next row of each sequence, if its document goes on, would see."""
        if self._last is None:
            return rows, None
        document_B, count_B = self._last
        is_real_BN = (rows.document_BN >= 0) & (rows.order_BN != NOWHERE)
        keep_BN = self.rule.reaches(count_B[:, None], rows.rank_BN, rows.pinned_BN)[:, 0]
        keep_BN = keep_BN & is_real_BN & (rows.document_BN == document_B[:, None])
        kept, columns = _keep(rows, keep_BN)
        self.lost = self.lost or bool((is_real_BN & ~keep_BN).any())
        return kept, columns


def _keep(rows: Rows, keep_BN: Tensor) -> "tuple[Rows, _Columns | None]":
    """The rows to keep and their columns; None where a sequence keeps all of its columns, so that none can go."""
    count_B = keep_BN.sum(dim=1)
    most = int(count_B.max())
    if most == keep_BN.shape[1]:
        return rows._replace(order_BN=rows.order_BN.masked_fill(~keep_BN, NOWHERE)), None
    index_BC = torch.argsort(~keep_BN, dim=1, stable=True)[:, :most]
    is_real_BC = torch.arange(most, device=index_BC.device) < count_B[:, None]
    return rows.pick(index_BC, is_real_BC), _Columns(index_BC)
