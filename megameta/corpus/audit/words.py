"""The words of a document as arrays of hashes, so that n-grams cost a few numpy operations.

A *word* is a run of characters without white space. Its *bare* form is what n-grams, near duplicates and contamination
compare: NFC, lower case, letters, digits and underscores only; a word of punctuation has none. In scripts written
without spaces (Han, Kana, Thai, Lao, Khmer, Burmese) every character is a word.

Hashes are the first 8 bytes of BLAKE2b, the same in every process; those of n-grams are polynomials in them modulo
2^64. That two different n-grams share a hash is a matter of 1 in 2^60 for a pair.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

#: Gopher asks for two of these eight English words.
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
#: Character ranges of scripts written without spaces, for a regular expression's class.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_EACH_UNSPACED = re.compile(f"([{UNSPACED}])")
_NOT_WORD = re.compile(r"\W+")
_TOKEN = re.compile(r"\w+")
_SPACE = re.compile(r"\s")
#: Words are kept from document to document up to this many, and this many characters.
_TABLE_WORDS = 1 << 20
_TABLE_CHARACTERS = 1 << 25
#: Characters that are split at a time: a list of Python strings takes ten times the memory of the text.
_PIECE = 1 << 22
#: Odd, and 5 modulo 8, so that its powers differ in high bits.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_ROW = np.dtype(
    [
        ("length", np.int32),
        ("alphabetic", np.bool_),
        ("stop", np.uint8),
        ("listed", np.bool_),
        ("folded", np.uint64),
        ("bare", np.uint64),
        ("bare_length", np.int32),
    ]
)


@dataclass(frozen=True)
class Words:
    """What a document's words come to. Legend: W words, B bare words.

    ``count`` W; ``characters`` in them; ``alphabetic``: words with a letter; ``stop_words``: how many of STOP_WORDS
    occur; ``folded`` uint64[W]: hashes of words in NFC and lower case; ``bare`` uint64[B] and ``bare_lengths``
    int64[B]: hashes and characters of bare words; ``listed``: distinct words with a part that ``is_listed``.
    """

    count: int
    characters: int
    alphabetic: int
    stop_words: int
    folded: Hashes
    bare: Hashes
    bare_lengths: npt.NDArray[np.int64]
    listed: list[str]


class WordTable(dict[str, int]):
    """Numbers the words it meets and remembers their properties; ``words`` looks a document up."""

    def __init__(self, is_listed: Callable[[str], bool] | None = None) -> None:
        super().__init__()
        self._is_listed = is_listed
        self._forget()

    def _forget(self) -> None:
        self.clear()
        self._new: list[Any] = []
        self._rows = np.zeros(1 << 12, dtype=_ROW)
        self._known = 0  # rows that are filled
        self._characters = 0

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self._characters += len(word)
        self._new.append(self._properties(word))
        return number

    def _properties(self, word: str) -> tuple[Any, ...]:
        folded = (word if word.isascii() else unicodedata.normalize("NFC", word)).lower()
        bare = folded if folded.isalnum() else _NOT_WORD.sub("", folded)
        hashed = hash_word(folded)
        stop = 1 << STOP_WORDS.index(bare) if bare in STOP_WORDS else 0
        listed = self._is_listed is not None and any(map(self._is_listed, _TOKEN.findall(folded)))
        return (
            len(word),
            any(map(str.isalpha, word)),
            stop,
            listed,
            hashed,
            (hashed if bare == folded else hash_word(bare)) if bare else 0,
            len(bare),
        )

    def words(self, text: str, unspaced: bool) -> Words:
        """Look up the words of ``text``. ``unspaced``: whether it has characters of UNSPACED.

        Memory is some 60 bytes for each word of this document.
        """
        if len(self) > _TABLE_WORDS or self._characters > _TABLE_CHARACTERS:
            self._forget()
        parts = []
        for piece in _pieces(text):
            split = (_EACH_UNSPACED.sub(r" \1 ", piece) if unspaced else piece).split()
            parts.append(np.fromiter(map(self.__getitem__, split), dtype=np.int64, count=len(split)))
        numbers = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self._take_new()
        rows = self._rows[numbers]
        has_bare = rows["bare_length"] > 0
        listed: list[str] = []
        if self._is_listed is not None and rows["listed"].any():
            wanted = set(np.unique(numbers[rows["listed"]]).tolist())
            listed = [word for word, number in self.items() if number in wanted]
        return Words(
            count=len(numbers),
            characters=int(rows["length"].sum(dtype=np.int64)),
            alphabetic=int(np.count_nonzero(rows["alphabetic"])),
            stop_words=int(np.bitwise_or.reduce(rows["stop"])).bit_count() if len(rows) else 0,
            folded=np.ascontiguousarray(rows["folded"]),
            bare=rows["bare"][has_bare],
            bare_lengths=rows["bare_length"][has_bare].astype(np.int64),
            listed=listed,
        )

    def _take_new(self) -> None:
        if not self._new:
            return
        end = self._known + len(self._new)
        if end > len(self._rows):
            grown = np.zeros(max(end, 2 * len(self._rows)), dtype=_ROW)
            grown[: self._known] = self._rows[: self._known]
            self._rows = grown
        self._rows[self._known : end] = np.array(self._new, dtype=_ROW)
        self._known = end
        self._new = []


def hash_word(word: str) -> int:
    """64 bits of BLAKE2b of a word's UTF-8."""
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def ngrams(hashes: Hashes, longest: int) -> Iterator[tuple[int, Hashes]]:
    """(n, hashes of all n-grams, uint64[len(hashes) - n + 1]) for n = 1 to ``longest`` or all words."""
    current = hashes
    for n in range(1, min(longest, len(hashes)) + 1):
        if n > 1:
            current = current[:-1] * _MULTIPLIER + hashes[n - 1 :]
        yield n, current


def scramble(hashes: Hashes) -> Hashes:
    """A bijection of uint64 that makes every bit depend on all (the finaliser of SplitMix64, Steele et al. 2014)."""
    mixed = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _pieces(text: str) -> Iterator[str]:
    """``text`` in parts of about _PIECE characters, cut where a word ends."""
    start = 0
    while len(text) - start > _PIECE:
        found = _SPACE.search(text, start + _PIECE)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:] if start else text
