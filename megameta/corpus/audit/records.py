"""What is known of each document, in fixed-size records on disk: memory does not grow with the corpus."""

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta.corpus.audit import patterns, quality
from megameta.corpus.audit.damage import DAMAGE
from megameta.corpus.audit.options import Rules

#: Why a document may be dropped, but for duplicates: the bit of each reason in a record's ``reasons``.
REASONS = (
    "bad",
    "hook",
    "blocklist",
    "secrets",
    "personal",
    "encoding",
    "language",
    "contaminated",
    *(rule.name for rule in quality.RULES),
)
BIT = {name: np.uint64(1 << number) for number, name in enumerate(REASONS)}
#: The name that --drop uses for each reason.
DROP_OF = {name: "gopher" if name in {rule.name for rule in quality.RULES} else name for name in REASONS}

RECORD = np.dtype(
    [
        ("file", np.uint32),  # number of the input
        ("label", np.uint32),  # number of the name that locations have
        ("source", np.uint16),
        ("language", np.uint8),
        ("sketch", np.bool_),  # whether there is a MinHash signature
        ("item", np.int64),  # line or row, from 1
        ("bytes", np.int64),
        ("characters", np.int64),
        ("tokens", np.int64),
        ("compression", np.float64),
        ("reasons", np.uint64),
        ("share", np.float64),  # largest share of an evaluation example
        ("example", np.int64),  # that example; -1: none
        ("statistics", np.float64, (len(quality.STATISTICS),)),
        ("patterns", np.uint32, (len(patterns.NAMES),)),
        ("damage", np.uint32, (len(DAMAGE),)),
        ("exact", np.uint64, (2,)),  # 128 bits of the text's BLAKE2b
        ("normalised", np.uint64, (2,)),
    ]
)

Records = npt.NDArray[Any]
CHUNK = 1 << 14


def broken_rules(records: Records, spaced: npt.NDArray[np.bool_], rules: Rules, english: npt.NDArray[np.bool_]) -> Any:
    """uint64[documents]: bits of the Gopher rules that each document is beyond.

    Rules about word and stop-word counts judge only documents that are ``spaced``, written in a script that separates
    words; the stop words, being English, only those that are ``english``.
    """
    bits = np.zeros(len(records), dtype=np.uint64)
    for rule in quality.RULES:
        threshold = rules.threshold(rule.name)
        if threshold is None:
            continue
        values = records["statistics"][:, quality.STATISTICS.index(rule.statistic)]
        broken = values < threshold if rule.is_minimum else values > threshold
        if rule.spaced_only:
            broken &= spaced
        if rule.name == "min_stop_words":
            broken &= english
        bits[broken] |= BIT[rule.name]
    return bits


class GrowingArray:
    """An array of fixed-size rows in a file that grows; ``array`` maps it when all is written."""

    def __init__(self, file: str, dtype: npt.DTypeLike, width: int = 0) -> None:
        self.file = file
        self._dtype, self._width = np.dtype(dtype), width
        self._stream = open(file, "wb", buffering=1 << 18)  # noqa: SIM115 (closed by close)
        self.rows = 0

    def add(self, rows: npt.NDArray[Any]) -> None:
        self._stream.write(np.ascontiguousarray(rows, dtype=self._dtype).tobytes())
        self.rows += len(rows)

    def close(self) -> None:
        self._stream.close()

    def array(self) -> npt.NDArray[Any]:
        """All rows, read from disk as they are used."""
        self.close()
        shape = (self.rows, self._width) if self._width else (self.rows,)
        if not os.path.getsize(self.file):
            return np.empty(shape, dtype=self._dtype)
        return np.memmap(self.file, dtype=self._dtype, mode="r", shape=shape)
