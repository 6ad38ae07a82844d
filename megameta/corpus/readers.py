"""Documents out of the files that users have, in constant memory.

Reading is split in two so that the second half can run in other processes: ``read_blocks`` cuts the inputs into
blocks of about a megabyte, in a stable order, and ``parse_block`` turns a block into documents.

=============================================  ================================================================
.jsonl, .json, also .gz and .zst               one JSON object a line; blank lines are skipped
.txt, also .gz and .zst                        the whole file is one document, under the key "text"
.parquet, .arrow (IPC file or stream)          one row a document
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
class Position:
    """A place between two documents: in the file of this number (from 0), after so many lines or rows of it.

    ``offset``: bytes of the decompressed file before it; 0 for tables, where the row says it all.
    """

    file: int = 0
    items: int = 0
    offset: int = 0


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
    #: Where reading goes on after this block.
    end: Position


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
                    raise UserError(
                        f"{match}: the directory holds no .jsonl, .txt, .parquet or .arrow and is no saved dataset"
                    )
                files += found
            else:
                files.append(match)
    for name in files:
        if not os.path.isdir(name) and _format(name) is None:
            raise UserError(
                f"{name}: unknown kind of file; read are .jsonl, .json, .txt (also .gz, .zst), .parquet and .arrow"
            )
    return files


def total_bytes(files: Iterable[str]) -> int:
    """Bytes of the input files on disk; directories count with what they hold."""
    return sum(
        sum(part.stat().st_size for part in Path(name).rglob("*") if part.is_file())
        if os.path.isdir(name)
        else os.path.getsize(name)
        for name in files
    )


def read_blocks(
    files: Iterable[str], columns: Sequence[str] | None = None, start: Position | None = None
) -> Iterator[Block]:
    """Cut files (from ``expand_inputs``) into blocks, in order. ``columns``: the keys wanted of tables.

    ``start``: the ``end`` of a block of an earlier call; reading goes on there. Uncompressed files are sought in,
    compressed ones decompressed up to it. Raises UserError for a file that cannot be read, naming it.
    """
    start = start or Position()
    for number, name in enumerate(files):
        if number < start.file:
            continue
        at = start if number == start.file else Position(number)
        try:
            if os.path.isdir(name):
                yield from _blocks_of_saved_dataset(name, columns, at)
            elif _format(name) == "parquet":
                yield from _blocks_of_parquet(name, columns, at)
            elif _format(name) == "arrow":
                yield from _blocks_of_arrow(name, columns, at)
            elif _format(name) == "text":
                yield from _block_of_text(name, at)
            else:
                yield from _blocks_of_lines(name, at)
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
    return next((kind for kind in ("parquet", "arrow") if name.endswith("." + kind)), None)


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


def _skip(stream: IO[bytes], raw: IO[bytes], offset: int) -> None:
    """Go on at byte ``offset`` of a stream that is at its beginning."""
    if stream is raw:
        raw.seek(offset)
        return
    while offset > 0:
        read = len(stream.read(min(offset, BLOCK_BYTES)))
        if not read:
            raise EOFError("the file ends before the place where reading goes on")
        offset -= read


def _blocks_of_lines(name: str, at: Position) -> Iterator[Block]:
    with open(name, "rb") as raw:
        stream = _decompressed(name, raw)
        _skip(stream, raw, at.offset)
        seen = raw.tell() if at.offset else 0
        items, offset = at.items, at.offset
        while lines := stream.readlines(BLOCK_BYTES):
            first, items = items + 1, items + len(lines)
            offset += sum(map(len, lines))
            if first == 1:
                lines[0] = lines[0].removeprefix(_BOM)
            position = raw.tell()
            yield Block(name, first, lines, position - seen, "jsonl", Position(at.file, items, offset))
            seen = position


def _block_of_text(name: str, at: Position) -> Iterator[Block]:
    if at.items:
        return
    with open(name, "rb") as raw:
        content = _decompressed(name, raw).read()
        yield Block(name, 1, [content.removeprefix(_BOM)], raw.tell(), "text", Position(at.file, 1))


def _blocks_of_parquet(name: str, columns: Sequence[str] | None, at: Position) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(name) as file:
            names = file.schema_arrow.names
            wanted = None if columns is None else [column for column in columns if column in names]
            per_row = os.path.getsize(name) / max(1, file.metadata.num_rows)
            group = before = 0  # whole row groups that are done, and their rows
            while group < file.num_row_groups:
                rows = file.metadata.row_group(group).num_rows
                if before + rows > at.items:
                    break
                group, before = group + 1, before + rows
            groups = list(range(group, file.num_row_groups))
            batches = file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=wanted) if groups else iter(())
            yield from _blocks_of_batches(name, batches, before, at, per_row)
    except pyarrow.ArrowException as error:
        raise UserError(f"{name}: cannot be read as Parquet: {error}") from error


def _blocks_of_arrow(name: str, columns: Sequence[str] | None, at: Position) -> Iterator[Block]:
    """Arrow's IPC format: a file (Feather), or a stream as the datasets library caches it."""
    import pyarrow

    try:
        with pyarrow.memory_map(name) as source:
            try:
                file = pyarrow.ipc.open_file(source)
                batches: Iterator[Any] = map(file.get_batch, range(file.num_record_batches))
                names = file.schema.names
            except pyarrow.ArrowInvalid:
                source.seek(0)
                stream = pyarrow.ipc.open_stream(source)
                batches, names = iter(stream), stream.schema.names
            if columns is not None:
                wanted = [column for column in columns if column in names]
                batches = (batch.select(wanted) for batch in batches)
            yield from _blocks_of_batches(name, batches, 0, at, None)
    except pyarrow.ArrowException as error:
        raise UserError(f"{name}: cannot be read as Arrow: {error}") from error


