"""Tokenised corpora on disk: Megatron-LM's indexed format, a pair PREFIX.bin and PREFIX.idx.

.bin holds the tokens of all sequences one after the other, little-endian; .idx (see index_format.py) says where
sequences and documents begin. A document is a run of sequences; it may hold several of them or none.
Legend: S sequences, D documents + 1.
"""

import mmap
import os
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta.data.index_format import Ints, read_index
from megameta.errors import UserError


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype of a new .bin: uint16 where the vocabulary is below 65500, else int32 (Megatron's rule)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def dataset_prefix(prefix: str | os.PathLike[str]) -> str:
    """The common prefix of a pair of files; a name ending in .bin or .idx stands for its prefix."""
    text = os.fspath(prefix)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def dataset_exists(prefix: str | os.PathLike[str]) -> bool:
    """Whether both files of the pair are there. ``prefix`` with or without .bin or .idx."""
    prefix = dataset_prefix(prefix)
    return os.path.isfile(prefix + ".bin") and os.path.isfile(prefix + ".idx")


class IndexedDataset:
    """A tokenised corpus, read through a memory map of PREFIX.bin.

    Attributes: ``prefix``; ``dtype`` of .bin; ``sizes`` int32[S], tokens in each sequence;
    ``document_indices`` int64[D], document boundaries as sequence numbers;
    ``num_tokens``, ``num_sequences``, ``num_documents``;
    ``document_lengths`` int64[documents] in tokens; ``document_starts`` int64[documents], the first token of
    each document, counted in tokens from the start of .bin.

    Opening checks the index in full and .bin by its length alone, in time that does not grow with .bin.
    Raises UserError naming the file and the byte offset of the damage. Pickling carries the prefix alone.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = dataset_prefix(prefix)
        self._require_files()
        self.dtype, self.sizes, self.document_indices = read_index(self.prefix + ".idx")
        self.num_tokens = int(self.sizes.sum(dtype=np.int64))
        self._map: mmap.mmap | None = None  # an empty file cannot be mapped
        self._tokens = self._map_bin()
        self._random_access = False

    def _require_files(self) -> None:
        missing = [end for end in (".bin", ".idx") if not os.path.isfile(self.prefix + end)]
        if not missing:
            return
        if len(missing) == 1:
            other = ".idx" if missing == [".bin"] else ".bin"
            raise UserError(f"{self.prefix}{missing[0]} is missing, {self.prefix}{other} is there: copy both files")
        near = self.prefix + "_text_document"
        hint = f"; did you mean {near}?" if dataset_exists(near) else "; tools/preprocess_data.py makes datasets"
        raise UserError(f"there is no dataset {self.prefix} (neither .bin nor .idx){hint}")

    def _map_bin(self) -> npt.NDArray[Any]:
        name = self.prefix + ".bin"
        expected = self.num_tokens * self.dtype.itemsize
        actual = os.path.getsize(name)
        if actual != expected:
            what = "is truncated" if actual < expected else "has trailing bytes, or another dtype"
            raise UserError(
                f"{name} {what}: the index asks for {expected} bytes ({self.num_tokens} tokens of "
                f"{self.dtype}), the file has {actual}; difference at byte {min(actual, expected)}. "
                "Copy or make the pair again"
            )
        if expected == 0:
            return np.empty(0, dtype=self.dtype)
        with open(name, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, dtype=self.dtype.newbyteorder("<"))

    def expect_random_access(self) -> None:
        """Say that reads will come in no order: then the system fetches from disk what is asked for, in one go, and
        not 128 KB around it page by page, which takes 4 to 8 times as long (docs/performance.md)."""
        if self._map is not None and hasattr(mmap, "MADV_RANDOM"):  # not every system has it
            self._map.madvise(mmap.MADV_RANDOM)
            self._random_access = True

    def fetch(self, start_token: int, count: int) -> None:
        """Have the system begin to read tokens of .bin from disk, where random access was announced."""
        if self._random_access and self._map is not None and count * self.dtype.itemsize > mmap.PAGESIZE:
            first = start_token * self.dtype.itemsize
            begin = first - first % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, begin, first - begin + count * self.dtype.itemsize)

    @property
    def num_sequences(self) -> int:
        return len(self.sizes)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    @cached_property
    def _document_bounds(self) -> Ints:
        bounds = np.zeros(self.num_sequences + 1, dtype=np.int64)
        np.cumsum(self.sizes, out=bounds[1:])
        return bounds[self.document_indices]

    @property
    def document_starts(self) -> Ints:
        return self._document_bounds[:-1]

    @cached_property
    def document_lengths(self) -> Ints:
        return np.diff(self._document_bounds)

    def tokens(self, start_token: int, count: int) -> Ints:
        """``count`` consecutive tokens of .bin from token number ``start_token``: int64[count], a copy."""
        if start_token < 0 or count < 0 or start_token + count > self.num_tokens:
            raise IndexError(f"{self.prefix}.bin: tokens {start_token} to {start_token + count} of {self.num_tokens}")
        self.fetch(start_token, count)
        return self._tokens[start_token : start_token + count].astype(np.int64)

    def stored(self, start_token: int, count: int) -> npt.NDArray[Any]:
        """Consecutive tokens as they are stored: [count], of ``dtype``, no copy."""
        return self._tokens[start_token : start_token + count]

    def take(self, places: Ints) -> Ints:
        """Tokens at many places of .bin, counted in tokens: int64[len(places)]."""
        return self._tokens[places].astype(np.int64)

    def document(self, index: int) -> Ints:
        """All tokens of document ``index``: int64[document_lengths[index]]."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"{self.prefix}: document {index} of {self.num_documents}")
        start, end = self._document_bounds[index : index + 2]
        return self.tokens(int(start), int(end - start))

    def __len__(self) -> int:
        return self.num_documents

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str]]:
        return (IndexedDataset, (self.prefix,))
