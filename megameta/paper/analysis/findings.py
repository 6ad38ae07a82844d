"""What an analysis found, as a report shows it: a figure with a caption, and the numbers beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Rows of values, all with the same keys.
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """One figure of a report.

    Attributes:
        name: stem of its files: NAME.png, NAME-TABLE.csv, and NAME.json with facts and tables.
        section: heading of the report that it stands under.
        caption: what was run and what the figure shows, whole sentences; the reader has nothing else.
        draw: draws on an empty matplotlib Figure. Axes have labels with units.
        tables: everything that is drawn, and what the text quotes, by name.
        facts: single numbers, and what they depend on (seed, samples, …).
    """

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[[Any], None]
    tables: Mapping[str, Rows] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[float, float] = (8.0, 4.5)
    """Of the figure, in inches."""
