"""Documents out of the files that users have, in constant memory.

Reading is split in two so that the second half can run in other processes: ``read_blocks`` cuts the inputs into
blocks of about a megabyte, in a stable order, and ``parse_block`` turns a block into documents.

=============================================  ================================================================
.jsonl, .json, also .gz and .zst               one JSON object a line; blank lines are skipped
.txt, also .gz and .zst                        the whole file is one document, under the key "text"
.parquet                                       one row a document
a directory of ``Dataset.save_to_disk``        one row a document
=============================================  ================================================================

Bytes are UTF-8; a byte-order mark at the start of a file is dropped. Memory: one block, or the longest line or
row where that is more.
"""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megameta.errors import UserError

BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_ROWS = 256

Document = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """Consecutive documents of one file, not yet parsed.

    ``first``: number of the first line or row, from 1. ``items``: lines as bytes, or rows as dictionaries.
    ``input_bytes``: bytes of input files behind it (compressed bytes of a compressed file), for progress.
    """

    file: str
    first: int
    items: list[Any]
    input_bytes: int
    kind: str  # "jsonl", "text" or "rows"


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be read: where it is ("file:line") and what is wrong."""

    location: str
    reason: str


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files and dataset directories named by paths and globs, each glob's matches sorted, in the given order.

    A directory that is no saved dataset stands for the readable files in it. Raises UserError for a name that
    matches nothing or a file of an unknown kind.
    """
    files: list[str] = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"no input matches {pattern}")
        for match in matches:
            if os.path.isdir(match) and not _is_saved_dataset(match):
                inside = sorted(os.path.join(match, name) for name in os.listdir(match))
                found = [name for name in inside if _format(name) is not None]
                if not found:
                    raise UserError(f"{match}: the directory holds no .jsonl, .txt or .parquet and is no saved dataset")
                files += found
            else:
                files.append(match)
    for name in files:
        if not os.path.isdir(name) and _format(name) is None:
            raise UserError(f"{name}: unknown kind of file; read are .jsonl, .json, .txt (also .gz, .zst) and .parquet")
    return files


def total_bytes(files: Iterable[str]) -> int:
    """Bytes of the input files on disk; directories count with what they hold."""
    return sum(
        sum(part.stat().st_size for part in Path(name).rglob("*") if part.is_file())
        if os.path.isdir(name)
        else os.path.getsize(name)
        for name in files
    )


def read_blocks(files: Iterable[str], columns: Sequence[str] | None = None) -> Iterator[Block]:
    """Cut files (from ``expand_inputs``) into blocks, in order. ``columns``: the keys wanted of tables.

    Raises UserError for a file that cannot be read, naming it.
    """
    for name in files:
        try:
            if os.path.isdir(name):
                yield from _blocks_of_saved_dataset(name, columns)
            elif _format(name) == "parquet":
                yield from _blocks_of_parquet(name, columns)
            elif _format(name) == "text":
                yield from _block_of_text(name)
            else:
                yield from _blocks_of_lines(name)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def parse_block(block: Block) -> Iterator[tuple[str, Document | BadDocument]]:
    """The documents of a block as (location, keys or what is wrong); location is "file:line" or "file:row"."""
    for offset, item in enumerate(block.items):
        location = f"{block.file}:{block.first + offset}"
        if block.kind == "rows":
            yield location, item
        elif block.kind == "text":
            try:
                yield location, {"text": item.decode("utf-8")}
            except UnicodeDecodeError as error:
                yield location, BadDocument(location, f"invalid UTF-8 at byte {error.start} of the file")
        elif item and not item.isspace():
            yield location, _parse_line(location, item)


def read_documents(
    inputs: Sequence[str], columns: Sequence[str] | None = None
) -> Iterator[tuple[str, Document | BadDocument]]:
    """Documents of files, globs and dataset directories, one after the other: (location, keys or what is wrong)."""
    for block in read_blocks(expand_inputs(inputs), columns):
        yield from parse_block(block)


