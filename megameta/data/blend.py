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


def normalized(weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """Weights that sum to one, as Megatron divides them."""
    values = np.array(weights, dtype=np.float64)
    return values / np.sum(values)


def weights_by_tokens(tokens: Sequence[int], temperature: float) -> list[float]:
    """Shares in proportion to tokens^(1 / temperature): 1 by size; large ones towards equal shares."""
    sizes = np.array(tokens, dtype=np.float64)
    return [float(weight) for weight in (sizes / sizes.max()) ** (1.0 / temperature)]


def blend(weights: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.uint16]:
    """Source of each of ``count`` samples: uint16 (count,)."""
    result = np.empty(count, dtype=np.uint16)
    if len(weights) == 1:
        result[:] = 0
        return result
    taken = np.zeros(len(weights))
    behind = np.empty(len(weights))
    multiply, subtract = np.multiply, np.subtract
    for index in range(count):
        multiply(weights, max(index, 1), out=behind)
        subtract(behind, taken, out=behind)
        source = behind.argmax()
        result[index] = source
        taken[source] += 1.0
    return result


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
