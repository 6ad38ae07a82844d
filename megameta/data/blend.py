"""Mixtures: which source each sample is taken from, by Megatron-LM's deterministic rule.

Sample i goes to the source that is furthest behind its share: the largest weight · max(i, 1) − taken, the first of
equals, in float64 (``build_blending_indices`` of Megatron-LM's datasets/helpers.cpp). So after any number of samples
every source is near its share, and the first n choices do not depend on how many follow.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megameta.data.index_cache import Arrays, IndexCache, digest
from megameta.data.samples import Samples, Text
from megameta.errors import UserError

#: Sources of a mixture at most: their numbers are kept in 16 bits.
MAX_SOURCES = 1000
#: Samples between counts that are kept.
_BLOCK = 1 << 14
#: Chunks of a long blend that are made side by side, which is 20 times faster, and the sources up to which it pays.
_CHUNKS, _FEW = 256, 64

Sources = npt.NDArray[np.uint16]


def normalized(weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """Weights that sum to one, as Megatron divides them."""
    values = np.array(weights, dtype=np.float64)
    return values / np.sum(values)


def weights_by_tokens(tokens: Sequence[int], temperature: float) -> list[float]:
    """Shares in proportion to tokens^(1 / temperature): 1 by size; large ones towards equal shares."""
    sizes = np.array(tokens, dtype=np.float64)
    return [float(weight) for weight in (sizes / sizes.max()) ** (1.0 / temperature)]


def blend(weights: npt.NDArray[np.float64], count: int) -> Sources:
    """Source of each of ``count`` samples: uint16 (count,)."""
    chunks = _CHUNKS if len(weights) <= _FEW and count >= _CHUNKS * _CHUNKS else 1
    length = -(-count // chunks)
    starts = _near_shares(weights, np.arange(chunks) * length)
    sources, ends = np.empty((chunks, 0), dtype=np.uint16), starts
    for attempt in range(2 if chunks > 1 else 0):
        # The rule forgets: from counts that are a little off it soon makes the same choices. So chunks that begin with
        # a guess mostly end right, and the second time begin right.
        starts = starts if attempt == 0 else np.concatenate((np.zeros_like(ends[:1]), ends[:-1]))
        sources, ends = _choose_side_by_side(weights, starts, length)
    result, taken = [], np.zeros(len(weights))
    for chunk in range(chunks):
        if chunks > 1 and np.array_equal(starts[chunk], taken):
            result.append(sources[chunk])
            taken = ends[chunk]
        else:  # that guess was wrong
            result.append(_choose(weights, taken, chunk * length, length))
    return np.concatenate(result)[:count]


def _choose(weights: npt.NDArray[np.float64], taken: npt.NDArray[np.float64], first: int, count: int) -> Sources:
    """Sources of samples ``first`` to first + count − 1; counts them into ``taken``."""
    result = np.empty(count, dtype=np.uint16)
    behind = np.empty(len(weights))
    multiply, subtract = np.multiply, np.subtract
    for place in range(count):
        multiply(weights, max(first + place, 1), out=behind)
        subtract(behind, taken, out=behind)
        source = behind.argmax()
        result[place] = source
        taken[source] += 1.0
    return result


def _choose_side_by_side(
    weights: npt.NDArray[np.float64], starts_CS: npt.NDArray[np.float64], length: int
) -> tuple[Sources, npt.NDArray[np.float64]]:
    """``_choose`` for C chunks at once, each of ``length`` samples and from its own counts of S sources: the sources
    (C, length), and the counts at the chunks' ends (C, S)."""
    taken = starts_CS.copy()
    behind = np.empty_like(taken)
    chunks = np.arange(len(taken))
    result = np.empty((length, len(taken)), dtype=np.uint16)
    for place in range(length):
        np.multiply(weights, np.maximum(chunks * length + place, 1.0)[:, None], out=behind)
        np.subtract(behind, taken, out=behind)
        result[place] = source = behind.argmax(axis=1)
        taken[chunks, source] += 1.0
    return result.T, taken


def _near_shares(weights: npt.NDArray[np.float64], places: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Counts that sum to each place and are near the shares: (places, sources), by largest remainders."""
    exact = weights * places[:, None]
    counts = np.floor(exact)
    missing = (places - counts.sum(axis=1))[:, None]
    rank = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1)
    return counts + (rank < missing)


class BlendedSamples:
    """A mixture of sources.

    Args:
        sources: by name.
        weights: one for each source, in any scale.
        num_samples: samples that the run will take.
        cache: see ``SampleIndex``.
    """

    def __init__(
        self, sources: dict[str, Samples], weights: Sequence[float], num_samples: int, cache: IndexCache | None = None
    ) -> None:
        if len(sources) > MAX_SOURCES:
            raise UserError(f"data.train has {len(sources)} sources, at most {MAX_SOURCES} are mixed; pool some")
        self.names = list(sources)
        self.sources = list(sources.values())
        self.weights = normalized(weights)

        def make() -> Arrays:
            return {"source": blend(self.weights, num_samples)}

        keep = cache is not None and cache.pays(num_samples)
        order = cache.get(f"blend-{digest(self.weights, num_samples)}", 0, make) if cache and keep else make()
        self._source = order["source"]
        starts = range(0, num_samples, _BLOCK)
        counts = [np.bincount(self._source[start : start + _BLOCK], minlength=len(sources)) for start in starts]
        self._before = np.cumsum([np.zeros(len(sources), dtype=np.int64), *counts], axis=0)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of the run: sources have epochs of their own."""
        return len(self._source)

    def taken(self, num_samples: int) -> npt.NDArray[np.int64]:
        """Samples from each source among the first ``num_samples``: int64 (sources,)."""
        block, rest = divmod(num_samples, _BLOCK)
        inside = self._source[block * _BLOCK : block * _BLOCK + rest]
        return self._before[block] + np.bincount(inside, minlength=len(self.sources))

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often each source was read through after ``num_samples``."""
        taken = self.taken(num_samples)
        return {
            name: float(count) / source.samples_per_epoch
            for name, source, count in zip(self.names, self.sources, taken, strict=True)
        }

    def text(self, index: int) -> Text:
        """The text of sample ``index`` of the mixture: that of its source which is next there."""
        source = int(self._source[index])
        block = index // _BLOCK
        inside = self._source[block * _BLOCK : index]
        return self.sources[source].text(int(self._before[block, source]) + int(np.count_nonzero(inside == source)))
