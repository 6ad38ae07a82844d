"""Distances between a query and a key, in slots, in bins that double: 1, 2–3, 4–7, …

Letters: B batch, H heads, T query rows, S key rows (= T), X bins.
"""

import torch
from torch import Tensor


def num_bins(length: int) -> int:
    """X of a sequence of this many slots: distance length − 1 has a bin."""
    return max(1, (length - 1).bit_length())


def bin_labels(length: int) -> list[str]:
    """The bins in words."""
    labels = []
    for place in range(num_bins(length)):
        first, last = 2**place, min(2 ** (place + 1) - 1, max(1, length - 1))
        labels.append(str(first) if first == last else f"{first}–{last}")
    return labels


def bin_of_pairs(length: int, device: torch.device) -> Tensor:
    """Bin of (query t, key s) where s < t, −1 elsewhere: int64 (T, S)."""
    place_T = torch.arange(length, device=device)
    distance_TS = place_T[:, None] - place_T[None, :]
    edges = torch.tensor([2**place for place in range(num_bins(length))], device=device)
    return torch.bucketize(distance_TS.clamp(min=0), edges, right=True) - 1


def sum_by_bin(value_BTS: Tensor, chosen_BTS: Tensor, bin_TS: Tensor, bins: int) -> Tensor:
    """Sums over the chosen pairs of each bin, float64 (B, X). Pairs without a bin may not be chosen."""
    batch = value_BTS.shape[0]
    cell_BTS = bin_TS + bins * torch.arange(batch, device=bin_TS.device)[:, None, None]
    chosen_BTS = chosen_BTS.expand_as(value_BTS)
    total = torch.bincount(cell_BTS[chosen_BTS], weights=value_BTS[chosen_BTS].double(), minlength=batch * bins)
    return total.view(batch, bins)
