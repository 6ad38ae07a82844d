"""Random choices as a pure function of a key, the same for ever (library generators may change between versions)."""

from collections.abc import Sequence
from typing import TypeVar

from megameta.data.counter_random import make_key, mix

Item = TypeVar("Item")
_GAMMA = 0x9E3779B97F4A7C15


class Draws:
    """SplitMix64 from a key made of integers and labels (see counter_random)."""

    def __init__(self, *parts: int | str) -> None:
        self._state = make_key(*parts)

    def below(self, limit: int) -> int:
        """An integer of 0 … limit − 1. (The bias of the remainder is under limit / 2⁶⁴.)"""
        self._state += _GAMMA
        return mix(self._state) % limit

    def between(self, low: int, high: int) -> int:
        """An integer of low … high, both included."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def choices(self, items: Sequence[Item], count: int) -> list[Item]:
        """With replacement."""
        return [self.choice(items) for _ in range(count)]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """Without replacement, in random order."""
        left = list(items)
        for place in range(count):
            other = self.between(place, len(left) - 1)
            left[place], left[other] = left[other], left[place]
        return left[:count]