def iterate_documents(inputs: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[tuple[str, Document]]:
    """``read_documents`` for readers that stop at the first bad one, with a UserError that names file and line."""
    for location, document in read_documents(inputs, columns):
        if isinstance(document, BadDocument):
            raise UserError(f"{document.location}: {document.reason}")
        yield location, document


def document_texts(location: str, document: Document | BadDocument, key: str) -> list[str] | BadDocument:
    """The sequences of one document under ``key``: one string, or Megatron's list of strings (sentences)."""
    if isinstance(document, BadDocument):
        return document
    if key not in document:
        there = ", ".join(sorted(map(str, document))[:10]) or "none"
        return BadDocument(location, f'no key "{key}" (keys: {there}); --json-keys names them')
    value = document[key]
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            return BadDocument(location, f'"{key}" is {_type_name(value)}, not a string')
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return BadDocument(
                location, f'"{key}" holds half of a surrogate pair (\\ud800 to \\udfff), which is no text'
            )
    return texts


def _parse_line(location: str, line: bytes) -> Document | BadDocument:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadDocument(location, f"invalid UTF-8 at byte {error.start} of the line")
    except ValueError as error:
        return BadDocument(location, f"invalid JSON: {error}")
    except RecursionError:
        return BadDocument(location, "invalid JSON: nested too deeply")
    if not isinstance(value, dict):
        return BadDocument(location, f"the line is {_type_name(value)}, not a JSON object")
    return value


def _type_name(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def _format(name: str) -> str | None:
    stem = name.removesuffix(".gz").removesuffix(".zst")
    if stem.endswith((".jsonl", ".json")):
        return "jsonl"
    if stem.endswith(".txt"):
        return "text"
    return "parquet" if name.endswith(".parquet") else None


def _is_saved_dataset(directory: str) -> bool:
    return any(os.path.isfile(os.path.join(directory, name)) for name in ("dataset_info.json", "dataset_dict.json"))


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file of one or more frames.

    The library's own stream reader takes a file that ends within a frame for a whole one; this raises EOFError.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw = raw
        self._library = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if self._frame is not None and self._frame.eof:
                compressed, self._frame = self._frame.unused_data, None
            else:
                compressed = b""
            compressed = compressed or self._raw.read(1 << 16)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of its compressed data")
                return 0
            self._frame = self._frame or self._library.decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(compressed))
            except self._error as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _decompressed(name: str, raw: IO[bytes]) -> IO[bytes]:
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BLOCK_BYTES)  # type: ignore[arg-type]
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdReader(raw), BLOCK_BYTES)
    return raw


def _blocks_of_lines(name: str) -> Iterator[Block]:
    with open(name, "rb") as raw:
        stream = _decompressed(name, raw)
        first, seen = 1, 0
        while lines := stream.readlines(BLOCK_BYTES):
            if first == 1:
                lines[0] = lines[0].removeprefix(_BOM)
            position = raw.tell()
            yield Block(name, first, lines, position - seen, "jsonl")
            first, seen = first + len(lines), position


def _block_of_text(name: str) -> Iterator[Block]:
    with open(name, "rb") as raw:
        content = _decompressed(name, raw).read()
        yield Block(name, 1, [content.removeprefix(_BOM)], raw.tell(), "text")


def _blocks_of_parquet(name: str, columns: Sequence[str] | None) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            names = file.schema_arrow.names
            wanted = None if columns is None else [column for column in columns if column in names]
            per_row = os.path.getsize(name) / max(1, file.metadata.num_rows)
            first = 1
            for batch in file.iter_batches(batch_size=_ROWS, columns=wanted):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError as error:
                    where = f"{name}: rows {first} to {first + batch.num_rows - 1}"
                    raise UserError(f"{where}: invalid UTF-8 in a string column: {error.reason}") from error
                yield from _blocks_of_rows(name, first, rows, per_row)
                first += batch.num_rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{name}: cannot be read as Parquet: {error}") from error


def _blocks_of_saved_dataset(name: str, columns: Sequence[str] | None) -> Iterator[Block]:
    import datasets

    loaded = datasets.load_from_disk(name)
    splits = loaded.items() if isinstance(loaded, datasets.DatasetDict) else [("", loaded)]
    all_rows = sum(len(split) for _, split in splits)
    per_row = total_bytes([name]) / max(1, all_rows)
    for split_name, split in splits:
        label = os.path.join(name, split_name) if split_name else name
        if columns is not None:
            split = split.select_columns([column for column in columns if column in split.column_names])
        for start in range(0, len(split), _ROWS):
            batch = split[start : start + _ROWS]
            count = min(_ROWS, len(split) - start)
            rows = [{key: values[i] for key, values in batch.items()} for i in range(count)]
            yield from _blocks_of_rows(label, start + 1, rows, per_row)


def _blocks_of_rows(file: str, first: int, rows: list[Document], per_row: float) -> Iterator[Block]:
    """Cut rows into blocks of about BLOCK_BYTES by the length of their strings."""
    start, size = 0, 0
    for index, row in enumerate(rows):
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if size >= BLOCK_BYTES or index == len(rows) - 1:
            part = rows[start : index + 1]
            yield Block(file, first + start, part, round(per_row * len(part)), "rows")
            start, size = index + 1, 0
