"""The training model's decoding cache as transformers' ``generate`` expects one; copied into exports."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from megameta.model.cache import DecodingCache
from megameta.model.fixed_cache import FixedCache
from megameta.model.pruning import KeepRule, PruningCache


class MegametaCache(Cache):
    """What ``generate`` needs of a cache, around the training model's own (``decoding``).

    It grows without limit; with a rule it keeps the rows of that rule and frees the others (``PruningCache``).

    Args:
        max_rows: has a fixed size instead, room for so many rows (``FixedCache``).
        num_meta_layers: layers of the model that have the branch; a fixed size needs it.

    Raises:
        ValueError: both a rule and a fixed size.
    """

    def __init__(self, rule: KeepRule | None = None, *, max_rows: int | None = None, num_meta_layers: int = 0) -> None:
        super().__init__(layers=[])
        if rule is not None and max_rows is not None:
            raise ValueError("a cache of fixed size drops no rows: give rule or max_rows, not both")
        self.rule, self.max_rows, self.num_meta_layers = rule, max_rows, num_meta_layers
        self.decoding = self._empty()

    def _empty(self) -> DecodingCache:
        if self.max_rows is not None:
            return FixedCache(self.max_rows, self.num_meta_layers)
        return DecodingCache() if self.rule is None else PruningCache(self.rule)

    def __len__(self) -> int:
        return len(self.decoding.causal)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows so far, those that were dropped included; a tensor in a cache of fixed size."""
        return self.decoding.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Rows that there is room for, -1: there is no largest length."""
        return self.decoding.max_rows if isinstance(self.decoding, FixedCache) else -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Rows of the keys that ``query_length`` new rows get, and the offset of the first."""
        if isinstance(self.decoding, FixedCache):
            return self.decoding.max_rows, 0
        return self.decoding.length + query_length, 0

    @property
    def batch_size(self) -> int:
        """Sequences, or -1 before the first pass."""
        return self.decoding.causal[0][0].shape[0] if self.decoding.causal else -1

    @property
    def is_compileable(self) -> bool:
        """Whether its size is fixed."""
        return isinstance(self.decoding, FixedCache)

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` works whatever came before."""
        return type(self.decoding) is DecodingCache

    @property
    def is_initialized(self) -> bool:
        """Whether it holds rows."""
        return bool(self.decoding.causal)

    def reset(self) -> None:
        """Forget everything."""
        self.decoding = self._empty()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what ``beam_idx[i]`` was."""
        self.decoding.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times, neighbours."""
        if self.decoding.causal:
            device = self.decoding.causal[0][0].device
            self.decoding.select(torch.arange(self.batch_size, device=device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        if self.decoding.causal:
            self.decoding.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` rows: transformers passes a negative number, 0 to keep all.

        A positive number is the length to keep, as transformers 5.0 still called it.
        """
        kept = tokens_to_remove if tokens_to_remove > 0 else self.decoding.length + tokens_to_remove
        self.decoding.crop(max(kept, 0))


def as_megameta_cache(cache: Any) -> MegametaCache:
    """The cache itself, or a new one in the place of an empty growing cache.

    Raises:
        ValueError: a cache of another kind.
    """
    if isinstance(cache, MegametaCache):
        return cache
    if cache is None or (type(cache) is DynamicCache and cache.get_seq_length() == 0):
        return MegametaCache()
    raise ValueError(
        f"this model cannot use a {type(cache).__name__} as past_key_values: its meta branch keeps rows of its own."
        " Pass nothing, an empty DynamicCache, or the past_key_values of an earlier output (MegametaCache)"
    )
