"""The report of an analysis: a page with its figures in it, and beside it every figure and table as a file."""

import base64
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megameta.errors import UserError
from megameta.files import whole_directory
from megameta.html import note, page, table
from megameta.paper.analysis.findings import Finding, Rows

PAGE = "report.html"
#: Tables of up to this many rows stand in the page; of longer ones it names the file.
_SHOWN_ROWS = 60
_DPI = 150


def check_output(output: Path) -> None:
    """Refuse to replace what is no report of an analysis.

    Raises:
        UserError: it is something else.
    """
    if output.exists() and not (output / PAGE).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} holds something else than a report of megameta analyze; give another place")


def write_report(
    output: Path, title: str, findings: Sequence[Finding], left_out: Mapping[str, str], ran: Mapping[str, str]
) -> None:
    """Write the directory, whole or not at all, in place of an earlier report.

    Args:
        left_out: name of an analysis → why it is not there.
        ran: what was run, on what, with which versions.
    """
    check_output(output)
    with whole_directory(output) as work:
        pictures = {}
        for finding in findings:
            pictures[finding.name] = render(finding)
            (work / f"{finding.name}.png").write_bytes(pictures[finding.name])
            record = {
                "name": finding.name,
                "section": finding.section,
                "title": finding.title,
                "caption": finding.caption,
                "facts": finding.facts,
                "tables": finding.tables,
                "ran": ran,
            }
            text = json.dumps(_plain(record), indent=1, ensure_ascii=False, allow_nan=False)
            (work / f"{finding.name}.json").write_text(text + "\n", encoding="utf-8")
            for name, rows in finding.tables.items():
                (work / csv_name(finding, name)).write_text(_csv(rows), encoding="utf-8")
        (work / PAGE).write_text(_page(title, findings, pictures, left_out, ran), encoding="utf-8")


def csv_name(finding: Finding, name: str) -> str:
    """File of a table."""
    return f"{finding.name}-{name}.csv"


def render(finding: Finding) -> bytes:
    """The figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=finding.size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    finding.draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """As JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _cell(value: Any) -> Any:
    """Six digits, which is more than an interval allows; nothing where there is no number."""
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return value


def _csv(rows: Rows) -> str:
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _page(
    title: str,
    findings: Sequence[Finding],
    pictures: Mapping[str, bytes],
    left_out: Mapping[str, str],
    ran: Mapping[str, str],
) -> str:
    names = list(dict.fromkeys(finding.section for finding in findings))
    sections, contents = [], []
    for number, name in enumerate(names, 1):
        inside = [finding for finding in findings if finding.section == name]
        sections.append((f"s{number}", name, "".join(_finding(f, pictures[f.name]) for f in inside)))
        links = "".join(f'<li><a href="#{f.name}">{escape(f.title)}</a></li>' for f in inside)
        contents.append(f'<li><a href="#s{number}">{escape(name)}</a><ul>{links}</ul></li>')
    if left_out:
        rows = [[name, reason] for name, reason in left_out.items()]
        sections.append(("left-out", "Left out", table(["figures", "why"], rows, text=[1])))
        contents.append('<li><a href="#left-out">Left out</a></li>')
    facts = table(["what", "value"], list(ran.items()), text=[1])
    sections.append(("ran", "What was run", f"<div class=wide>{facts}</div>"))
    contents.append('<li><a href="#ran">What was run</a></li>')
    head = note("Every figure lies beside this page as a PNG, its numbers as JSON and CSV.")
    return page(title, head, sections, contents=f"<ul>{''.join(contents)}</ul>")


def _finding(finding: Finding, picture: bytes) -> str:
    data = base64.b64encode(picture).decode("ascii")
    parts = [
        f'<div class=finding><h3 id="{finding.name}">{escape(finding.title)}</h3><figure>',
        f'<img src="data:image/png;base64,{data}" alt="{escape(finding.title)}">',
        f"</figure><p>{escape(finding.caption)}</p>",
    ]
    if finding.facts:
        rows = [[name, _shown(value)] for name, value in finding.facts.items()]
        parts.append(f"<div class=wide>{table(['fact', 'value'], rows, text=[1])}</div>")
    for name, rows_of_table in finding.tables.items():
        parts.append(_details(csv_name(finding, name), rows_of_table))
    return "".join(parts) + "</div>"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _details(file: str, rows: Rows) -> str:
    if not rows or len(rows) > _SHOWN_ROWS:
        return note(f"{len(rows):,} rows in {file}.")
    head = list(rows[0])
    shown = [["–" if row[key] is None else _shown(row[key]) for key in head] for row in rows]
    inner = f"<div class=wide>{table(head, shown)}</div>"
    return f"<details><summary>{len(rows):,} rows of {escape(file)}</summary>{inner}</details>"
