"""Which text a sample holds, in closed form: no sample table is ever built.

One epoch is the concatenation of all documents in a random order; sample j of it starts at token p = j · L and holds L
tokens plus the one that follows. Samples of an epoch are visited in a random order of their own. What is left over at
an epoch's end, fewer than L tokens, is dropped, other tokens each epoch.

Where samples may not cross documents (``DocumentSamples``), each document is cut into pieces of L tokens of its own.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megameta.data.counter_random import make_key, permutation
from megameta.data.index_cache import Arrays, IndexCache, digest
from megameta.data.indexed import IndexedDataset
from megameta.errors import UserError

Ints = npt.NDArray[np.int64]
#: Documents of a sample from which on they are gathered in one go; below, one by one is faster.
_MANY = 6
#: Tokens from which on a document of several is fetched ahead of the others: less lies in a page or two.
_PAGE = 2048
#: Orders of epochs that are kept: a batch may lie on both sides of an epoch's end.
_EPOCHS = 2


class Corpus:
    """The documents of several tokenised datasets as one.

    Args:
        share: (begin, end), the part of each dataset's documents that is taken, by Megatron's rule for ``--split``:
            documents round(begin · n) to round(end · n) − 1 of n, in the order on disk.
    """

    def __init__(self, prefixes: list[str], share: tuple[float, float] = (0.0, 1.0)) -> None:
        if not prefixes:
            raise UserError("no dataset is named: set data.train (or data.valid) to the prefix of a .bin/.idx pair")
        self.parts = [IndexedDataset(prefix) for prefix in prefixes]
        cuts = [tuple(round(edge * part.num_documents) for edge in share) for part in self.parts]
        lengths = [part.document_lengths[first:end] for part, (first, end) in zip(self.parts, cuts, strict=True)]
        self.document_lengths = lengths[0] if len(lengths) == 1 else np.concatenate(lengths)
        self._first_document = np.cumsum([0, *map(len, lengths)])
        self._skipped = [first for first, _ in cuts]
        self.num_tokens = int(self.document_lengths.sum())

    @property
    def name(self) -> str:
        """The prefixes, for messages; the first few of many."""
        names = [part.prefix for part in self.parts]
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    def expect_random_access(self) -> None:
        """Say that reads will come in no order."""
        for part in self.parts:
            part.expect_random_access()

    def tokens(self, document: int, start: int, count: int) -> Ints:
        """``count`` tokens of a document from its token ``start``: int64 (count,)."""
        part = int(np.searchsorted(self._first_document, document, side="right")) - 1
        dataset = self.parts[part]
        first = dataset.document_starts[document - self._first_document[part] + self._skipped[part]]
        return dataset.tokens(int(first) + start, count)

    def gather(self, documents: Ints, starts: Ints, counts: Ints) -> Ints:
        """``tokens`` of many documents one after the other: int64 (counts.sum(),)."""
        if len(self.parts) == 1:
            dataset = self.parts[0]
            first = dataset.document_starts[documents + self._skipped[0]] + starts
            for place, count in zip(first[counts > _PAGE].tolist(), counts[counts > _PAGE].tolist(), strict=True):
                dataset.fetch(place, count)
            return dataset.take(np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum()))
        pieces = [self.tokens(int(d), int(s), int(c)) for d, s, c in zip(documents, starts, counts, strict=True) if c]
        return np.concatenate(pieces)


@dataclass(frozen=True)
class Text:
    """The text of one sample: L + 1 tokens."""

    token_L: Ints
    document_L: Ints
    """Number of the document inside the sample, 0, 1, 2, …"""
    num_tokens: int | None = None
    """Tokens that are text, where fewer than L + 1; the rest is padding."""


class Samples(Protocol):
    """Text by sample number, counting on through epochs."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch."""

    def text(self, index: int) -> Text:
        """The L + 1 tokens of sample ``index``."""


class EpochOrders:
    """The random orders of each epoch, of which the last few are kept in memory: a batch may lie on both sides of an
    epoch's end.

    Args:
        make: the arrays of an epoch, by its number.
        cache: where they are kept on disk under the name ``family``; None: nowhere.
    """

    def __init__(self, make: Callable[[int], Arrays], cache: IndexCache | None, family: Callable[[], str]) -> None:
        self._make = make
        self._cache = cache
        self._family = family() if cache is not None else ""
        self._recent: OrderedDict[int, Arrays] = OrderedDict()

    def __getitem__(self, number: int) -> Arrays:
        if number not in self._recent:
            make = partial(self._make, number)
            self._recent[number] = self._cache.get(self._family, number, make) if self._cache else make()
            while len(self._recent) > _EPOCHS:
                self._recent.popitem(last=False)
        self._recent.move_to_end(number)
        return self._recent[number]


