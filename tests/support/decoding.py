"""Decoding in chunks, and what a cache that drops rows may look at, token by token."""

import torch
from torch import Tensor

from megameta.model import GPT, DecodingCache, KeepRule
from tests.support.models import LENGTH

CHUNKS = {
    "ones": [1] * LENGTH,
    "whole": [LENGTH],
    "first_then_ones": [6, *[1] * (LENGTH - 6)],
    "mixed": [1, 5, 2, 4, 1],
    "halves": [7, 6],
}


def decode(
    model: GPT,
    token: Tensor,
    sizes: list[int],
    cache: DecodingCache,
    *,
    position: Tensor | None = None,
    document: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """Logits of the rows of ``token``, which follow those in the cache, chunk by chunk."""
    logits, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        logits.append(
            model(
                token[:, part],
                position_BT=None if position is None else position[:, part],
                document_BT=None if document is None else document[:, part],
                num_meta_columns=columns,
                cache=cache,
            )
        )
        start += size
    assert start == token.shape[1]
    return torch.cat(logits, dim=1)


def kept_rows(rule: KeepRule, is_meta: Tensor, document: Tensor | None, pinned: Tensor | None = None) -> list[set[int]]:
    """What one sequence holds while each of its rows is read, that row included: the definition, token by token.

    ``pinned``: rows that stay for ever, in place of the meta-tokens.
    """
    stays = is_meta if pinned is None else pinned
    held: list[int] = []
    found = []
    current = None
    for t in range(len(is_meta)):
        name = 0 if document is None else int(document[t])
        if name < 0:
            found.append({t})  # padding looks at nothing that matters, and is dropped at once
            continue
        if name != current:
            held, current = [], name  # another document: nothing of the one before is looked at again
            first: list[int] = []
        first.append(t)
        held.append(t)
        newest = first[-rule.window :]
        held = [s for s in held if s in newest or s in first[: rule.sinks] or bool(stays[s])]
        found.append(set(held))
    return found


def forbidden(rule: KeepRule, is_meta: Tensor, document: Tensor | None, pinned: Tensor | None = None) -> Tensor:
    """Rows that each row may not look at: bool (B, T, T)."""
    mask = torch.ones(*is_meta.shape, is_meta.shape[1], dtype=torch.bool)
    for row in range(len(is_meta)):
        part = None if document is None else document[row]
        held = kept_rows(rule, is_meta[row], part, None if pinned is None else pinned[row])
        for t, rows in enumerate(held):
            mask[row, t, sorted(rows)] = False
    return mask
