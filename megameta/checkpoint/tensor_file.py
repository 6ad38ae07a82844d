"""safetensors files written one tensor at a time, and read by tensor or by slice.

The library's own writer wants every tensor of a file in memory at once; this one needs the names, shapes and types
beforehand and then one tensor after the other. What it writes is plain safetensors: eight bytes with the length of a
JSON header, the header, padded to eight bytes, and the tensors' bytes, little-endian, without gaps.
"""

import hashlib
import json
import math
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megameta.errors import UserError

#: The names of the types in safetensors' header.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_OWN_PAGES = 1 << 18
_METADATA = "__metadata__"


class TensorEntry(NamedTuple):
    """What a file's header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """One safetensors file, written tensor by tensor in the order of its entries; needs the memory of one tensor.

    Args:
        entries: (name, shape) for float32, or (name, shape, dtype).

    Raises:
        ValueError: a name given twice, a type that is not a float, or an order that leaves a tensor unaligned
            (wider types come first).
    """

    def __init__(self, path: Path, entries: Sequence[tuple[str, tuple[int, ...]] | TensorEntry]) -> None:
        self.path = path
        self._waiting = [TensorEntry(*entry) for entry in entries]
        self._waiting.reverse()
        header = _header(self._waiting[::-1])
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._file = path.open("wb")
        self._put(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the tensor of the next entry.

        Raises:
            ValueError: it is not the next entry's, or not of its shape and type, or not on the CPU.
            OSError: the disk's.
        """
        if not self._waiting:
            raise ValueError(f"{self.path}: {name} comes after the last entry")
        entry = self._waiting[-1]
        given = TensorEntry(name, tuple(tensor.shape), tensor.dtype)
        if given != entry or tensor.device.type != "cpu":
            raise ValueError(f"{self.path}: {given} on {tensor.device} was given where {entry} on the CPU comes next")
        self._waiting.pop()
        if tensor.numel():
            size = tensor.element_size()
            # through integers of the same width, because numpy has no bfloat16; neither step copies
            flat = tensor.detach().contiguous().view(-1).view(_INTEGERS[size])
            self._put(flat.numpy().astype(f"<i{size}", copy=False).data.cast("B"))

    def close(self) -> tuple[int, str]:
        """Bring the file to the disk; (its bytes, SHA-256 in hexadecimal).

        Raises:
            ValueError: entries have not been written.
            OSError: the disk's.
        """
        if self._waiting:
            self.abandon()
            raise ValueError(f"{self.path}: {self._waiting[-1].name} was not written")
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._bytes, self._hash.hexdigest()

    def abandon(self) -> None:
        """Close the file as it is. It stays behind, useless; never raises."""
        with suppress(OSError):  # closing flushes, which fails again on the disk that was the reason to give up
            self._file.close()

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)


def _header(entries: Sequence[TensorEntry]) -> bytes:
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offset = 0
    for entry in entries:
        if entry.name in header:
            raise ValueError(f"two tensors are called {entry.name}")
        if entry.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{entry.name} is {entry.dtype}; only {', '.join(map(str, _DTYPE_NAMES))} are written")
        if offset % entry.dtype.itemsize:
            raise ValueError(f"{entry.name} would not be aligned: tensors of wider types have to come first")
        end = offset + entry.num_bytes
        shape = list(entry.shape)
        header[entry.name] = {"dtype": _DTYPE_NAMES[entry.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name that come into being when they are asked for, and whose shapes are known before."""

    @abstractmethod
    def entry(self, name: str) -> TensorEntry:
        """Shape and type of a tensor, without making it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without making it."""
        return self.entry(name).shape


class StoredTensors(LazyTensors):
    """The tensors of some safetensors files. Only headers are read until one is asked for; nothing is kept.

    Args:
        ignored: names that are left out, whatever their type (buffers that some programs store).

    Raises:
        UserError: a file is not readable as safetensors, holds another type than floats, or repeats a name.
    """

    def __init__(self, paths: Sequence[Path], ignored: re.Pattern[str] | None = None) -> None:
        self._entries: dict[str, TensorEntry] = {}
        self._paths: dict[str, Path] = {}
        for path in paths:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    if ignored is not None and ignored.search(name):
                        continue
                    if name in self._paths:
                        raise UserError(f"{path}: holds {name}, which {self._paths[name]} holds, too; copy both again")
                    piece = file.get_slice(name)
                    if piece.get_dtype() not in DTYPES:
                        raise UserError(f"{path}: {name} has the type {piece.get_dtype()}; only floats are read")
                    self._entries[name] = TensorEntry(name, tuple(piece.get_shape()), DTYPES[piece.get_dtype()])
                    self._paths[name] = path

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own."""
        path = self._paths[name]
        with _opened(path) as file:
            return _copied(file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read the tensor

    def entry(self, name: str) -> TensorEntry:
        """Shape and type of a tensor, from the header."""
        return self._entries[name]

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Only ``start`` to ``stop`` of one dimension, contiguous, in memory of its own.

        Raises:
            ValueError: the range is not within the tensor.
        """
        shape = self.shape(name)
        if not (0 <= dim < len(shape) and 0 <= start <= stop <= shape[dim]):
            raise ValueError(f"{name} of shape {shape} has no dimension {dim} with {start}:{stop}")
        with _opened(self._paths[name]) as file:
            piece = file.get_slice(name)[(slice(None),) * dim + (slice(start, stop),)]
            return _copied(piece)


def _copied(view: Tensor) -> Tensor:
    """A view of the mapped file, which it would keep open and resident, in memory of its own.

    Large tensors get pages of their own, which go back to the system with them. glibc's heap keeps what was freed
    below 32 MB, in pieces: reading a model tensor by tensor through it took up to half of the model's size.
    """
    result = torch.empty(0, dtype=view.dtype)
    if view.nbytes >= _OWN_PAGES:
        result = torch.frombuffer(mmap(-1, view.nbytes), dtype=view.dtype)
    return result.resize_(view.shape).copy_(view)


class MadeTensors(LazyTensors):
    """Tensors that a function makes each time that they are asked for."""

    def __init__(self, makers: Mapping[str, tuple[TensorEntry, Callable[[], Tensor]]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name][1]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def entry(self, name: str) -> TensorEntry:
        """Shape and type of a tensor, without making it."""
        return self._makers[name][0]


def entry_of(tensors: Mapping[str, Tensor], name: str) -> TensorEntry:
    """Shape and type of a tensor of any mapping, without reading it where the mapping is lazy."""
    if isinstance(tensors, LazyTensors):
        return tensors.entry(name)
    tensor = tensors[name]
    return TensorEntry(name, tuple(tensor.shape), tensor.dtype)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable as safetensors: {error}; copy it again") from error
