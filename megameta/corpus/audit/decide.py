"""Which documents a filter drops, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta.corpus.audit.duplicates import Duplicates
from megameta.corpus.audit.records import BIT, CHUNK, DROP_OF

LEVELS = ("exact", "normalised", "near")


@dataclass(frozen=True)
class Decision:
    """Legend: D documents. ``own_D``: bits of the reasons (records.REASONS) for which each is dropped; ``copy_D``: 0,
    or 1 + the place in LEVELS where it is a copy; ``kept_D``: then the document that stays instead."""

    own_D: npt.NDArray[np.uint64]
    copy_D: npt.NDArray[np.int8]
    kept_D: npt.NDArray[np.int64]

    @property
    def dropped_D(self) -> npt.NDArray[np.bool_]:
        return (self.own_D != 0) | (self.copy_D != 0)


def decide(records: Any, duplicates: Duplicates, drop: Sequence[str]) -> Decision:
    """Apply ``drop`` (names of options.DROPS).

    Of documents that duplicate each other the first that no other reason drops stays, so that a group never vanishes
    because its first document is bad.
    """
    mask = np.uint64(0)
    for name, bit in BIT.items():
        if name == "bad" or DROP_OF[name] in drop:
            mask |= bit
    count = len(records)
    own = np.empty(count, np.uint64)
    for start in range(0, count, CHUNK):
        own[start : start + CHUNK] = records["reasons"][start : start + CHUNK] & mask
    copy, kept = np.zeros(count, np.int8), np.arange(count, dtype=np.int64)
    levels = [level for level in LEVELS if level in drop]
    if not levels:
        return Decision(own, copy, kept)
    group = getattr(duplicates, levels[-1])
    # The smallest of (dropped for itself, number) in each group.
    best = np.full(count, 2 * count, dtype=np.int64)
    np.minimum.at(best, group, kept + count * (own != 0))
    keeper = best[group]
    is_copy = (keeper < count) & (keeper != kept)
    for code, level in reversed(list(enumerate(LEVELS, 1))):
        # From the coarsest to the finest: what a copy is called is the finest level on which it equals its keeper.
        of = getattr(duplicates, level)
        same = np.zeros(count, np.bool_)
        same[is_copy] = of[is_copy] == of[keeper[is_copy]]
        copy[same] = code if level in drop else 0
    kept[copy != 0] = keeper[copy != 0]
    return Decision(own, copy, kept)
