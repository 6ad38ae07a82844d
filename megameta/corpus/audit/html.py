"""report.html: the findings on one page that needs no network, with every text of the corpus escaped."""

from collections.abc import Sequence
from html import escape
from typing import Any

from megameta.html import note as soft_note
from megameta.html import number, page, table

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 480, 190, 56, 46
_BAR = "#3a6ea5"
_TITLES = {
    "bytes": ("Length of documents", "bytes (UTF-8)"),
    "words": ("Words of documents", "words"),
    "tokens": ("Tokens of documents", "tokens"),
    "compression": ("Compression", "compressed bytes / bytes (zlib level 1, first 64 KB)"),
}
_DAMAGE = {
    "replacement": "U+FFFD, what decoders put for broken bytes",
    "mojibake": "UTF-8 read as Latin-1 or Windows-1252 (Ã©, â€™)",
    "nul": "NUL characters",
    "control": "other control characters",
    "inner_bom": "byte-order marks (U+FEFF)",
    "private_use": "private-use characters",
    "unassigned": "characters that Unicode does not assign",
    "crlf": "CR LF line ends",
    "bare_lf": "LF line ends",
}


def render(report: dict[str, Any]) -> str:
    """The page for a report (see report.py), without references to anything outside it."""
    parts = [
        ("overview", "Overview", _overview(report)),
        ("sources", "Sources", _sources(report)),
        ("lengths", "Lengths and compression", _histograms(report)),
        ("duplicates", "Duplicates", _duplicates(report["duplicates"])),
        ("contamination", "Contamination", _contamination(report["contamination"])),
        ("languages", "Languages", _languages(report)),
        ("rules", "Quality and repetition (Gopher)", _rules(report)),
        ("secrets", "Secrets", _patterns(report["secrets"], "Keys, tokens and passwords, by their form.")),
        ("personal", "Personal data", _patterns(report["personal"], "Addresses and numbers, by their form.")),
        ("encoding", "Encoding", _encoding(report)),
        ("forbidden", "Blocklist and hook", _forbidden(report)),
        ("bad", "Unreadable documents", _bad(report["bad_documents"])),
        ("filter", "Filter", _filter(report["filter"])),
    ]
    head = (
        f"<p class=note>megameta {escape(report['megameta'])}, tools/audit_corpus.py. The same numbers are in"
        " report.json; what was read, with hashes, in manifest.json.</p>"
    )
    return page("Corpus audit", head, parts)


def _share(part: int, whole: int) -> str:
    return f"{part:,}" + (f" ({part / whole:.2%})" if part and whole else "")


def _none(what: str = "None.") -> str:
    return soft_note(what)


