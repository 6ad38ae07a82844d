"""The cleaned corpus and the ledger of what was left out."""

import gzip
import io
import json
import os
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megameta.corpus.audit.audited import Audited
from megameta.corpus.audit.damage import DAMAGE, JUDGED
from megameta.corpus.audit.decide import LEVELS, Decision
from megameta.corpus.audit.inputs import read_source_blocks
from megameta.corpus.audit.manifest import sha256
from megameta.corpus.audit.options import AuditOptions
from megameta.corpus.audit.quality import RULES, STATISTICS
from megameta.corpus.audit.records import BIT, DROP_OF
from megameta.corpus.readers import BadDocument, Block, parse_block
from megameta.errors import UserError


def write_clean(audited: Audited, decision: Decision, options: AuditOptions, directory: Path) -> list[dict[str, Any]]:
    """Write DIRECTORY/clean/SOURCE….jsonl and ledger.jsonl; the files with their documents, bytes and sha256.

    A line of a .jsonl is copied as it stands; other documents become a JSON line with all their keys. Raises UserError
    where the inputs no longer hold the documents that were examined.
    """
    (directory / "clean").mkdir()
    dropped = decision.dropped_D
    number, source = 0, -1
    writer = _Shards(directory, options)
    try:
        for block in read_source_blocks(audited.files, None):
            for line in _lines(block):
                if number >= len(dropped):
                    raise UserError(f"{block.file} has grown while it was read; start again")
                if not dropped[number]:
                    if audited.records[number]["source"] != source:
                        source = int(audited.records[number]["source"])
                        writer.begin(audited.sources[source])
                    writer.add(line if isinstance(line, bytes) else _json_line(line))
                number += 1
        if number != len(dropped):
            raise UserError(f"the inputs hold {number:,} documents now and held {len(dropped):,}; start again")
    finally:
        writer.close()
    with open(directory / "ledger.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=True) + "\n" for line in ledger_lines(audited, decision, options))
    return [
        {"path": name, "documents": documents, "bytes": os.path.getsize(directory / name)}
        | {"sha256": sha256(str(directory / name))}
        for name, documents in writer.files
    ]


def _lines(block: Block) -> Iterator[bytes | dict[str, Any]]:
    """Each document of a block, in the order of ``parse_block``; lines of .jsonl are not parsed."""
    if block.kind == "jsonl":
        for item in block.items:
            if item and not item.isspace():
                yield item.rstrip(b"\r\n") + b"\n"
        return
    for _, document in parse_block(block):
        yield {} if isinstance(document, BadDocument) else document


def _json_line(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    """Parquet's types that JSON lacks: bytes as base64, dates in ISO 8601, others as text."""
    if isinstance(value, bytes):
        return b64encode(value).decode("ascii")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


class _Shards:
    """Writes lines to clean/SOURCE.jsonl, or clean/SOURCE-00000.jsonl and on where there is a limit to a file."""

    def __init__(self, directory: Path, options: AuditOptions) -> None:
        self._directory, self._format = directory, options.clean_format
        self._limit = options.shard_mb * 1_000_000
        self._stream: Any = None
        self.files: list[tuple[str, int]] = []

    def begin(self, source: str) -> None:
        self._source, self._shard = source, 0
        self._open()

    def _open(self) -> None:
        self.close()
        shard = f"-{self._shard:05}" if self._limit else ""
        name = f"clean/{self._source}{shard}.{self._format}"
        raw = open(self._directory / name, "xb")  # noqa: SIM115 (closed by close)
        self._stream = raw
        if self._format.endswith(".gz"):
            # Without a time and a name in its header the file is the same every time.
            self._stream = io.BufferedWriter(_Gzip(raw), 1 << 16)
        elif self._format.endswith(".zst"):
            import zstandard

            self._stream = zstandard.ZstdCompressor(level=3).stream_writer(raw)
        self.files.append((name, 0))
        self._size = 0

    def add(self, line: bytes) -> None:
        if self._limit and self._size and self._size + len(line) > self._limit:
            self._shard += 1
            self._open()
        self._stream.write(line)
        self._size += len(line)
        name, count = self.files[-1]
        self.files[-1] = (name, count + 1)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class _Gzip(gzip.GzipFile):
    """A gzip file that closes the file below it."""

    def __init__(self, raw: Any) -> None:
        super().__init__(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0)
        self._below = raw

    def close(self) -> None:
        super().close()
        self._below.close()


def ledger_lines(audited: Audited, decision: Decision, options: AuditOptions) -> Iterator[dict[str, Any]]:
    """A line for each dropped document, in order: where it is, its source and hash, and each reason with its values."""
    notes = audited.notes_in_order()
    noted, note = next(notes, (len(decision.own_D), {}))
    for number in decision.dropped_D.nonzero()[0].tolist():
        while noted < number:
            noted, note = next(notes, (len(decision.own_D), {}))
        record = audited.records[number]
        own = [name for name, bit in BIT.items() if int(decision.own_D[number]) & int(bit)]
        reasons = [_reason(name, record, note if noted == number else {}, audited, options) for name in own]
        if decision.copy_D[number]:
            kept = int(decision.kept_D[number])
            level = LEVELS[decision.copy_D[number] - 1]
            reasons.append({"reason": level, "kept": audited.location(kept), "kept_hash": text_hash(audited, kept)})
        line = {"document": audited.location(number), "source": audited.sources[record["source"]]}
        yield line | {"hash": None if "bad" in own else text_hash(audited, number), "reasons": reasons}


def text_hash(audited: Audited, number: int) -> str:
    """128 bits of BLAKE2b of the text's UTF-8, in hexadecimal."""
    return bytes(audited.records[number]["exact"].astype("<u8").tobytes()).hex()


def _reason(name: str, record: Any, note: dict[str, Any], audited: Audited, options: AuditOptions) -> dict[str, Any]:
    rule = next((rule for rule in RULES if rule.name == name), None)
    if rule is not None:
        value = float(record["statistics"][STATISTICS.index(rule.statistic)])
        return {"reason": DROP_OF[name], "rule": name, "value": round(value, 6), "limit": options.rules.threshold(name)}
    result: dict[str, Any] = {"reason": name}
    if name in ("bad", "hook", "blocklist"):
        result["value"] = note.get(name)
    elif name in ("secrets", "personal"):
        result["value"] = note.get("patterns")
    elif name == "encoding":
        counts = dict(zip(DAMAGE, record["damage"].tolist()))
        result["value"] = {kind: counts[kind] for kind in JUDGED if counts[kind]}
    elif name == "language":
        result["value"] = audited.language_names[record["language"]]
    elif name == "contaminated" and audited.examples is not None:
        result["value"] = round(float(record["share"]), 6)
        result["example"] = audited.examples.locations[record["example"]]
        result["limit"] = options.rules.contaminated_share
    return result
