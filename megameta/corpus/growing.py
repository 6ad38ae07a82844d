"""A dataset while it is written: three files that only grow, from which the pair .bin and .idx is made.

tokens   the .bin to be, byte for byte
sizes    int32, tokens in each sequence
bounds   int64, the sequence number at which each document ends

Memory does not depend on how many documents there are, and a known prefix of the three files is a whole dataset, so
that work can go on from the last lengths that are known to be on disk.
"""

import os
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from megameta.data.index_format import CODE_OF_DTYPE, MAGIC, VERSION
from megameta.errors import UserError
from megameta.files import sync, sync_file

COPY_BYTES = 16 << 20
#: Sequences whose byte offsets are computed at a time.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Lengths:
    """Of the three files: tokens, sequences and documents in them."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


@dataclass(frozen=True)
class GrowingPaths:
    """Where the three files are, and the .idx that is made of them."""

    tokens: str
    sizes: str
    bounds: str
    index: str

    @classmethod
    def beside(cls, stem: str, ending: str = "") -> Self:
        return cls(*(f"{stem}.{name}{ending}" for name in ("bin", "sizes", "bounds", "idx")))

    def remove(self) -> None:
        for name in (self.tokens, self.sizes, self.bounds, self.index):
            Path(name).unlink(missing_ok=True)


class GrowingDataset:
    """Appends documents to the three files. ``start``: what of them to keep; what is beyond is cut off.

    Raises UserError where a file cannot be opened or is shorter than ``start`` says.
    """

    def __init__(self, paths: GrowingPaths, dtype: npt.DTypeLike, start: Lengths | None = None) -> None:
        self.paths = paths
        self.dtype = np.dtype(dtype)
        self.lengths = start or Lengths()
        kept = (self.lengths.tokens * self.dtype.itemsize, 4 * self.lengths.sequences, 8 * self.lengths.documents)
        self._files: list[IO[bytes]] = []
        try:
            for name, length in zip((paths.tokens, paths.sizes, paths.bounds), kept, strict=True):
                self._files.append(_open(name, length))
        except OSError as error:
            self.close()
            raise UserError(f"cannot write {name}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def add(
        self,
        raw: bytes,
        sequence_lengths: Sequence[int] | npt.NDArray[Any],
        sequences_per_document: Sequence[int] | npt.NDArray[Any],
    ) -> None:
        """Append documents: the tokens of all of them in file order; int[S'] tokens in each sequence;
        int[documents] sequences in each document."""
        sizes = np.asarray(sequence_lengths, dtype=np.int64)
        counts = np.asarray(sequences_per_document, dtype=np.int64)
        total, size = int(sizes.sum()), len(raw)
        if total * self.dtype.itemsize != size:
            raise ValueError(f"sequences of {total} tokens do not fill {size} bytes of {self.dtype}")
        if int(counts.sum()) != len(sizes):
            raise ValueError("sequences_per_document does not add up to the number of sequences")
        self._files[0].write(raw)
        self._add_index(sizes, counts)

    def add_chunks(
        self, chunks: Iterable[bytes], sizes: npt.NDArray[Any], sequences_per_document: npt.NDArray[Any]
    ) -> None:
        """``add`` of more tokens than fit in memory, in pieces that need not end with a sequence."""
        written = sum(self._files[0].write(chunk) for chunk in chunks)
        if written != int(sizes.sum(dtype=np.int64)) * self.dtype.itemsize:
            raise ValueError(f"{written} bytes of tokens were given, the sequences have another number")
        self._add_index(sizes.astype(np.int64), np.asarray(sequences_per_document, dtype=np.int64))

    def _add_index(self, sizes: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
        if sizes.size and int(sizes.max()) > np.iinfo(np.int32).max:
            raise UserError(f"a sequence of {sizes.max():,} tokens: the .idx format holds up to 2,147,483,647")
        old = self.lengths
        self._files[1].write(sizes.astype("<i4").data)
        self._files[2].write((old.sequences + np.cumsum(counts)).astype("<i8").data)
        self.lengths = Lengths(old.tokens + int(sizes.sum()), old.sequences + len(sizes), old.documents + len(counts))

    def flush(self) -> None:
        """Hand everything to the system, so that ``sync`` of this moment's ``lengths`` has it all."""
        for file in self._files:
            file.flush()

    def sync(self) -> None:
        """Wait until what was flushed is on disk; may run in another thread than ``add``."""
        for file in self._files:
            os.fsync(file.fileno())

    def write_index(self) -> None:
        """Make the .idx of what has been added and sync it."""
        self.flush()
        try:
            with open(self.paths.index, "wb") as file:
                _write_index(file, self.dtype, self.lengths, self.paths)
                sync_file(file)
        except OSError as error:
            raise UserError(f"cannot write {self.paths.index}: {error.strerror}") from error

    def close(self) -> None:
        for file in self._files:
            file.close()


def _open(name: str, length: int) -> IO[bytes]:
    """A file to append to, cut to ``length`` bytes."""
    file = open(name, "r+b" if length else "wb")  # noqa: SIM115 (closed by its owner)
    there = file.seek(0, os.SEEK_END)
    if there < length:
        file.close()
        raise UserError(f"{name} has {there} bytes, {length} were written: start again with --restart")
    file.truncate(length)
    file.seek(length)
    return file


def _write_index(file: IO[bytes], dtype: np.dtype[Any], lengths: Lengths, paths: GrowingPaths) -> None:
    file.write(MAGIC)
    file.write(struct.pack("<QBQQ", VERSION, CODE_OF_DTYPE[dtype], lengths.sequences, lengths.documents + 1))
    with open(paths.sizes, "rb") as sizes:
        shutil.copyfileobj(sizes, file, COPY_BYTES)
        sizes.seek(0)
        start = 0
        while (part := np.fromfile(sizes, dtype="<i4", count=_CHUNK)).size:
            ends = start + np.cumsum(part, dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate(([start], ends[:-1])).astype("<i8").data)
            start = int(ends[-1])
    file.write(struct.pack("<q", 0))
    with open(paths.bounds, "rb") as bounds:
        shutil.copyfileobj(bounds, file, COPY_BYTES)


def publish(paths: GrowingPaths, prefix: str) -> None:
    """Give the finished pair its names. May be repeated after it was cut off at any point.

    Without its .idx a pair does not exist, so no moment shows a mixed pair: the old .idx goes before the new .bin
    comes, and the new .idx comes last.
    """
    if os.path.exists(paths.tokens):
        Path(prefix + ".idx").unlink(missing_ok=True)
        os.replace(paths.tokens, prefix + ".bin")
    if os.path.exists(paths.index):
        os.replace(paths.index, prefix + ".idx")
    sync(Path(prefix).parent)
