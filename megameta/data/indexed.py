"""Tokenised corpora on disk: Megatron-LM's indexed format, a pair PREFIX.bin and PREFIX.idx.

.bin holds the tokens of all sequences one after the other, little-endian; .idx (see index_format.py) says where
sequences and documents begin. A document is a run of sequences; it may hold several of them or none.
Legend: S sequences, D documents + 1.
"""

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megameta.data.growing import GrowingDataset, GrowingPaths, publish
from megameta.data.index_format import CODE_OF_DTYPE, Ints, read_index
from megameta.errors import UserError

#: Tokens that are copied at a time.
COPY_TOKENS = 1 << 23


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


class IndexedDatasetWriter:
    """Writes a pair PREFIX.bin and PREFIX.idx; use it as a context manager.

    The files appear under their names only when they are whole: they grow under temporary names in the same
    directory (see growing.py), and are synced and renamed, .bin first, when the block ends without an exception;
    otherwise the temporary files are removed. An existing pair is replaced (callers refuse that where they must).
    Memory does not grow with the number of documents.

    Raises UserError where the directory cannot be written or a token does not fit the dtype.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = dataset_prefix(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODE_OF_DTYPE or self.dtype.kind == "f":
            raise ValueError(f"{self.dtype} is not a token dtype of the .idx format")
        self._paths = GrowingPaths.beside(self.prefix, f".tmp-{os.getpid()}")
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self._paths.tokens}: {error.strerror}") from error
        self._growing = GrowingDataset(self._paths, self.dtype)

    @property
    def num_documents(self) -> int:
        return self._growing.lengths.documents

    @property
    def num_sequences(self) -> int:
        return self._growing.lengths.sequences

    @property
    def num_tokens(self) -> int:
        return self._growing.lengths.tokens

    def add_document(
        self, sequences_or_ids: Sequence[Any] | npt.NDArray[Any], lengths: Sequence[int] | None = None
    ) -> None:
        """Append one document.

        ``sequences_or_ids``: token ids, int[n]; or a list of such lists, one for each sequence.
        ``lengths``: with ids in one list, the tokens in each sequence. Without it the ids are one sequence;
        an empty document holds no sequence, as in Megatron's own tool.
        """
        if len(sequences_or_ids) and np.ndim(sequences_or_ids[0]) == 1:
            if lengths is not None:
                raise ValueError("lengths are given by the sequences themselves")
            parts = [self._as_tokens(part) for part in sequences_or_ids]
            lengths = [part.size for part in parts]
            ids = np.concatenate(parts)
        else:
            ids = self._as_tokens(sequences_or_ids)
            if lengths is None:
                lengths = [ids.size] if ids.size else []
        if sum(lengths) != ids.size or any(length < 0 for length in lengths):
            raise ValueError(f"sequence lengths add up to {sum(lengths)}, the document has {ids.size} tokens")
        self.add_documents(ids, lengths, [len(lengths)])

    def add_documents(
        self,
        ids: npt.NDArray[Any] | bytes,
        sequence_lengths: Sequence[int] | npt.NDArray[Any],
        sequences_per_document: Sequence[int] | npt.NDArray[Any],
    ) -> None:
        """Append many documents at once.

        ``ids``: the tokens of all of them, int[n] of this writer's dtype, or their bytes in file order.
        ``sequence_lengths``: int[S'], tokens in each sequence; ``sequences_per_document``: int[documents].
        """
        raw = ids if isinstance(ids, bytes) else self._as_tokens(ids).tobytes()
        self._growing.add(raw, sequence_lengths, sequences_per_document)

    def add_dataset(
        self,
        prefix: str | os.PathLike[str],
        convert: bool = False,
        on_progress: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Append every document of an existing dataset, a piece of its .bin at a time.

        ``convert``: take other dtypes too, where every id fits this one. ``on_progress`` gets the tokens of each piece.
        """
        dataset = IndexedDataset(prefix)
        if dataset.dtype != self.dtype and not convert:
            raise UserError(
                f"{dataset.prefix}.idx: tokens are {dataset.dtype}, {self.prefix} is written as {self.dtype}; "
                "datasets that are joined must come from one tokenizer (a dtype can be chosen: --dtype)"
            )

        def chunks() -> Iterator[bytes]:
            for start in range(0, dataset.num_tokens, COPY_TOKENS):
                tokens = dataset.stored(start, min(COPY_TOKENS, dataset.num_tokens - start))
                on_progress(len(tokens))
                yield self._as_tokens(tokens, f"{dataset.prefix}.bin, tokens {start:,} on").tobytes()

        self._growing.add_chunks(chunks(), dataset.sizes, np.diff(dataset.document_indices))

    def _as_tokens(self, ids: Sequence[int] | npt.NDArray[Any], what: str = "") -> npt.NDArray[Any]:
        """``ids`` as an array of this dtype in file byte order; a value that would wrap around is refused.

        ``what``: where they come from, for the message."""
        values = np.asarray(ids)
        if values.dtype != self.dtype and values.size:
            limits = np.iinfo(self.dtype)
            if values.dtype.kind not in "iu" or values.min() < limits.min or values.max() > limits.max:
                where = what or f"{self.prefix}.bin"
                raise UserError(
                    f"{where}: ids from {values.min()} to {values.max()} do not fit {self.dtype}; "
                    "the dataset was opened for a smaller vocabulary"
                )
        return values.astype(self.dtype.newbyteorder("<"), copy=False)

    def _publish(self) -> None:
        self._growing.flush()
        self._growing.sync()
        self._growing.write_index()
        self._growing.close()
        publish(self._paths, self.prefix)
        self._paths.remove()

    def discard(self) -> None:
        """Close and remove what has been written so far."""
        self._growing.close()
        self._paths.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self._publish()
        except OSError as failure:
            self.discard()
            raise UserError(f"cannot write {self.prefix}.bin/.idx: {failure.strerror}") from failure
        except BaseException:
            self.discard()
            raise


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


def merge_datasets(
    prefixes: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    dtype: npt.DTypeLike | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Join datasets in the given order into a new one, without loading any .bin into memory.

    The bytes are those of a single writer that was given all documents. ``dtype`` of the new one, to which tokens are
    converted where they fit; None: that of all of them, UserError where they differ. ``on_progress`` gets the tokens of
    each piece.
    """
    if not prefixes:
        raise ValueError("nothing to merge")
    chosen = IndexedDataset(prefixes[0]).dtype if dtype is None else dtype
    with IndexedDatasetWriter(output_prefix, chosen) as writer:
        for prefix in prefixes:
            writer.add_dataset(prefix, convert=dtype is not None, on_progress=on_progress)
