"""One block of documents, examined: what worker processes do."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta.corpus.audit import patterns
from megameta.corpus.audit.blocklist import Blocklist, Hook, ask_hook, load_hook
from megameta.corpus.audit.contamination import NgramIndex
from megameta.corpus.audit.damage import DAMAGE, JUDGED, damage
from megameta.corpus.audit.duplicates import shingles, signatures
from megameta.corpus.audit.language import UNDETERMINED, LanguageFinder
from megameta.corpus.audit.options import AuditOptions
from megameta.corpus.audit.quality import statistics
from megameta.corpus.audit.records import BIT, RECORD, Records, broken_rules
from megameta.corpus.audit.words import Hashes, WordTable
from megameta.corpus.readers import BadDocument, Block, Document, document_texts, parse_block
from megameta.tokenizers import Tokenizer, load_tokenizer

#: Bytes of a document whose compression is measured.
COMPRESSED = 1 << 16
#: Bits of a document's flags while its block is examined.
_SPACED, _ENGLISH = 1, 2


@dataclass(frozen=True)
class Findings:
    """What one block holds. Legend: D documents, bad ones included; S of them have a signature.

    ``notes``: (place in the block, what a record has no room for). ``shared``: numbers of the evaluation n-grams that
    each document with hits has, with its place.
    """

    file: int
    label: str
    records_D: Records
    signatures_S: npt.NDArray[np.uint32]
    notes: list[tuple[int, dict[str, Any]]]
    shared: list[tuple[int, npt.NDArray[np.int64]]]
    bad: list[BadDocument]
    input_bytes: int


@dataclass
class _Batch:
    """What is collected over the documents of a block, before it becomes arrays."""

    records: Records
    texts: list[str]
    places: list[int]  # in the block, of the texts
    shingles: list[Hashes]
    flags: npt.NDArray[np.uint8]
    notes: list[tuple[int, dict[str, Any]]]
    shared: list[tuple[int, npt.NDArray[np.int64]]]
    bad: list[BadDocument]


class Examiner:
    """Examines blocks; every worker process holds one. ``ngram_file``: of evaluation sets, or None."""

    def __init__(self, options: AuditOptions, ngram_file: str | None) -> None:
        self._options = options
        self._tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
        self._blocklist = Blocklist.load(options.blocklists) if options.blocklists else None
        self._hook: Hook | None = load_hook(options.hook) if options.hook else None
        self._languages = LanguageFinder() if options.find_languages else None
        self._ngrams = NgramIndex.load(ngram_file) if ngram_file else None
        self._table = WordTable(self._blocklist.begins_entry if self._blocklist else None)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    @property
    def language_names(self) -> list[str]:
        return self._languages.names if self._languages else [UNDETERMINED]

    def examine(self, block: Block) -> Findings:
        parsed = list(self._parse(block))
        count = len(parsed)
        batch = _Batch(np.zeros(count, RECORD), [], [], [], np.zeros(count, np.uint8), [], [], [])
        batch.records["example"] = -1
        for place, (location, document) in enumerate(parsed):
            texts = document_texts(location, document, self._options.json_key)
            batch.records[place]["item"] = int(location.rpartition(":")[2])
            if isinstance(texts, BadDocument) or isinstance(document, BadDocument):
                bad = texts if isinstance(texts, BadDocument) else BadDocument(location, "cannot be read")
                reason = bad.reason.replace("--json-keys names them", "--json-key names it")
                bad = BadDocument(bad.location, patterns.redact(reason))
                batch.bad.append(bad)
                batch.records[place]["reasons"] = BIT["bad"]
                batch.notes.append((place, {"bad": bad.reason}))
                continue
            self._document(batch, place, location, "\n".join(texts), document)
        self._tokens(batch, block)
        spaced, english = (batch.flags & _SPACED) > 0, (batch.flags & _ENGLISH) > 0
        readable = (batch.records["reasons"] & BIT["bad"]) == 0
        broken = broken_rules(batch.records, spaced, self._options.rules, english)
        batch.records["reasons"][readable] |= broken[readable]
        return Findings(
            block.end.file,
            block.file,
            batch.records,
            signatures(batch.shingles, self._options.seed),
            batch.notes,
            batch.shared,
            batch.bad,
            block.input_bytes,
        )

    def _parse(self, block: Block) -> Iterator[tuple[str, Document | BadDocument]]:
        if block.kind != "tokens":
            yield from parse_block(block)
            return
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise ValueError("a tokenised dataset without a tokenizer")
        for offset, ids in enumerate(block.items):
            location = f"{block.file}:{block.first + offset}"
            if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < tokenizer.vocab_size):
                yield location, BadDocument(location, f"ids beyond the tokenizer's {tokenizer.vocab_size}")
                continue
            text = tokenizer.decode(ids[:-1] if len(ids) and ids[-1] == tokenizer.eod_id else ids)
            yield location, {self._options.json_key: text}

    def _document(self, batch: _Batch, place: int, location: str, text: str, document: Document) -> None:
        record = batch.records[place]
        utf8 = text.encode()
        counts, unspaced = damage(text)
        words = self._table.words(text, unspaced > 0)
        language = self._languages.find(text) if self._languages else None
        record["bytes"], record["characters"] = len(utf8), len(text)
        start = utf8[:COMPRESSED]
        record["compression"] = len(zlib.compress(start, 1)) / len(start) if start else 1.0
        record["statistics"] = statistics(text, words)
        record["damage"] = [min(counts[name], 0xFFFFFFFF) for name in DAMAGE]
        record["exact"] = _digest(utf8)
        record["normalised"] = _digest(words.folded.tobytes())
        note: dict[str, Any] = {}
        reasons = self._patterns(record, text, utf8, note)
        damaged = sum(counts[name] for name in JUDGED)
        rules = self._options.rules
        if rules.max_damage is not None and damaged > rules.max_damage * len(text):
            reasons |= BIT["encoding"]
        if language is not None:
            record["language"] = self.language_names.index(language)
            if rules.languages is not None and language not in rules.languages:
                reasons |= BIT["language"]
        if unspaced * 4 <= len(text):
            batch.flags[place] |= _SPACED
        if language in (None, "en"):
            batch.flags[place] |= _ENGLISH
        if self._blocklist is not None and (entries := self._blocklist.matches(text, words.listed)):
            reasons |= BIT["blocklist"]
            note["blocklist"] = entries[:20]
        if self._hook is not None and self._options.hook is not None:
            reason = ask_hook(self._hook, self._options.hook, location, text, document)
            if reason is not None:
                reasons |= BIT["hook"]
                note["hook"] = patterns.redact(reason)
        if self._ngrams is not None and (hits := self._ngrams.look_up(words.bare)) is not None:
            record["share"], record["example"] = hits.share, hits.example
            batch.shared.append((place, hits.ngrams))
            if rules.contaminated_share is not None and hits.share >= rules.contaminated_share:
                reasons |= BIT["contaminated"]
        record["reasons"] = reasons
        if note:
            batch.notes.append((place, note))
        if len(words.bare):
            record["sketch"] = True
            batch.shingles.append(shingles(words.bare))
        batch.texts.append(text)
        batch.places.append(place)

    def _patterns(self, record: Any, text: str, utf8: bytes, note: dict[str, Any]) -> np.uint64:
        found = patterns.find(text, utf8)
        reasons = np.uint64(0)
        secret = {pattern.name for pattern in patterns.SECRETS}
        for name, matches in found.items():
            record["patterns"][patterns.NAMES.index(name)] = len(matches)
            reasons |= BIT["secrets" if name in secret else "personal"]
        if found:
            note["patterns"] = {name: [patterns.mask(match) for match in found[name][:3]] for name in found}
        return reasons

    def _tokens(self, batch: _Batch, block: Block) -> None:
        if self._tokenizer is None:
            return
        if block.kind == "tokens":
            batch.records["tokens"] = [len(ids) for ids in block.items]
            return
        batch.records["tokens"][batch.places] = self._tokenizer.encode_flat(batch.texts)[1]


def _digest(data: bytes) -> npt.NDArray[np.uint64]:
    return np.frombuffer(blake2b(data, digest_size=16).digest(), dtype="<u8")


def start_worker(argument: tuple[AuditOptions, str | None]) -> Callable[[Block], Findings]:
    return Examiner(*argument).examine
