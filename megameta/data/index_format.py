"""The .idx file of Megatron-LM's indexed format: its constants, and reading it with every check.

The layout of .idx (all little-endian), as read and written by Megatron-LM's ``IndexedDataset``::

    offset 0   9 bytes   b"MMIDIDX\\x00\\x00"
           9   u64       version, 1
          17   u8        dtype code of .bin: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16
          18   u64       S, number of sequences
          26   u64       D, number of documents + 1
          34   i32[S]    tokens in each sequence
               i64[S]    byte offset of each sequence in .bin
               i64[D]    document boundaries as sequence numbers, first 0, last S

Legend: S sequences, D documents + 1.
"""

import os
import struct
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megameta.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPE_OF_CODE: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in DTYPE_OF_CODE.items()}
#: Entries checked at a time when a dataset is opened, so that checking needs little memory.
_CHECK_CHUNK = 1 << 22

Ints = npt.NDArray[np.int64]


def read_index(name: str) -> tuple[np.dtype[Any], npt.NDArray[np.int32], Ints]:
    """Read and check a .idx file: (dtype, sizes int32[S], document_indices int64[D])."""
    length = os.path.getsize(name)
    with open(name, "rb") as file:
        head = file.read(HEADER_BYTES)
        if head[: len(MAGIC)] != MAGIC:
            raise UserError(f"{name}: not a Megatron index (byte 0: {head[:9]!r}, expected {MAGIC!r})")
        if len(head) < HEADER_BYTES:
            raise UserError(f"{name}: truncated in its header at byte {length}; copy or make the pair again")
        version, code, num_sequences, num_boundaries = struct.unpack("<QBQQ", head[len(MAGIC) :])
        if version != VERSION:
            raise UserError(f"{name}: byte 9: index version {version}, only version {VERSION} can be read")
        if code not in DTYPE_OF_CODE:
            raise UserError(f"{name}: byte 17: unknown dtype code {code} (1 to 8 are known)")
        dtype = np.dtype(DTYPE_OF_CODE[code])
        if dtype.kind == "f":
            raise UserError(f"{name}: byte 17: dtype code {code} is {dtype}, which holds no token ids")
        _check_index_length(name, length, num_sequences, num_boundaries)
        sizes = np.fromfile(file, dtype="<i4", count=num_sequences).astype(np.int32, copy=False)
        _check_sequences(name, file, sizes, dtype.itemsize)
        boundaries = np.fromfile(file, dtype="<i8", count=num_boundaries).astype(np.int64, copy=False)
    _check_boundaries(name, boundaries, num_sequences)
    return dtype, sizes, boundaries


def _check_index_length(name: str, length: int, num_sequences: int, num_boundaries: int) -> None:
    expected = HEADER_BYTES + 12 * num_sequences + 8 * num_boundaries
    if length == expected:
        if num_boundaries < 1:
            raise UserError(f"{name}: byte 26: no document boundaries; make the pair again")
        return
    counts = f"{num_sequences} sequences and {num_boundaries} document boundaries"
    if num_sequences and length == expected + num_sequences:
        raise UserError(
            f"{name}: multimodal files are not supported (a mode array of {num_sequences} bytes begins at "
            f"byte {expected})"
        )
    if length < expected:
        raise UserError(
            f"{name}: truncated at byte {length}: {counts} take {expected} bytes. Copy or make the pair again"
        )
    raise UserError(f"{name}: {length - expected} trailing bytes from byte {expected} on: {counts} end there")


def _check_sequences(name: str, file: IO[bytes], sizes: npt.NDArray[np.int32], itemsize: int) -> None:
    """Check that no size is negative and that the byte offsets, next in ``file``, follow from them."""
    expected_start = 0
    for first in range(0, len(sizes), _CHECK_CHUNK):
        part = sizes[first : first + _CHECK_CHUNK]
        negative = np.flatnonzero(part < 0)
        if negative.size:
            bad = first + int(negative[0])
            raise UserError(f"{name}: byte {HEADER_BYTES + 4 * bad}: sequence {bad} has {sizes[bad]} tokens")
        ends = expected_start + np.cumsum(part, dtype=np.int64) * itemsize
        expected = np.concatenate(([expected_start], ends[:-1]))
        offsets = np.fromfile(file, dtype="<i8", count=len(part))
        wrong = np.flatnonzero(offsets != expected)
        if wrong.size:
            bad = int(wrong[0])
            raise UserError(
                f"{name}: byte {HEADER_BYTES + 4 * len(sizes) + 8 * (first + bad)}: sequence {first + bad} is "
                f"said to begin at byte {offsets[bad]} of the .bin, the lengths before it end at {expected[bad]}. "
                "Copy or make the pair again"
            )
        expected_start = int(ends[-1])


def _check_boundaries(name: str, boundaries: Ints, num_sequences: int) -> None:
    start = HEADER_BYTES + 12 * num_sequences
    if boundaries[0] != 0:
        raise UserError(f"{name}: byte {start}: the first document begins at sequence {boundaries[0]}, not 0")
    falling = np.flatnonzero(boundaries[1:] < boundaries[:-1])
    if falling.size:
        bad = int(falling[0]) + 1
        raise UserError(f"{name}: byte {start + 8 * bad}: document boundary {boundaries[bad]} after a larger one")
    if boundaries[-1] != num_sequences:
        raise UserError(
            f"{name}: byte {start + 8 * (len(boundaries) - 1)}: the last document ends at sequence "
            f"{boundaries[-1]} of {num_sequences}"
        )