def _by_source(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _overview(report: dict[str, Any]) -> str:
    corpus, duplicates = report["corpus"], report["duplicates"]
    documents = corpus["documents"]
    cards = [
        ("documents", number(documents)),
        ("bytes of text", number(corpus["bytes"])),
        ("tokens", number(corpus["tokens"])),
        ("bytes per token", number(corpus["bytes_per_token"])),
        ("copies, exact or near", _share(duplicates["near"]["copies"], documents)),
        ("with secrets", number(report["documents_with"]["secrets"])),
        ("unreadable", number(corpus["bad"])),
        ("empty", number(corpus["empty"])),
    ]
    if report["contamination"]:
        cards.append(("documents with an evaluation example", number(report["contamination"]["documents"])))
    if report["filter"]:
        cards.append(("dropped by the filter", _share(report["filter"]["dropped"], report["filter"]["read"])))
    return (
        "<div class=cards>"
        + "".join(f"<div class=card><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in cards)
        + "</div>"
    )


def _sources(report: dict[str, Any]) -> str:
    whole = report["corpus"]["bytes"]
    head = ["source", "files", "documents", "bytes", "share", "words", "tokens", "bytes per token", "compression"]
    rows = [
        [name, entry["files"], entry["documents"], entry["bytes"]]
        + [f"{entry['bytes'] / whole:.2%}" if whole else "–"]
        + [entry[key] for key in ("words", "tokens", "bytes_per_token", "compression")]
        for name, entry in report["sources"].items()
    ]
    shown = ["0", "5", "25", "50", "75", "95", "100"]
    lengths = [
        [name, *(entry["bytes_percentiles"][at] for at in shown)]
        for name, entry in report["sources"].items()
        if "bytes_percentiles" in entry
    ]
    return (
        table(head, rows)
        + "<h3>Bytes of a document (percentiles)</h3>"
        + table(["source", *(f"{at} %" for at in shown)], lengths)
    )


def _histograms(report: dict[str, Any]) -> str:
    figures = [
        f"<figure><figcaption>{escape(_TITLES[name][0])}</figcaption>"
        f"{bars(found['edges'], found['all'], _TITLES[name][1], 'documents')}</figure>"
        for name, found in report["histograms"].items()
    ]
    note = _none("Much repeated text compresses to little; random characters and very short texts hardly at all.")
    return f"<div class=plots>{''.join(figures)}</div>{note}"


def bars(edges: Sequence[float], counts: Sequence[int], x_label: str, y_label: str) -> str:
    """A histogram as inline SVG. Bin i ends before edges[i]; the last bin is open; empty bins at both ends are cut."""
    filled = [place for place, count in enumerate(counts) if count]
    if not filled:
        return _none("No documents.")
    first, last = filled[0], filled[-1]
    shown = counts[first : last + 1]
    top = max(shown)
    width = (_WIDTH - _LEFT - 8) / len(shown)
    height = _HEIGHT - _BOTTOM - 12
    out = [f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(x_label)}">']
    for part in (0, 0.5, 1):
        y = 12 + height * (1 - part)
        ends = f'x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"'
        out.append(f'<line {ends} stroke="currentColor" stroke-opacity="0.2"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(top * part)}</text>')
    step = max(1, -(-len(shown) // 8))
    for place, count in enumerate(shown):
        x, tall = _LEFT + place * width, height * count / top
        low = edges[first + place - 1] if first + place else 0
        high = edges[first + place] if first + place < len(edges) else None
        title = f"{_short(low)} to {'' if high is None else 'below ' + _short(high)}: {count:,} {y_label}"
        out.append(
            f'<rect x="{x + 0.5:.1f}" y="{12 + height - tall:.1f}" width="{max(1.0, width - 1):.1f}" '
            f'height="{tall:.1f}" fill="{_BAR}"><title>{escape(title)}</title></rect>'
        )
        if place % step == 0:
            out.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_short(low)}</text>')
    middle = (_LEFT + _WIDTH) / 2
    out.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    y = 12 + height / 2
    out.append(f'<text transform="translate(11 {y}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text></svg>')
    return "".join(out)


def _short(value: float) -> str:
    """Powers of 1024 as Ki and Mi where they are exact, else a plain number."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1048576:g} Mi" if value >= 1048576 else f"{value / 1024:g} Ki"
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


def _duplicates(found: dict[str, Any]) -> str:
    limit = found["near_jaccard"]
    rows = [
        [words, found[level]["copies"], found[level]["groups"]]
        for level, words in (
            ("exact", "exact: the same bytes"),
            ("normalised", "normalised: the same but for case and white space"),
            ("near", f"near: MinHash of 5-word shingles, Jaccard at least {limit}"),
        )
    ]
    head = ["kind (each includes those above it)", "copies", "groups"]
    largest = [[f"{group['documents']:,}", "; ".join(group["examples"])] for group in found["largest"]]
    return (
        _none("A copy is a document that is not the first of its group.")
        + table(head, rows)
        + "<h3>Within and across sources (near)</h3>"
        + _matrix(found["near"]["within_and_across"])
        + "<h3>Within and across sources (exact)</h3>"
        + _matrix(found["exact"]["within_and_across"])
        + "<h3>Largest groups</h3>"
        + table(["documents", "first members"], largest, text=[1])
    )


def _matrix(matrix: dict[str, dict[str, int]]) -> str:
    if not matrix:
        return _none()
    names = sorted({*matrix, *(other for row in matrix.values() for other in row)})
    note = _none("Documents of the row's source that have a duplicate in the column's source.")
    if len(names) > 20:  # a list is easier to read than a wide table
        pairs = [(-count, f"{name} in {other}") for name, row in matrix.items() for other, count in row.items()]
        return note + table(["sources", "documents"], [[name, -count] for count, name in sorted(pairs)[:100]])
    rows = [[name, *(matrix.get(name, {}).get(other, 0) for other in names)] for name in names]
    return note + table(["", *names], rows)


def _contamination(found: dict[str, Any] | None) -> str:
    if found is None:
        return _none("Not looked for: name evaluation sets with --against NAME=GLOB.")
    note = (
        f"An example is contaminated where at least {found['limit']} of its {found['ngram']}-grams of words occur "
        f"in the corpus. Examples of {found['fewest_words']} to {found['ngram'] - 1} words count as one n-gram, "
        "shorter ones are not judged. contamination.jsonl lists every example."
    )
    head = [
        "evaluation set",
        "examples",
        "contaminated",
        "with any shared n-gram",
        "too short",
        "documents touching it",
    ]
    rows = [
        [
            name,
            entry["examples"],
            _share(entry["contaminated"], entry["examples"]),
            entry["touched"],
            entry["too_short"],
            entry["documents_touching"],
        ]
        for name, entry in found["sets"].items()
    ]
    parts = [_none(note), table(head, rows)]
    for name, entry in found["sets"].items():
        parts.append(f"<h3>{escape(name)}</h3>")
        parts.append(table(["source", "documents touching it"], entry["by_source"].items()))
        if entry["most_overlapped"]:
            edges = [round(0.1 * step, 1) for step in range(1, 10)]
            plot = bars(edges, entry["share_histogram"], "share of an example's n-grams in the corpus", "examples")
            worst = [[line["example"], line["share"], line["words"]] for line in entry["most_overlapped"]]
            parts += [plot, table(["most overlapped examples", "share", "words"], worst)]
    return "".join(parts)


def _languages(report: dict[str, Any]) -> str:
    found = report["languages"]
    if found is None:
        return _none("Not looked for (--no-languages).")
    whole = report["corpus"]["documents"]
    rows = [
        [code, _share(entry["documents"], whole), entry["bytes"], _by_source(entry["by_source"])]
        for code, entry in found["languages"].items()
    ]
    note = "py3langid on the first 1,000 characters; und: not determined. Code and lists often count as odd languages."
    return _none(note) + table(["language", "documents", "bytes", "by source"], rows, text=[3])


def _rules(report: dict[str, Any]) -> str:
    whole = report["corpus"]["documents"]
    rows = [
        [
            name,
            "off" if entry["limit"] is None else f"{entry['limit']:,}",
            _share(entry["documents"], whole),
            _by_source(entry["by_source"]),
            "; ".join(entry["examples"][:2]),
        ]
        for name, entry in report["rules"].items()
    ]
    note = (
        "Thresholds of Rae et al. 2021 (Gopher, arXiv 2112.11446, appendix A.1.1) unless the command gave others. They "
        "were made for web pages: whole books and tables break some of them and may be good text. docs/audit.md says "
        "what each one counts."
    )
    return _none(note) + table(["rule", "limit", "documents beyond it", "by source", "for example"], rows, text=[3, 4])


def _patterns(group: dict[str, Any], note: str) -> str:
    rows = [
        [
            name,
            entry["documents"],
            entry["finds"],
            _by_source(entry["by_source"]),
            "; ".join(f"{example['found']} in {example['document']}" for example in entry["examples"][:3]),
        ]
        for name, entry in group.items()
        if entry["documents"]
    ]
    missing = [name for name, entry in group.items() if not entry["documents"]]
    none = _none(f"Not found: {', '.join(missing)}.") if missing else ""
    finds = table(["kind", "documents", "finds", "by source", "for example (masked)"], rows, text=[3, 4])
    return _none(note) + finds + none


def _encoding(report: dict[str, Any]) -> str:
    found, whole = report["encoding"], report["corpus"]["documents"]
    rows = [
        [_DAMAGE[name], _share(entry["documents"], whole), entry["characters"], _by_source(entry["by_source"])]
        for name, entry in found["kinds"].items()
    ]
    note = (
        f"{found['documents']:,} documents are damaged in more than {found['limit']} of their characters; "
        f"{found['mixed_line_ends']:,} mix line ends. Line ends are shown, not judged."
    )
    return _none(note) + table(["kind", "documents", "characters", "by source"], rows, text=[3])


def _forbidden(report: dict[str, Any]) -> str:
    parts = []
    if report["blocklist"]:
        parts.append(_none(f"{report['blocklist']['documents']:,} documents hold an entry of the blocklist."))
        parts.append(table(["entry", "documents"], report["blocklist"]["entries"].items()))
    if report["hook"]:
        parts.append(
            _none(f"{report['hook']['function']} gave a reason for {report['hook']['documents']:,} documents.")
        )
        parts.append(table(["reason", "documents"], report["hook"]["reasons"].items()))
    return "".join(parts) or _none("Neither was given (--blocklist FILE, --hook module:function).")


def _bad(found: dict[str, Any]) -> str:
    if not found["documents"]:
        return _none()
    more = found["documents"] - len(found["named"])
    rows = [[text] for text in found["named"]] + ([[f"and {more:,} more"]] if more > 0 else [])
    return table([f"{found['documents']:,} documents could not be read"], rows, text=[0])


def _filter(found: dict[str, Any] | None) -> str:
    if found is None:
        return _none("Nothing was filtered: --filter writes a cleaned corpus and a ledger of what was dropped.")
    note = (
        f"{found['read']:,} documents read, {found['dropped']:,} dropped, {found['kept']:,} kept "
        f"({found['kept_bytes']:,} bytes). A document may have several reasons; ledger.jsonl names each."
    )
    return _none(note) + table(["reason", "documents"], found["by_reason"].items())
