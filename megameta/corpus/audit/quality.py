"""Gopher's quality and repetition statistics of a document (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1).

Each function is pure and gives the statistics under the names that ``Rules`` has with min_ or max_ before them. The
thresholds are in options.Rules; which statistic they judge is RULES below.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megameta.corpus.audit.words import Hashes, Words, ngrams

QUALITY = (
    "words",
    "mean_word_length",
    "hash_ratio",
    "ellipsis_ratio",
    "bullet_lines",
    "ellipsis_lines",
    "alphabetic_words",
    "stop_words",
)
LINES = ("duplicate_lines", "duplicate_line_characters", "duplicate_paragraphs", "duplicate_paragraph_characters")
TOP = (2, 3, 4)
DUPLICATE = (5, 6, 7, 8, 9, 10)
NGRAMS = (*(f"top_{n}gram" for n in TOP), *(f"duplicate_{n}gram" for n in DUPLICATE))
STATISTICS = (*QUALITY, *LINES, *NGRAMS)
#: Signs that begin a line of a list. Gopher does not say which; these are those of Unicode's bullets and of plain text.
BULLETS = ("•", "‣", "⁃", "◦", "▪", "■", "●", "○", "-", "–", "*")
#: Rules that make sense only where spaces separate words.
_SPACED_ONLY = frozenset({"min_words", "min_mean_word_length", "max_mean_word_length", "min_stop_words"})
_PARAGRAPHS = re.compile(r"\n[^\S\n]*\n\s*")


@dataclass(frozen=True)
class Rule:
    """A threshold of ``Rules``: the statistic it judges and on which side of it a document is beyond it."""

    name: str
    statistic: str
    is_minimum: bool

    @property
    def spaced_only(self) -> bool:
        return self.name in _SPACED_ONLY


RULES = (
    Rule("min_words", "words", True),
    Rule("max_words", "words", False),
    Rule("min_mean_word_length", "mean_word_length", True),
    Rule("max_mean_word_length", "mean_word_length", False),
    *(Rule(f"max_{name}", name, False) for name in QUALITY[2:6]),
    Rule("min_alphabetic_words", "alphabetic_words", True),
    Rule("min_stop_words", "stop_words", True),
    *(Rule(f"max_{name}", name, False) for name in (*LINES, *NGRAMS)),
)


def statistics(text: str, words: Words) -> list[float]:
    """All of STATISTICS, in that order, for one document."""
    text = text.replace("\r\n", "\n") if "\r" in text else text
    lines = [line for part in text.split("\n") if (line := part.strip())]
    paragraphs = [part for part in _PARAGRAPHS.split(text.strip()) if part]
    return [
        *quality(text, words, lines),
        *duplicate_share(lines),
        *duplicate_share(paragraphs),
        *repetition(words.bare, words.bare_lengths),
    ]


def quality(text: str, words: Words, lines: list[str]) -> list[float]:
    """QUALITY of one document.

    words: Gopher keeps 50 to 100,000. mean_word_length: 3 to 10 characters. hash_ratio, ellipsis_ratio: "#" and
    "…" or "..." for each word, at most 0.1. bullet_lines, ellipsis_lines: shares of lines that begin with a bullet
    (at most 0.9) or end with an ellipsis (0.3). alphabetic_words: share of words with a letter, at least 0.8.
    stop_words: how many of the eight of STOP_WORDS occur, at least 2. Blank lines do not count.
    """
    count = max(1, words.count)
    bullets = sum(line.startswith(BULLETS) for line in lines)
    ellipses = sum(line.endswith(("...", "…")) for line in lines)
    return [
        float(words.count),
        words.characters / count,
        text.count("#") / count,
        (text.count("...") + text.count("…")) / count,
        bullets / max(1, len(lines)),
        ellipses / max(1, len(lines)),
        words.alphabetic / count,
        float(words.stop_words),
    ]


def duplicate_share(parts: list[str]) -> tuple[float, float]:
    """Share of lines (or paragraphs) that are copies of an earlier one, and of characters in them.

    Gopher allows 0.30 and 0.20. White space around a part does not count.
    """
    if len(set(parts)) == len(parts):
        return 0.0, 0.0
    counted = Counter(parts)
    copies = sum(len(part) * (number - 1) for part, number in counted.items())
    return 1 - len(counted) / len(parts), copies / max(1, sum(map(len, parts)))


def repetition(bare: Hashes, lengths: npt.NDArray[np.int64]) -> list[float]:
    """NGRAMS of one document's bare words: shares of characters, white space and punctuation left out.

    top_n: characters in the most frequent n-gram times how often it occurs (of equally frequent ones the longest; at
    most 1; 0 where none occurs twice). Gopher allows 0.20, 0.18 and 0.16 for n = 2, 3, 4.
    duplicate_n: characters of words within any n-gram that occurs more than once, each counted once. Gopher allows
    0.15 down to 0.10 for n = 5 to 10.
    """
    result = dict.fromkeys((*TOP, *DUPLICATE), 0.0)
    total = int(lengths.sum())
    ends = np.concatenate([[0], np.cumsum(lengths)])
    # An n-gram can occur twice only where both (n-1)-grams in it do, so ever fewer places are looked at.
    places = np.arange(len(bare))
    for n, hashes in ngrams(bare, DUPLICATE[-1]):
        if n == 1 or not len(places):
            continue
        places = places[places < len(hashes)] if n == 2 else _both(places, len(hashes))
        if not len(places):
            break
        order, starts, counts = _runs(hashes[places])
        if n in TOP:
            most = int(counts.max())
            if most > 1:
                first = places[order[starts[counts == most]]]
                result[n] = min(1.0, most * int((ends[first + n] - ends[first]).max()) / total)
        places = np.sort(places[order[np.repeat(counts > 1, counts)]])
        if n in DUPLICATE and len(places):
            result[n] = _covered(places, n, lengths) / total
    return list(result.values())


def _both(places: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Of sorted ``places`` those whose successor is one too, below ``count``."""
    kept = places[:-1][np.diff(places) == 1]
    return kept[kept < count]


def _runs(
    values: Hashes,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """An order that sorts ``values``, and where runs of equal ones start in it and how long they are."""
    order = np.argsort(values)
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return order, starts, np.diff(np.append(starts, len(values)))


def _covered(places: npt.NDArray[np.int64], n: int, lengths: npt.NDArray[np.int64]) -> int:
    """Characters of the words in the n-grams at ``places``, overlaps once."""
    change = np.zeros(len(lengths) + 1, dtype=np.int32)
    change[places] += 1
    change[places + n] -= 1
    return int(lengths[np.cumsum(change[:-1]) > 0].sum())
