"""report.json: an audit's findings as numbers. html.py shows the same; nothing here depends on how it was computed."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta import __version__
from megameta.corpus.audit import patterns
from megameta.corpus.audit.audited import Audited
from megameta.corpus.audit.contamination import FEWEST, NGRAM
from megameta.corpus.audit.damage import DAMAGE, JUDGED
from megameta.corpus.audit.decide import LEVELS, Decision
from megameta.corpus.audit.duplicates import Duplicates
from megameta.corpus.audit.options import AuditOptions
from megameta.corpus.audit.quality import RULES, STATISTICS
from megameta.corpus.audit.records import BIT, CHUNK, DROP_OF, REASONS

SCHEMA = "megameta.audit/1"
#: Examples of anything that the report names.
EXAMPLES = 5
#: Most overlapped evaluation examples, largest groups of duplicates, blocklist entries and reasons of a hook.
LONGEST_LIST = 20
_REASONS_COUNTED = 1000
#: Upper edges of histograms; the last bin is open. Lengths double from bin to bin.
LENGTH_EDGES = [1 << power for power in range(5, 25)]
COMPRESSION_EDGES = [round(0.05 * step, 2) for step in range(1, 21)]
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
_SUMS = ("bytes", "characters", "tokens")


class _Totals:
    """Sums over the records, chunk by chunk. Legend: S sources."""

    def __init__(self, audited: Audited, with_tokens: bool) -> None:
        count = len(audited.sources)
        self.sums = {name: np.zeros(count, np.int64) for name in ("documents", "bad", "empty", "words", *_SUMS)}
        self.compression = np.zeros(count)
        self.reasons = np.zeros((count, len(REASONS)), np.int64)
        self.patterns = np.zeros((2, count, len(patterns.NAMES)), np.int64)  # documents, finds
        self.damage = np.zeros((2, count, len(DAMAGE)), np.int64)
        self.mixed = np.zeros(count, np.int64)
        self.languages = np.zeros((count, len(audited.language_names), 2), np.int64)  # documents, bytes
        lengths = {"bytes": LENGTH_EDGES, "words": LENGTH_EDGES} | ({"tokens": LENGTH_EDGES} if with_tokens else {})
        edges = lengths | {"compression": COMPRESSION_EDGES}
        self.edges = {name: np.array(values) for name, values in edges.items()}
        self.histograms = {name: np.zeros((count, len(values) + 1), np.int64) for name, values in edges.items()}
        self.statistics: list[npt.NDArray[Any]] = []
        self.lengths: list[npt.NDArray[Any]] = []
        self.examples: dict[str, list[str]] = {name: [] for name in REASONS}
        for start in range(0, len(audited.records), CHUNK):
            self._add(audited, start, audited.records[start : start + CHUNK])

    def _add(self, audited: Audited, start: int, part: Any) -> None:
        source, readable = part["source"], (part["reasons"] & BIT["bad"]) == 0
        words = part["statistics"][:, STATISTICS.index("words")].astype(np.int64)
        counted = {
            "documents": readable,
            "bad": ~readable,
            "empty": readable & (part["bytes"] == 0),
            "words": words,
        } | {name: part[name] for name in _SUMS}
        for name, values in counted.items():
            np.add.at(self.sums[name], source, values.astype(np.int64))
        np.add.at(self.compression, source[readable], part["compression"][readable] * part["bytes"][readable])
        for number, name in enumerate(REASONS):
            has = (part["reasons"] & BIT[name]) != 0
            np.add.at(self.reasons[:, number], source, has.astype(np.int64))
            for place in np.flatnonzero(has)[: EXAMPLES - len(self.examples[name])].tolist():
                self.examples[name].append(audited.location(start + place))
        for table, name in ((self.patterns, "patterns"), (self.damage, "damage")):
            np.add.at(table[0], source, (part[name] > 0).astype(np.int64))
            np.add.at(table[1], source, part[name].astype(np.int64))
        ends = part["damage"][:, DAMAGE.index("crlf") :] > 0
        np.add.at(self.mixed, source, ends.all(axis=1).astype(np.int64))
        np.add.at(self.languages[:, :, 0], (source, part["language"]), readable.astype(np.int64))
        np.add.at(self.languages[:, :, 1], (source, part["language"]), part["bytes"])
        for name, edges in self.edges.items():
            values = words if name == "words" else part[name]
            bins = np.searchsorted(edges, values[readable], side="right")
            np.add.at(self.histograms[name], (source[readable], bins), 1)
        self.lengths.append(np.stack([source, readable, part["bytes"], part["tokens"]], axis=1).astype(np.int64))


def report(options: AuditOptions, audited: Audited, decision: Decision | None) -> dict[str, Any]:
    """The content of report.json: the same for any number of workers, and without times."""
    totals = _Totals(audited, options.tokenizer is not None)
    notes = _Notes(audited)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "megameta": __version__,
        "corpus": _corpus(totals, options),
        "sources": _sources(audited, totals, options),
        "histograms": {
            name: {
                "edges": totals.edges[name].tolist(),
                "all": counts.sum(axis=0).tolist(),
                "by_source": {source: counts[number].tolist() for number, source in enumerate(audited.sources)},
            }
            for name, counts in totals.histograms.items()
        },
        "duplicates": _duplicates(options, audited),
        "contamination": _contamination(options, audited, totals),
        "languages": _languages(options, audited, totals),
        "rules": {
            rule.name: {"limit": options.rules.threshold(rule.name), **_reason(rule.name, audited, totals)}
            for rule in RULES
        },
        "documents_with": {name: int(totals.reasons[:, REASONS.index(name)].sum()) for name in ("secrets", "personal")},
        "secrets": _patterns(patterns.SECRETS, audited, totals, notes),
        "personal": _patterns(patterns.PERSONAL, audited, totals, notes),
        "encoding": _encoding(options, audited, totals),
        "blocklist": {**_reason("blocklist", audited, totals), "entries": _most(notes.entries)}
        if options.blocklists
        else None,
        "hook": {"function": options.hook, **_reason("hook", audited, totals), "reasons": _most(notes.reasons)}
        if options.hook
        else None,
        "bad_documents": {"documents": audited.counts.bad, "named": audited.bad_named},
        "filter": _filter(options, audited, decision),
    }
    return result


class _Notes:
    """What the notes of all documents come to."""

    def __init__(self, audited: Audited) -> None:
        self.entries: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {name: [] for name in patterns.NAMES}
        for number, note in audited.notes_in_order():
            self.entries.update(note.get("blocklist", ()))
            if "hook" in note and (note["hook"] in self.reasons or len(self.reasons) < _REASONS_COUNTED):
                self.reasons[note["hook"]] += 1
            for name, masked in note.get("patterns", {}).items():
                if len(self.examples[name]) < EXAMPLES:
                    self.examples[name].append({"document": audited.location(number), "found": masked[0]})


def _most(counted: Counter[str]) -> dict[str, int]:
    """The commonest, equally common ones in alphabetical order."""
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:LONGEST_LIST])


def _ratio(part: Any, whole: Any) -> float | None:
    return round(float(part) / float(whole), 6) if whole else None


def _corpus(totals: _Totals, options: AuditOptions) -> dict[str, Any]:
    sums = {name: int(values.sum()) for name, values in totals.sums.items()}
    return _sized(sums, totals.compression.sum(), options)


def _sized(sums: dict[str, int], compression: Any, options: AuditOptions) -> dict[str, Any]:
    tokens = sums["tokens"] if options.tokenizer else None
    return sums | {
        "tokens": tokens,
        "bytes_per_token": _ratio(sums["bytes"], tokens),
        "compression": _ratio(compression, sums["bytes"]),
    }


def _sources(audited: Audited, totals: _Totals, options: AuditOptions) -> dict[str, Any]:
    lengths = np.concatenate(totals.lengths)
    result = {}
    for number, source in enumerate(audited.sources):
        sums = {name: int(values[number]) for name, values in totals.sums.items()}
        entry = _sized(sums, totals.compression[number], options)
        chosen = lengths[(lengths[:, 0] == number) & (lengths[:, 1] == 1)]
        for column, name in ((2, "bytes"), (3, "tokens")):
            if len(chosen) and (name == "bytes" or options.tokenizer):
                values = np.percentile(chosen[:, column], PERCENTILES, method="nearest")
                entry[f"{name}_percentiles"] = {str(at): int(value) for at, value in zip(PERCENTILES, values)}
        result[source] = entry | {"files": sum(file.source == source for file in audited.files)}
    return result


def _reason(name: str, audited: Audited, totals: _Totals) -> dict[str, Any]:
    counts = totals.reasons[:, REASONS.index(name)]
    by_source = {source: int(counts[number]) for number, source in enumerate(audited.sources) if counts[number]}
    return {"documents": int(counts.sum()), "by_source": by_source, "examples": totals.examples[name]}


def _patterns(
    group: tuple[patterns.Pattern, ...], audited: Audited, totals: _Totals, notes: _Notes
) -> dict[str, dict[str, Any]]:
    result = {}
    for pattern in group:
        column = patterns.NAMES.index(pattern.name)
        documents, finds = totals.patterns[:, :, column]
        result[pattern.name] = {
            "documents": int(documents.sum()),
            "finds": int(finds.sum()),
            "by_source": {audited.sources[number]: int(documents[number]) for number in np.flatnonzero(documents)},
            "examples": notes.examples[pattern.name],
        }
    return result


def _encoding(options: AuditOptions, audited: Audited, totals: _Totals) -> dict[str, Any]:
    kinds = {}
    for column, name in enumerate(DAMAGE):
        documents, finds = totals.damage[:, :, column]
        by_source = {audited.sources[number]: int(documents[number]) for number in np.flatnonzero(documents)}
        kinds[name] = {
            "documents": int(documents.sum()),
            "characters": int(finds.sum()),
            "judged": name in JUDGED,
            "by_source": by_source,
        }
    mixed = {"mixed_line_ends": int(totals.mixed.sum())}
    return {"limit": options.rules.max_damage, **_reason("encoding", audited, totals), "kinds": kinds, **mixed}


def _languages(options: AuditOptions, audited: Audited, totals: _Totals) -> dict[str, Any] | None:
    if not options.find_languages:
        return None
    whole = totals.languages.sum(axis=0)
    order = sorted(np.flatnonzero(whole[:, 0]).tolist(), key=lambda code: (-int(whole[code, 1]), code))
    counted = {
        audited.language_names[code]: {
            "documents": int(whole[code, 0]),
            "bytes": int(whole[code, 1]),
            "by_source": {
                source: int(totals.languages[number, code, 0])
                for number, source in enumerate(audited.sources)
                if totals.languages[number, code, 0]
            },
        }
        for code in order
    }
    wanted = list(options.rules.languages) if options.rules.languages else None
    return {"wanted": wanted, **_reason("language", audited, totals), "languages": counted}


def _duplicates(options: AuditOptions, audited: Audited) -> dict[str, Any]:
    found = audited.duplicates
    if found is None:
        raise ValueError("duplicates were not looked for")
    source = np.concatenate(
        [audited.records["source"][start : start + CHUNK] for start in range(0, len(audited.records), CHUNK)]
    ).astype(np.int64)
    levels = {}
    for level in LEVELS:
        group = getattr(found, level)
        copies = group != np.arange(len(group))
        levels[level] = {
            "copies": int(copies.sum()),
            "groups": len(np.unique(group[copies])),
            "within_and_across": _matrix(audited.sources, source, group),
        }
    return {
        "near_jaccard": options.rules.near_jaccard,
        "pairs_compared": found.pairs,
        **levels,
        "largest": _largest(audited, found),
    }


def _matrix(sources: list[str], source: npt.NDArray[np.int64], group: npt.NDArray[np.int64]) -> dict[str, Any]:
    """For sources A and B: documents of A that have a duplicate (another document) in B. Rows without any are left
    out."""
    copies = np.flatnonzero(group != np.arange(len(group)))
    members = np.unique(np.concatenate([copies, group[copies]]))
    pairs, counts = np.unique(np.stack([group[members], source[members]], axis=1), axis=0, return_counts=True)
    result: dict[str, dict[str, int]] = {}
    starts = np.flatnonzero(np.diff(pairs[:, 0], prepend=-1)) if len(pairs) else np.empty(0, np.int64)
    for start, end in zip(starts.tolist(), np.append(starts[1:], len(pairs)).tolist()):
        here = list(zip(pairs[start:end, 1].tolist(), counts[start:end].tolist()))
        for a, count_a in here:
            for b, count_b in here:
                if a != b or count_b > 1:
                    row = result.setdefault(sources[a], {})
                    row[sources[b]] = row.get(sources[b], 0) + count_a
    return {name: {other: result[name][other] for other in sorted(result[name])} for name in sorted(result)}


def _largest(audited: Audited, found: Duplicates) -> list[dict[str, Any]]:
    """The groups with most documents, each with its first members."""
    copies = np.flatnonzero(found.near != np.arange(len(found.near)))
    firsts, counts = np.unique(found.near[copies], return_counts=True)
    order = np.lexsort((firsts, -counts))[:LONGEST_LIST]
    result = []
    for first, count in zip(firsts[order].tolist(), counts[order].tolist()):
        members = copies[found.near[copies] == first][: EXAMPLES - 1].tolist()
        examples = [audited.location(number) for number in (first, *members)]
        result.append({"documents": count + 1, "examples": examples})
    return result


def contamination_lines(options: AuditOptions, audited: Audited) -> Iterator[dict[str, Any]]:
    """A line for each evaluation example; see docs/audit.md."""
    shares = example_shares(audited)
    if audited.examples is None or audited.index is None or shares is None:
        return
    limit = options.rules.contaminated_share
    for number, location in enumerate(audited.examples.locations):
        judged = bool(audited.index.counts_E[number])
        share = round(float(shares[number]), 6)
        yield {
            "set": audited.examples.names[audited.examples.set_of[number]],
            "example": location,
            "words": int(audited.examples.words[number]),
            "ngrams": int(audited.index.counts_E[number]),
            "share": share if judged else None,
            "contaminated": limit is not None and share >= limit if judged else None,
        }


def example_shares(audited: Audited) -> npt.NDArray[np.float64] | None:
    """float64[examples]: the share of each one's n-grams that occur anywhere in the corpus."""
    if audited.index is None or audited.seen_G is None:
        return None
    return audited.index.shares(np.flatnonzero(audited.seen_G))


