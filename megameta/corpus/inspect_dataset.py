"""A look into an indexed dataset: its header, lengths, first documents; and a full read that finds bad ids."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megameta.data.index_format import CODE_OF_DTYPE
from megameta.data.indexed import IndexedDataset
from megameta.tokenizers import Tokenizer

_READ_TOKENS = 1 << 22
_SHOWN_TOKENS = 60


@dataclass(frozen=True)
class Verification:
    """What reading all tokens found. ``first_bad``: token number in .bin of the first id out of range, or None."""

    num_tokens: int
    smallest: int
    largest: int
    bad: int
    first_bad: int | None
    document_ends: int


def describe(dataset: IndexedDataset) -> list[str]:
    """Header, counts and document lengths, as lines of text."""
    lengths = dataset.document_lengths
    size = dataset.num_tokens * dataset.dtype.itemsize
    lines = [
        f"{dataset.prefix}.bin: {size:,} bytes; .idx: version 1, "
        f"dtype code {CODE_OF_DTYPE[dataset.dtype]} ({dataset.dtype})",
        f"tokens     {dataset.num_tokens:,}",
        f"documents  {dataset.num_documents:,} ({int((lengths == 0).sum()):,} empty)",
        f"sequences  {dataset.num_sequences:,}",
    ]
    if len(lengths):
        points = np.percentile(lengths, (0, 25, 50, 75, 100), method="nearest")
        shown = ", ".join(f"{value:,}" for value in points)
        lines.append(f"tokens in a document: {shown} (0, 25, 50, 75, 100 %), mean {lengths.mean():,.1f}")
    return lines


def first_documents(dataset: IndexedDataset, count: int, tokenizer: Tokenizer | None) -> Iterator[str]:
    """The beginnings of the first ``count`` documents, decoded where there is a tokenizer that has the ids."""
    for index in range(min(count, dataset.num_documents)):
        length = int(dataset.document_lengths[index])
        ids = dataset.tokens(int(dataset.document_starts[index]), min(length, _SHOWN_TOKENS))
        more = " …" if length > _SHOWN_TOKENS else ""
        known = tokenizer is not None and bool(((ids >= 0) & (ids < tokenizer.vocab_size)).all())
        shown = repr(tokenizer.decode(ids)) if tokenizer is not None and known else " ".join(map(str, ids))
        yield f"document {index} ({length:,} tokens): {shown}{more}"


def verify(
    dataset: IndexedDataset,
    vocab_size: int | None = None,
    eod_id: int | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> Verification:
    """Read every token. An id is bad when it is negative or, with ``vocab_size``, not below it."""
    smallest = largest = bad = ends = 0
    first_bad: int | None = None
    for start in range(0, dataset.num_tokens, _READ_TOKENS):
        ids = dataset.tokens(start, min(_READ_TOKENS, dataset.num_tokens - start))
        low, high = int(ids.min()), int(ids.max())
        smallest, largest = (low, high) if start == 0 else (min(smallest, low), max(largest, high))
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            wrong = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
            bad += int(wrong.sum())
            if first_bad is None:
                first_bad = start + int(np.flatnonzero(wrong)[0])
        if eod_id is not None:
            ends += int((ids == eod_id).sum())
        on_progress(start + len(ids))
    return Verification(dataset.num_tokens, smallest, largest, bad, first_bad, ends)


def location_of(dataset: IndexedDataset, token: int) -> str:
    """Where token number ``token`` of .bin lies, for messages."""
    document = int(np.searchsorted(dataset.document_starts, token, side="right")) - 1
    offset = token - int(dataset.document_starts[document])
    return f"{dataset.prefix}.bin byte {token * dataset.dtype.itemsize} (document {document}, token {offset})"