class SampleIndex:
    """Finds the text of sample ``index``, counting on through epochs.

    Args:
        text_per_sample: L.
        seed: orders documents and samples; None keeps their order on disk.
        cache: where the orders of large corpora are kept on disk; None: made anew at every start.
    """

    def __init__(self, corpus: Corpus, text_per_sample: int, seed: int | None, cache: IndexCache | None = None) -> None:
        self.corpus = corpus
        self.text_per_sample = text_per_sample
        self.seed = seed
        if seed is not None:
            corpus.expect_random_access()
        self.samples_per_epoch = max(0, corpus.num_tokens - 1) // text_per_sample
        if self.samples_per_epoch == 0:
            raise UserError(
                f"{corpus.name}: {corpus.num_tokens} tokens are fewer than one sample's {text_per_sample + 1};"
                " add text or lower data.sequence_length"
            )
        pays = cache is not None and cache.pays(len(corpus.document_lengths) + self.samples_per_epoch)
        self._orders = EpochOrders(
            self._make_order,
            cache if pays and seed is not None else None,
            lambda: f"order-{digest(corpus.document_lengths, seed or 0, text_per_sample)}",
        )
        self._orders[0]

    def _make_order(self, number: int) -> Arrays:
        lengths = self.corpus.document_lengths
        if self.seed is None:
            return {"documents": np.arange(len(lengths)), "ends": np.cumsum(lengths)}
        documents = _narrow(permutation(make_key(self.seed, "documents", number), len(lengths)))
        samples = _narrow(permutation(make_key(self.seed, "samples", number), self.samples_per_epoch))
        return {"documents": documents, "ends": np.cumsum(lengths[documents]), "samples": samples}

    def text(self, index: int) -> Text:
        """The L + 1 tokens of sample ``index``."""
        number, place = divmod(index, self.samples_per_epoch)
        order = self._orders[number if self.seed is not None else 0]
        sample = int(order["samples"][place]) if "samples" in order else place
        return self._read(order["documents"], order["ends"], sample * self.text_per_sample, self.text_per_sample + 1)

    def _read(self, order: npt.NDArray[np.integer], ends: npt.NDArray[np.integer], position: int, count: int) -> Text:
        """``count`` tokens from token ``position`` of an epoch on."""
        first = int(ends.searchsorted(position, side="right"))
        last = first if ends[first] >= position + count else int(ends.searchsorted(position + count, side="left"))
        documents = order[first : last + 1].astype(np.int64)
        lengths = self.corpus.document_lengths[documents]
        starts = np.zeros(len(documents), dtype=np.int64)
        starts[0] = position - (int(ends[first]) - int(lengths[0]))
        counts = lengths - starts
        counts[-1] -= int(ends[last]) - (position + count)
        if len(documents) == 1:
            return Text(self.corpus.tokens(int(documents[0]), int(starts[0]), count), np.zeros(count, dtype=np.int64))
        if len(documents) < _MANY:
            token_L = np.concatenate(
                [self.corpus.tokens(int(d), int(s), int(c)) for d, s, c in zip(documents, starts, counts, strict=True)]
            )
        else:
            token_L = self.corpus.gather(documents, starts, counts)
        numbers = np.cumsum(counts > 0) - 1  # empty documents do not count
        return Text(token_L, np.repeat(numbers, counts))


class DocumentSamples:
    """Samples that never cross a document: its piece j holds its tokens j · L to (j + 1) · L, the last one fewer.

    What is missing from a sample is padding after its text. Documents of one token, which have nothing to predict, are
    left out. Pieces of all documents are visited in a random order.

    Args: as of ``SampleIndex``.
    """

    def __init__(self, corpus: Corpus, text_per_sample: int, seed: int | None, cache: IndexCache | None = None) -> None:
        self.corpus = corpus
        self.text_per_sample = text_per_sample
        self.seed = seed
        if seed is not None:
            corpus.expect_random_access()
        pieces = -(-np.maximum(corpus.document_lengths - 1, 0) // text_per_sample)
        self._ends = np.cumsum(pieces)
        self.samples_per_epoch = int(self._ends[-1]) if len(self._ends) else 0
        if self.samples_per_epoch == 0:
            raise UserError(f"{corpus.name}: no document of two tokens or more")
        self._orders = EpochOrders(
            self._make_order,
            cache if cache is not None and cache.pays(self.samples_per_epoch) else None,
            lambda: f"pieces-{digest(np.array([self.samples_per_epoch]), seed or 0)}",
        )

    def _make_order(self, number: int) -> Arrays:
        if self.seed is None:
            return {}
        return {"pieces": _narrow(permutation(make_key(self.seed, "pieces", number), self.samples_per_epoch))}

    def text(self, index: int) -> Text:
        """The L + 1 tokens of sample ``index``; what is past the document's end is padding."""
        number, place = divmod(index, self.samples_per_epoch)
        piece = place if self.seed is None else int(self._orders[number]["pieces"][place])
        document = int(self._ends.searchsorted(piece, side="right"))
        first = int(self._ends[document - 1]) if document else 0
        start = (piece - first) * self.text_per_sample
        length = self.text_per_sample + 1
        count = min(length, int(self.corpus.document_lengths[document]) - start)
        token_L = np.zeros(length, dtype=np.int64)
        token_L[:count] = self.corpus.tokens(document, start, count)
        document_L = np.zeros(length, dtype=np.int64)
        document_L[count:] = 1
        return Text(token_L, document_L, count)


def _narrow(order: Ints) -> npt.NDArray[np.integer]:
    """An order in int32 where that holds it: half the cache, half the memory."""
    return order.astype(np.int32) if len(order) <= np.iinfo(np.int32).max else order