def _blocks_of_batches(
    name: str, batches: Iterator[Any], before: int, at: Position, per_row: float | None
) -> Iterator[Block]:
    """Blocks of record batches of which the first begins after ``before`` rows; rows before ``at`` are left out.

    ``per_row``: bytes of the file for each row; None: the bytes of the batch itself.
    """
    for batch in batches:
        skip = max(0, at.items - before)
        for first in range(skip, batch.num_rows, _ROWS):
            part = batch.slice(first, _ROWS)
            number = before + first + 1
            try:
                rows = part.to_pylist()
            except UnicodeDecodeError as error:
                where = f"{name}: rows {number} to {number + part.num_rows - 1}"
                raise UserError(f"{where}: invalid UTF-8 in a string column: {error.reason}") from error
            share = part.nbytes / part.num_rows if per_row is None else per_row
            yield from blocks_of_rows(name, number, rows, share, Position(at.file, number - 1))
        before += batch.num_rows


def _blocks_of_saved_dataset(name: str, columns: Sequence[str] | None, at: Position) -> Iterator[Block]:
    import datasets

    loaded = datasets.load_from_disk(name)
    splits = loaded.items() if isinstance(loaded, datasets.DatasetDict) else [("", loaded)]
    all_rows = sum(len(split) for _, split in splits)
    per_row = total_bytes([name]) / max(1, all_rows)
    before = 0  # rows of the splits that are done
    for split_name, split in splits:
        label = os.path.join(name, split_name) if split_name else name
        if columns is not None:
            split = split.select_columns([column for column in columns if column in split.column_names])
        for start in range(max(0, at.items - before), len(split), _ROWS):
            batch = split[start : start + _ROWS]
            count = min(_ROWS, len(split) - start)
            rows = [{key: values[i] for key, values in batch.items()} for i in range(count)]
            yield from blocks_of_rows(label, start + 1, rows, per_row, Position(at.file, before + start))
        before += len(split)


def blocks_of_rows(file: str, first: int, rows: list[Document], per_row: float, at: Position) -> Iterator[Block]:
    """Cut rows, which begin at ``at``, into blocks of about BLOCK_BYTES by the length of their strings."""
    start, size = 0, 0
    for index, row in enumerate(rows):
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if size >= BLOCK_BYTES or index == len(rows) - 1:
            part = rows[start : index + 1]
            end = Position(at.file, at.items + index + 1)
            yield Block(file, first + start, part, round(per_row * len(part)), "rows", end)
            start, size = index + 1, 0
