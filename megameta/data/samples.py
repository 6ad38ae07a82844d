"""Which text a sample holds, in closed form (design.md): no sample table is ever built.

One epoch is the concatenation of all documents in a random order; sample j of it starts at token p = j · L and holds L
tokens plus the one that follows. Samples of an epoch are visited in a random order of their own. What is left over at
an epoch's end, fewer than L tokens, is dropped, other tokens each epoch.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megameta.data.counter_random import make_key, permutation
from megameta.data.indexed import IndexedDataset
from megameta.errors import UserError

Ints = npt.NDArray[np.int64]


class Corpus:
    """The documents of several tokenised datasets as one."""

    def __init__(self, prefixes: list[str]) -> None:
        if not prefixes:
            raise UserError("no dataset is named: set data.train (or data.valid) to the prefix of a .bin/.idx pair")
        self.parts = [IndexedDataset(prefix) for prefix in prefixes]
        self.document_lengths = np.concatenate([part.document_lengths for part in self.parts])
        self._first_document = np.cumsum([0, *(part.num_documents for part in self.parts)])
        self.num_tokens = int(self.document_lengths.sum())

    def tokens(self, document: int, start: int, count: int) -> Ints:
        """``count`` tokens of a document from its token ``start``: int64 (count,)."""
        part = int(np.searchsorted(self._first_document, document, side="right")) - 1
        dataset = self.parts[part]
        first = dataset.document_starts[document - self._first_document[part]]
        return dataset.tokens(int(first) + start, count)


@dataclass(frozen=True)
class Text:
    """The text of one sample: L + 1 tokens."""

    token_L: Ints
    document_L: Ints
    """Number of the document inside the sample, 0, 1, 2, …"""


@dataclass(frozen=True)
class _Epoch:
    number: int
    documents: Ints
    ends: Ints
    samples: Ints | None


class SampleIndex:
    """Finds the text of sample ``index``, counting on through epochs.

    Args:
        text_per_sample: L.
        seed: orders documents and samples; None keeps their order on disk.
    """

    def __init__(self, corpus: Corpus, text_per_sample: int, seed: int | None) -> None:
        self.corpus = corpus
        self.text_per_sample = text_per_sample
        self.seed = seed
        self.samples_per_epoch = max(0, corpus.num_tokens - 1) // text_per_sample
        if self.samples_per_epoch == 0:
            names = ", ".join(part.prefix for part in corpus.parts)
            raise UserError(
                f"{names}: {corpus.num_tokens} tokens are fewer than one sample's {text_per_sample + 1};"
                " add text or lower data.sequence_length"
            )
        self._epoch = self._order(0)

    def _order(self, epoch: int) -> _Epoch:
        lengths = self.corpus.document_lengths
        if self.seed is None:
            return _Epoch(epoch, np.arange(len(lengths)), np.cumsum(lengths), None)
        documents = permutation(make_key(self.seed, "documents", epoch), len(lengths))
        samples = permutation(make_key(self.seed, "samples", epoch), self.samples_per_epoch)
        return _Epoch(epoch, documents, np.cumsum(lengths[documents]), samples)

    def text(self, index: int) -> Text:
        """The L + 1 tokens of sample ``index``."""
        number, place = divmod(index, self.samples_per_epoch)
        if self._epoch.number != number:
            self._epoch = self._order(number)
        epoch = self._epoch
        sample = place if epoch.samples is None else int(epoch.samples[place])
        return self._read(epoch, sample * self.text_per_sample, self.text_per_sample + 1)

    def _read(self, epoch: _Epoch, position: int, count: int) -> Text:
        token_L = np.empty(count, dtype=np.int64)
        document_L = np.empty(count, dtype=np.int64)
        slot = int(np.searchsorted(epoch.ends, position, side="right"))
        filled = number = 0
        while filled < count:
            document = int(epoch.documents[slot])
            length = int(self.corpus.document_lengths[document])
            start = position + filled - (int(epoch.ends[slot]) - length)
            take = min(length - start, count - filled)
            if take > 0:
                token_L[filled : filled + take] = self.corpus.tokens(document, start, take)
                document_L[filled : filled + take] = number
                filled, number = filled + take, number + 1
            slot += 1
        return Text(token_L, document_L)
