"""Exact and near duplicates, within bounded memory.

*Exact*: the same bytes. *Normalised*: the same words in NFC and lower case, whatever the white space (for scripts
without spaces, whatever the spaces). *Near*: MinHash (Broder 1997) of 5-word shingles with rensa's 128 permutations;
documents that agree on one of 21 bands of 6 rows are compared, and belong together where at least ``near_jaccard`` of
their 128 values agree. Documents are near duplicates of each other through others too (union-find), so the first and
the last of a chain may be less alike.

A pair of Jaccard similarity s meets in a band with probability 1 - (1 - s^6)^21: 0.998 at 0.8, 0.999998 at 0.9; the
estimate itself has a standard error of sqrt(s(1-s)/128), 0.035 at 0.8.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta.corpus.audit.records import CHUNK, GrowingArray
from megameta.corpus.audit.words import Hashes, ngrams, scramble

PERMUTATIONS = 128
BANDS, ROWS = 21, 6
SHINGLE = 5
#: In a bucket of more documents each is compared with the first and this many before it, else all with all.
_WINDOW = 64

Numbers = npt.NDArray[np.int64]


def shingles(bare: Hashes) -> Hashes:
    """Hashes of a document's 5-word shingles; of a shorter one all its words as one; none without words."""
    *_, (_, last) = [(0, bare), *ngrams(bare, SHINGLE)]
    return scramble(last)


def signatures(shingles_of: list[Hashes], seed: int) -> npt.NDArray[np.uint32]:
    """MinHash values uint32[documents, PERMUTATIONS] by rensa; every document has a shingle."""
    from rensa import RMinHash

    if not shingles_of:
        return np.empty((0, PERMUTATIONS), dtype=np.uint32)
    flat = np.concatenate(shingles_of)
    ends = np.concatenate([[0], np.cumsum([len(part) for part in shingles_of])]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, PERMUTATIONS, seed)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def bands(signature: npt.NDArray[np.uint32]) -> Hashes:
    """uint64[documents, BANDS]: a hash of the rows of each band."""
    rows = signature[:, : BANDS * ROWS].reshape(-1, BANDS, ROWS).astype(np.uint64)
    hashes = np.zeros(rows.shape[:2], dtype=np.uint64)
    for row in range(ROWS):
        hashes = scramble(hashes + rows[:, :, row] + np.uint64(row + 1))
    return hashes


class SketchStore:
    """Signatures and band hashes on disk: 680 bytes for each document that has words."""

    def __init__(self, directory: str) -> None:
        self._signatures = GrowingArray(os.path.join(directory, "signatures"), np.uint32, PERMUTATIONS)
        self._bands = [GrowingArray(os.path.join(directory, f"band-{band:02}"), np.uint64) for band in range(BANDS)]

    def add(self, signature: npt.NDArray[np.uint32]) -> None:
        self._signatures.add(signature)
        for band, hashes in zip(self._bands, bands(signature).T):
            band.add(hashes)

    def signatures(self) -> npt.NDArray[np.uint32]:
        return self._signatures.array()

    def band(self, number: int) -> Hashes:
        return self._bands[number].array()

    def close(self) -> None:
        for part in (self._signatures, *self._bands):
            part.close()


@dataclass(frozen=True)
class Duplicates:
    """Groups of documents, as the number of each one's first member: int64[documents]. A group of one is alone.

    ``exact`` is finer than ``normalised``, which is finer than ``near``. ``pairs``: near pairs that were compared.
    """

    exact: Numbers
    normalised: Numbers
    near: Numbers
    pairs: int


def first_of_group(keys: npt.NDArray[np.uint64], eligible: npt.NDArray[np.bool_]) -> Numbers:
    """For 128-bit keys uint64[documents, 2] the number of the first eligible document with the same; others alone."""
    result = np.arange(len(keys), dtype=np.int64)
    numbers = np.flatnonzero(eligible)
    if len(numbers) < 2:
        return result
    chosen = np.asarray(keys)[numbers]
    order = np.lexsort((chosen[:, 1], chosen[:, 0]))  # stable, so that each run begins with its first document
    chosen = chosen[order]
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (chosen[1:] != chosen[:-1]).any(axis=1)
    firsts = order[np.flatnonzero(new)]
    result[numbers[order]] = numbers[firsts[np.cumsum(new) - 1]]
    return result


