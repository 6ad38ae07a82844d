"""Evaluation text in a corpus: shared 13-grams of words (as GPT-3's appendix C, Brown et al. 2020).

Words are in their bare form (see words.py). An example of 5 to 12 words counts as one n-gram of all its words; a
shorter one would be found in any corpus, so it is counted but not judged.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta.corpus.audit.damage import damage
from megameta.corpus.audit.inputs import split_named
from megameta.corpus.audit.words import Hashes, WordTable, ngrams
from megameta.corpus.readers import document_texts, expand_inputs, read_documents
from megameta.errors import UserError

NGRAM = 13
#: Examples with fewer words are not judged.
FEWEST = 5
_FILTER_BITS = 24


@dataclass(frozen=True)
class Examples:
    """Evaluation examples: ``sets`` names, and for each example its set, where it stands and its words."""

    names: list[str]
    set_of: npt.NDArray[np.int32]
    locations: list[str]
    words: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Hits:
    """What one document shares with the examples: n-gram numbers, and the example of which it has the largest share."""

    ngrams: npt.NDArray[np.int64]
    example: int
    share: float


class NgramIndex:
    """N-grams of evaluation examples, to look up those of a document.

    Legend: G distinct (length, hash) n-grams sorted, E examples, P (n-gram, example) pairs. Kept in one .npz, so that
    workers share what the main process computed.
    """

    def __init__(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        self._lengths_G = arrays["lengths"]
        self._hashes_G = arrays["hashes"]
        #: int64[G + 1] into examples_P: which examples have the n-gram.
        self.starts = arrays["starts"]
        self.examples_P = arrays["examples"]
        #: int64[E]: distinct n-grams of each example; 0 for those that are not judged.
        self.counts_E = arrays["counts"]
        # A table of the hashes' upper bits says at once that almost every n-gram of a corpus is none of these.
        self._maybe = {}
        for n in np.unique(self._lengths_G).tolist():
            table = np.zeros(1 << _FILTER_BITS, dtype=np.bool_)
            table[self._bits(self._of(n)[1])] = True
            self._maybe[n] = table

    @property
    def num_ngrams(self) -> int:
        return len(self._hashes_G)

    @staticmethod
    def _bits(hashes: Hashes) -> npt.NDArray[np.int64]:
        return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)

    def _of(self, n: int) -> tuple[int, Hashes]:
        """First number and hashes of the n-grams of n words."""
        first, end = np.searchsorted(self._lengths_G, [n, n + 1])
        return int(first), self._hashes_G[first:end]

    @classmethod
    def build(cls, lengths: list[npt.NDArray[np.int64]], hashes: list[Hashes], examples: int) -> "NgramIndex":
        """From each example's distinct n-grams: their lengths in words and hashes (both empty where not judged)."""
        counts = np.array([len(part) for part in hashes], dtype=np.int64)
        owner = np.repeat(np.arange(examples, dtype=np.int64), counts)
        all_lengths = np.concatenate([*lengths, np.empty(0, np.int64)])
        all_hashes = np.concatenate([*hashes, np.empty(0, np.uint64)])
        order = np.lexsort((owner, all_hashes, all_lengths))
        all_lengths, all_hashes, owner = all_lengths[order], all_hashes[order], owner[order]
        new = np.ones(len(order), dtype=np.bool_)
        new[1:] = (all_lengths[1:] != all_lengths[:-1]) | (all_hashes[1:] != all_hashes[:-1])
        starts = np.append(np.flatnonzero(new), len(order))
        return cls(
            {"lengths": all_lengths[new], "hashes": all_hashes[new], "starts": starts, "examples": owner}
            | {"counts": counts}
        )

    def save(self, file: str) -> None:
        np.savez(
            file,
            lengths=self._lengths_G,
            hashes=self._hashes_G,
            starts=self.starts,
            examples=self.examples_P,
            counts=self.counts_E,
        )

    @classmethod
    def load(cls, file: str) -> "NgramIndex":
        with np.load(file, allow_pickle=False) as arrays:
            return cls({name: arrays[name] for name in arrays.files})

    def look_up(self, bare: Hashes) -> Hits | None:
        """What a document with these bare words shares with the examples; None for nothing."""
        found = []
        for n, hashes in ngrams(bare, NGRAM):
            table = self._maybe.get(n)
            if table is None:
                continue
            likely = hashes[table[self._bits(hashes)]]
            if not len(likely):
                continue
            first, known = self._of(n)
            likely = np.unique(likely)
            at = np.minimum(np.searchsorted(known, likely), len(known) - 1)
            found.append(first + at[known[at] == likely])
        numbers = np.concatenate(found) if found else np.empty(0, np.int64)
        if not len(numbers):
            return None
        shares = self.shares(numbers)
        best = int(shares.argmax())
        return Hits(numbers, best, float(shares[best]))

    def shares(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """float64[E]: the share of each example's n-grams that are among ``numbers`` (distinct)."""
        found = np.bincount(self.examples_of(numbers), minlength=len(self.counts_E))
        return found / np.maximum(1, self.counts_E)

    def examples_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The examples that have each n-gram of ``numbers``, an example once for each of its n-grams."""
        begins, ends = self.starts[numbers], self.starts[numbers + 1]
        sizes = ends - begins
        before = np.cumsum(sizes) - sizes
        return self.examples_P[np.repeat(begins - before, sizes) + np.arange(int(sizes.sum()))]


def read_examples(against: Sequence[str], keys: Sequence[str]) -> tuple[Examples, NgramIndex]:
    """The examples of each "NAME=GLOB" and the index of their n-grams.

    An example is a document; its text is what is under ``keys``, joined by line ends. Raises UserError for a bad one.
    """
    table = WordTable()
    names: list[str] = []
    set_of, locations, counts = [], [], []
    lengths: list[npt.NDArray[np.int64]] = []
    hashes: list[Hashes] = []
    for name, pattern in split_named(against, "--against"):
        if name in names:
            raise UserError(f"--against: the evaluation set {name} is there twice; give each a name of its own")
        names.append(name)
        for location, document in read_documents(expand_inputs([pattern]), list(keys)):
            texts: list[str] = []
            for key in keys:
                found = document_texts(location, document, key)
                if not isinstance(found, list):
                    remedy = f"{found.reason.removesuffix('; --json-keys names them')}; --against-keys names the keys"
                    raise UserError(f"{found.location}: {remedy} of evaluation sets")
                texts += found
            text = "\n".join(texts)
            bare = table.words(text, damage(text)[1] > 0).bare
            n = min(NGRAM, len(bare))
            grams = np.unique(dict(ngrams(bare, n))[n]) if n >= FEWEST else np.empty(0, np.uint64)
            set_of.append(len(names) - 1)
            locations.append(location)
            counts.append(len(bare))
            lengths.append(np.full(len(grams), n, dtype=np.int64))
            hashes.append(grams)
        if not set_of or set_of[-1] != len(names) - 1:
            raise UserError(f"--against {name}={pattern}: no documents in {pattern}")
    examples = Examples(names, np.array(set_of, np.int32), locations, np.array(counts, np.int64))
    return examples, NgramIndex.build(lengths, hashes, len(locations))


def index_file(directory: str) -> str:
    return os.path.join(directory, "evaluation-ngrams.npz")
