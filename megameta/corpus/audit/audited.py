"""All that an audit found, before it is written down."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta.corpus.audit.contamination import Examples, NgramIndex
from megameta.corpus.audit.duplicates import Duplicates
from megameta.corpus.audit.inputs import InputFile
from megameta.corpus.partial import Counts


@dataclass
class Audited:
    """All that was found. Legend: D documents in stable order, bad ones included; G evaluation n-grams.

    ``labels``: what locations call the inputs; ``notes``: a file of [document, note] lines, in order.
    ``touched``: documents of each source that share an n-gram with each set, int64[sets, sources].
    """

    files: list[InputFile]
    sources: list[str]
    language_names: list[str]
    tokenizer_digest: str | None
    examples: Examples | None
    index: NgramIndex | None
    notes: Path
    labels: list[str] = field(default_factory=list)
    bad_named: list[str] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    records: Any = None
    duplicates: Duplicates | None = None
    seen_G: npt.NDArray[np.bool_] | None = None
    touched: npt.NDArray[np.int64] | None = None

    def location(self, number: int) -> str:
        record = self.records[number]
        return f"{self.labels[record['label']]}:{record['item']}"

    def notes_in_order(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with open(self.notes, encoding="utf-8") as file:
            for line in file:
                number, note = json.loads(line)
                yield number, note
