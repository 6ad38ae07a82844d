"""Random numbers as a pure function of a key and a counter (spec §1): the same on any machine, in any order, for ever.

The stream is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): value
t of key s is mix(s + (t + 1) · 0x9E3779B97F4A7C15). Keys are made by chaining the same mix over their parts.
"""

import numpy as np
import numpy.typing as npt

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

Uint64 = npt.NDArray[np.uint64]


def mix(value: int) -> int:
    """SplitMix64's finaliser on one 64-bit integer."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def make_key(*parts: int | str) -> int:
    """A 64-bit key from integers and short labels; every part and its place count."""
    key = 0
    for part in parts:
        words = (
            [int.from_bytes(part.encode()[i : i + 8], "little") for i in range(0, len(part.encode()), 8)]
            if (isinstance(part, str))
            else [part]
        )
        for word in words:
            key = mix(key + _GAMMA ^ (word & _MASK))
    return key


def stream(key: int, count: int) -> Uint64:
    """Values 0 … count − 1 of a key's stream: uint64 (count,)."""
    with np.errstate(over="ignore"):
        value = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(key)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def permutation(key: int, count: int) -> npt.NDArray[np.int64]:
    """A uniform random order of 0 … count − 1: int64 (count,)."""
    return np.argsort(stream(key, count), kind="stable")


def choose(key: int, population: int, count: int) -> npt.NDArray[np.int64]:
    """``count`` of 0 … population − 1, uniformly without replacement, ascending: int64 (count,)."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    value = stream(key, population)
    threshold = np.partition(value, count - 1)[count - 1]
    # Equal values are all but impossible; the cut keeps the count exact even then.
    return np.flatnonzero(value <= threshold)[:count]