def find_duplicates(records: Any, sketches: SketchStore, threshold: float | None) -> Duplicates:
    """Group the readable documents of ``records``. ``threshold`` None: near duplicates are not looked for.

    Memory: about 100 bytes for each document; see docs/audit.md.
    """
    count = len(records)
    readable, sketched = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    keys = {name: np.empty((count, 2), np.uint64) for name in ("exact", "normalised")}
    for start in range(0, count, CHUNK):
        part = records[start : start + CHUNK]
        readable[start : start + CHUNK] = (part["reasons"] & np.uint64(1)) == 0
        sketched[start : start + CHUNK] = part["sketch"]
        for name, key in keys.items():
            key[start : start + CHUNK] = part[name]
    exact = first_of_group(keys.pop("exact"), readable)
    # Documents without words (empty, or white space alone) are duplicates only where they are exact ones.
    normalised = np.minimum(exact, first_of_group(keys.pop("normalised"), readable & sketched))
    if threshold is None:
        return Duplicates(exact, normalised, normalised, 0)
    # Only the first of documents that are the same but for case and spaces take part.
    numbers = np.flatnonzero(sketched)
    chosen = np.flatnonzero(normalised[numbers] == numbers)
    union = _Union(len(chosen))
    compared = _join_alike(sketches, chosen, union, threshold)
    roots = np.arange(count, dtype=np.int64)
    roots[numbers[chosen]] = numbers[chosen][union.roots()]
    return Duplicates(exact, normalised, roots[normalised], compared)


class _Union:
    """Union-find in which the root of a group is its smallest member."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count, dtype=np.int64)

    def find(self, number: int) -> int:
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = int(parent[number])
        return number

    def join(self, a: int, b: int) -> None:
        low, high = sorted((self.find(a), self.find(b)))
        self._parent[high] = low

    def roots(self) -> Numbers:
        while True:
            following = self._parent[self._parent]
            if (following == self._parent).all():
                return following
            self._parent = following


def _join_alike(sketches: SketchStore, chosen: Numbers, union: _Union, threshold: float) -> int:
    """Compare documents that meet in a band and join those that are alike; how many pairs were compared."""
    all_signatures = sketches.signatures()
    compared = 0
    for band in range(BANDS):
        hashes = sketches.band(band)[chosen]
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else order
        sizes = np.diff(np.append(starts, len(ordered)))
        several = sizes > 1
        for pairs in _batches(order, starts[several], sizes[several]):
            roots = [(union.find(a), union.find(b)) for a, b in pairs]
            left = np.array([pair for pair, (a, b) in zip(pairs, roots) if a != b], dtype=np.int64).reshape(-1, 2)
            compared += len(left)
            if not len(left):
                continue
            same = all_signatures[chosen[left[:, 0]]] == all_signatures[chosen[left[:, 1]]]
            for a, b in left[same.mean(axis=1) >= threshold].tolist():
                union.join(a, b)
    return compared


def _batches(order: Numbers, starts: Numbers, sizes: Numbers) -> Iterator[list[tuple[int, int]]]:
    """Pairs within each bucket, a few thousand at a time."""
    pairs: list[tuple[int, int]] = []
    for start, size in zip(starts.tolist(), sizes.tolist()):
        members = order[start : start + size].tolist()
        for index in range(1, size):
            first = max(0, index - _WINDOW)
            if first:
                pairs.append((members[0], members[index]))
            pairs += [(earlier, members[index]) for earlier in members[first:index]]
            if len(pairs) >= 4096:
                yield pairs
                pairs = []
    if pairs:
        yield pairs
