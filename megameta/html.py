"""Pages that need no network: one file, its style in it, every text escaped. Imports no part of the package."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#556;--paper:#fff;--line:#d5dbe3;--fill:#f4f6f9}
@media (prefers-color-scheme:dark){:root{--ink:#dfe4ea;--soft:#a3adba;--paper:#14181d;--line:#39424d;--fill:#20262d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1080px;margin:2em auto;
padding:0 1em}
h1{font-size:1.7em;margin-bottom:.1em}h2{margin-top:2em;border-bottom:1px solid var(--line);padding-bottom:.2em}
h3{margin-top:1.4em;font-size:1.05em}table{border-collapse:collapse;margin:.6em 0;font-size:.92em}
th,td{padding:.25em .8em;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th:first-child,td:first-child{text-align:left}th{background:var(--fill);font-weight:600}
td.text,th.text{text-align:left;overflow-wrap:anywhere;max-width:34em}.note{color:var(--soft);max-width:60em}
.cards{display:flex;flex-wrap:wrap;gap:.8em;margin:1em 0}
.card{border:1px solid var(--line);border-radius:6px;padding:.6em 1em}
.card b{display:block;font-size:1.35em}.card span{color:var(--soft);font-size:.9em}
.plots{display:flex;flex-wrap:wrap;gap:1.5em}figure{margin:0}figcaption{font-size:.92em;font-weight:600}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}code{background:var(--fill);padding:0 .25em;
overflow-wrap:anywhere}
nav a{margin-right:1em}a{color:inherit}.wide{overflow-x:auto}
img{max-width:100%;height:auto;background:#fff;border-radius:4px}summary{cursor:pointer;color:var(--soft)}
@media (max-width:600px){th,td{padding:.2em .45em}body{margin:1em auto}}
@media print{body{max-width:none;margin:0}figure,.finding h3{break-inside:avoid}h2,h3{break-after:avoid}
nav{display:none}}
"""


def page(title: str, head: str, sections: Sequence[tuple[str, str, str]], *, contents: str | None = None) -> str:
    """A whole page. ``head`` and the contents of sections (id, title, contents) are HTML, titles are text.

    Args:
        contents: table of contents, HTML. Default: links to the sections in a line.
    """
    links = "".join(f'<a href="#{name}">{escape(text)}</a> ' for name, text, _ in sections)
    contents = links if contents is None else contents
    body = "".join(f'<section id="{name}"><h2>{escape(text)}</h2>{inner}</section>' for name, text, inner in sections)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{head}<nav>{contents}</nav>{body}</body></html>\n"
    )


def number(value: Any) -> str:
    """As a table shows it; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], text: Sequence[int] = ()) -> str:
    """A table; cells are escaped here, and nowhere else. ``text``: columns aligned to the left, beside the first."""

    def row(cells: Sequence[Any], tag: str) -> str:
        shown = [cell if isinstance(cell, str) else number(cell) for cell in cells]
        return "".join(
            f"<{tag}{' class=text' if place in text else ''}>{escape(cell)}</{tag}>" for place, cell in enumerate(shown)
        )

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f"<table><thead><tr>{row(head, 'th')}</tr></thead><tbody>{body}</tbody></table>" if body else note("None.")


def note(what: str) -> str:
    """A paragraph of text in a soft colour."""
    return f"<p class=note>{escape(what)}</p>"