def _contamination(options: AuditOptions, audited: Audited, totals: _Totals) -> dict[str, Any] | None:
    if audited.examples is None or audited.touched is None:
        return None
    lines = list(contamination_lines(options, audited))
    sets = {}
    for number, name in enumerate(audited.examples.names):
        mine = [line for line in lines if line["set"] == name]
        judged = [line for line in mine if line["share"] is not None]
        shares = np.array([line["share"] for line in judged])
        touched = audited.touched[number]
        worst = sorted(judged, key=lambda line: -line["share"])[:LONGEST_LIST]
        sets[name] = {
            "examples": len(mine),
            "too_short": len(mine) - len(judged),
            "contaminated": sum(bool(line["contaminated"]) for line in judged),
            "touched": int((shares > 0).sum()),
            "documents_touching": int(touched.sum()),
            "by_source": {audited.sources[place]: int(touched[place]) for place in np.flatnonzero(touched)},
            "share_histogram": np.histogram(shares, bins=10, range=(0, 1))[0].tolist(),
            "most_overlapped": [line for line in worst if line["share"] > 0],
        }
    limit = options.rules.contaminated_share
    return {"ngram": NGRAM, "fewest_words": FEWEST, "limit": limit, **_reason("contaminated", audited, totals)} | {
        "sets": sets
    }


def _filter(options: AuditOptions, audited: Audited, decision: Decision | None) -> dict[str, Any] | None:
    if decision is None:
        return None
    dropped = decision.dropped_D
    by_reason: dict[str, int] = {}
    for name in REASONS:
        count = int(np.count_nonzero(decision.own_D & BIT[name]))
        if count:
            key = f"{DROP_OF[name]}: {name}" if DROP_OF[name] != name else name
            by_reason[key] = count
    for code, level in enumerate(LEVELS, 1):
        if count := int(np.count_nonzero(decision.copy_D == code)):
            by_reason[level] = count
    kept_bytes = sum(
        int(part["bytes"][~dropped[start : start + CHUNK]].sum())
        for start in range(0, len(dropped), CHUNK)
        for part in [audited.records[start : start + CHUNK]]
    )
    return {
        "drop": list(options.drop),
        "read": len(dropped),
        "dropped": int(dropped.sum()),
        "kept": int((~dropped).sum()),
        "kept_bytes": kept_bytes,
        "by_reason": by_reason,
    }
