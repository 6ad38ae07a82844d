"""Writing and joining tokenised corpora in Megatron-LM's indexed format (``megameta.data.indexed`` reads them)."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megameta.corpus.growing import GrowingDataset, GrowingPaths, publish
from megameta.data.index_format import CODE_OF_DTYPE
from megameta.data.indexed import IndexedDataset, dataset_prefix
from megameta.errors import UserError

#: Tokens that are copied at a time.
COPY_TOKENS = 1 << 23


class IndexedDatasetWriter:
    """Writes a pair PREFIX.bin and PREFIX.idx; use it as a context manager.

    The files appear under their names only when they are whole: they grow under temporary names in the same
    directory (see growing.py), and are synced and renamed, .bin first, when the block ends without an exception;
    otherwise the temporary files are removed. An existing pair is replaced (callers refuse that where they must).
    Memory does not grow with the number of documents.

    Raises UserError where the directory cannot be written or a token does not fit the dtype.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = dataset_prefix(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODE_OF_DTYPE or self.dtype.kind == "f":
            raise ValueError(f"{self.dtype} is not a token dtype of the .idx format")
        self._paths = GrowingPaths.beside(self.prefix, f".tmp-{os.getpid()}")
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self._paths.tokens}: {error.strerror}") from error
        self._growing = GrowingDataset(self._paths, self.dtype)

    @property
    def num_documents(self) -> int:
        return self._growing.lengths.documents

    @property
    def num_sequences(self) -> int:
        return self._growing.lengths.sequences

    @property
    def num_tokens(self) -> int:
        return self._growing.lengths.tokens

    def add_document(
        self, sequences_or_ids: Sequence[Any] | npt.NDArray[Any], lengths: Sequence[int] | None = None
    ) -> None:
        """Append one document.

        ``sequences_or_ids``: token ids, int[n]; or a list of such lists, one for each sequence.
        ``lengths``: with ids in one list, the tokens in each sequence. Without it the ids are one sequence;
        an empty document holds no sequence, as in Megatron's own tool.
        """
        if len(sequences_or_ids) and np.ndim(sequences_or_ids[0]) == 1:
            if lengths is not None:
                raise ValueError("lengths are given by the sequences themselves")
            parts = [self._as_tokens(part) for part in sequences_or_ids]
            lengths = [part.size for part in parts]
            ids = np.concatenate(parts)
        else:
            ids = self._as_tokens(sequences_or_ids)
            if lengths is None:
                lengths = [ids.size] if ids.size else []
        if sum(lengths) != ids.size or any(length < 0 for length in lengths):
            raise ValueError(f"sequence lengths add up to {sum(lengths)}, the document has {ids.size} tokens")
        self.add_documents(ids, lengths, [len(lengths)])

    def add_documents(
        self,
        ids: npt.NDArray[Any] | bytes,
        sequence_lengths: Sequence[int] | npt.NDArray[Any],
        sequences_per_document: Sequence[int] | npt.NDArray[Any],
    ) -> None:
        """Append many documents at once.

        ``ids``: the tokens of all of them, int[n] of this writer's dtype, or their bytes in file order.
        ``sequence_lengths``: int[S'], tokens in each sequence; ``sequences_per_document``: int[documents].
        """
        raw = ids if isinstance(ids, bytes) else self._as_tokens(ids).tobytes()
        self._growing.add(raw, sequence_lengths, sequences_per_document)

    def add_dataset(
        self,
        prefix: str | os.PathLike[str],
        convert: bool = False,
        on_progress: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Append every document of an existing dataset, a piece of its .bin at a time.

        ``convert``: take other dtypes too, where every id fits this one. ``on_progress`` gets the tokens of each piece.
        """
        dataset = IndexedDataset(prefix)
        if dataset.dtype != self.dtype and not convert:
            raise UserError(
                f"{dataset.prefix}.idx: tokens are {dataset.dtype}, {self.prefix} is written as {self.dtype}; "
                "datasets that are joined must come from one tokenizer (a dtype can be chosen: --dtype)"
            )

        def chunks() -> Iterator[bytes]:
            for start in range(0, dataset.num_tokens, COPY_TOKENS):
                tokens = dataset.stored(start, min(COPY_TOKENS, dataset.num_tokens - start))
                on_progress(len(tokens))
                yield self._as_tokens(tokens, f"{dataset.prefix}.bin, tokens {start:,} on").tobytes()

        self._growing.add_chunks(chunks(), dataset.sizes, np.diff(dataset.document_indices))

    def _as_tokens(self, ids: Sequence[int] | npt.NDArray[Any], what: str = "") -> npt.NDArray[Any]:
        """``ids`` as an array of this dtype in file byte order; a value that would wrap around is refused.

        ``what``: where they come from, for the message."""
        values = np.asarray(ids)
        if values.dtype != self.dtype and values.size:
            limits = np.iinfo(self.dtype)
            if values.dtype.kind not in "iu" or values.min() < limits.min or values.max() > limits.max:
                where = what or f"{self.prefix}.bin"
                raise UserError(
                    f"{where}: ids from {values.min()} to {values.max()} do not fit {self.dtype}; "
                    "the dataset was opened for a smaller vocabulary"
                )
        return values.astype(self.dtype.newbyteorder("<"), copy=False)

    def _publish(self) -> None:
        self._growing.flush()
        self._growing.sync()
        self._growing.write_index()
        self._growing.close()
        publish(self._paths, self.prefix)
        self._paths.remove()

    def discard(self) -> None:
        """Close and remove what has been written so far."""
        self._growing.close()
        self._paths.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self._publish()
        except OSError as failure:
            self.discard()
            raise UserError(f"cannot write {self.prefix}.bin/.idx: {failure.strerror}") from failure
        except BaseException:
            self.discard()
            raise


def merge_datasets(
    prefixes: Sequence[str | os.PathLike[str]],
    output_prefix: str | os.PathLike[str],
    dtype: npt.DTypeLike | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Join datasets in the given order into a new one, without loading any .bin into memory.

    The bytes are those of a single writer that was given all documents. ``dtype`` of the new one, to which tokens are
    converted where they fit; None: that of all of them, UserError where they differ. ``on_progress`` gets the tokens of
    each piece.
    """
    if not prefixes:
        raise ValueError("nothing to merge")
    chosen = IndexedDataset(prefixes[0]).dtype if dtype is None else dtype
    with IndexedDatasetWriter(output_prefix, chosen) as writer:
        for prefix in prefixes:
            writer.add_dataset(prefix, convert=dtype is not None, on_progress=on_progress)
