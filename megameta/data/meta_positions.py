"""Where meta-tokens stand in a sequence (spec §1); ``megameta.hf.bundle`` copies this file into exports."""

import numpy as np
import numpy.typing as npt

from megameta.data.counter_random import choose, make_key


def meta_positions(seed: int, index: int, length: int, count: int) -> npt.NDArray[np.int64]:
    """Slots of the meta-tokens of sample ``index``: a pure function of (seed, index), ascending (spec §1)."""
    return choose(make_key(seed, "meta-tokens", index), length, count)


def periodic_positions(length: int, count: int) -> npt.NDArray[np.int64]:
    """Slots of ``count`` evenly spaced meta-tokens, ascending: the middle of each of as many equal parts (ours)."""
    return (2 * np.arange(count, dtype=np.int64) + 1) * length // (2 * max(1, count))
