"""Damaged encoding: what a text shows of wrong decoding, cut bytes and binary rubbish."""

import re
import unicodedata
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta.corpus.audit.words import UNSPACED

#: Kinds that are counted, in characters (mojibake: sequences). All but the last two are damage that a rule judges.
DAMAGE = ("replacement", "mojibake", "nul", "control", "inner_bom", "private_use", "unassigned", "crlf", "bare_lf")
JUDGED = DAMAGE[:-2]
_CLASSES = {"nul": 1, "control": 2, "replacement": 3, "inner_bom": 4, "private_use": 5, "unassigned": 6}
_UNSPACED, _UNSPACED_UNASSIGNED = 7, 8
_UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")
# Continuation bytes 0x80 to 0xBF of UTF-8 as Latin-1 and as Windows-1252 show them.
_CONTINUATION = "\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013\u2014\u2018-\u201e"
_CONTINUATION += "\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122"
#: UTF-8 read as Latin-1 or Windows-1252: é becomes Ã©, ’ becomes â€™, an emoji begins with ðŸ.
_MOJIBAKE = re.compile(
    f"\u00c3[{_CONTINUATION}]|\u00c2[\u0080-\u00bf]|\u00e2(?:\u20ac|[\u0080-\u0086])[{_CONTINUATION}]"
    f"|\u00f0(?:\u0178|\u009f)[{_CONTINUATION}]{{2}}"
)


@cache
def _class_of() -> npt.NDArray[np.uint8]:
    """uint8[0x110000]: the class of every code point, by this Python's Unicode tables."""
    table = np.zeros(0x110000, dtype=np.uint8)
    categories = {"Cc": 2, "Co": 5, "Cn": 6}
    for code in range(0x110000):
        found = categories.get(unicodedata.category(chr(code)), 0)
        if _UNSPACED_CHARACTER.match(chr(code)):
            found = _UNSPACED_UNASSIGNED if found else _UNSPACED
        table[code] = found
    for code in (9, 10, 12, 13):
        table[code] = 0
    table[0], table[0xFFFD], table[0xFEFF] = 1, 3, 4
    return table


def damage(text: str) -> tuple[dict[str, int], int]:
    """Counts of DAMAGE in a text, and how many of its characters are of scripts written without spaces.

    "private_use" and "unassigned" follow the Unicode tables of this Python. "control" is C0 and C1 but for tab, line
    feed, form feed and carriage return. "crlf" and "bare_lf" are line ends; both at once are mixed.
    """
    codes: npt.NDArray[Any]
    if text.isascii():
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    else:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    found = np.bincount(_class_of()[codes], minlength=_UNSPACED_UNASSIGNED + 1)
    counts = {name: int(found[number]) for name, number in _CLASSES.items()}
    counts["unassigned"] += int(found[_UNSPACED_UNASSIGNED])
    counts["mojibake"] = 0 if text.isascii() else sum(1 for _ in _MOJIBAKE.finditer(text))
    counts["crlf"] = text.count("\r\n") if "\r" in text else 0
    counts["bare_lf"] = text.count("\n") - counts["crlf"]
    return {name: counts[name] for name in DAMAGE}, int(found[_UNSPACED:].sum())
