"""Examples as ids, encoded once a file and kept on disk, so that the ranks of a node share them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megameta.data.dataset import IGNORE_INDEX
from megameta.data.index_cache import Arrays, IndexCache
from megameta.data.loader import Batch
from megameta.errors import UserError
from megameta.finetune.examples import DIFFICULTIES, encode_example, read_examples
from megameta.tokenizers import Tokenizer

#: Of the encoding: a change makes what is on disk stale.
_VERSION = 1
#: Rows of a batch are padded to a multiple of this, which tensor-parallel ranks can share.
_MULTIPLE = 8

#: In place of an index of DIFFICULTIES.
OTHER_DIFFICULTY = -1

Ints = npt.NDArray[np.int64]


class EncodedExamples:
    """The examples of a .jsonl file. Letters: N examples.

    Attributes:
        length_N: tokens with answer and end; answer_N: where the answer begins; bin_N: the length bin.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, *, markers: bool, cache: IndexCache) -> None:
        self.path = path
        self.tokenizer = tokenizer
        self._markers = markers
        self._most: int | None = None
        if not path.is_file():
            raise UserError(f"{path} is not there: megameta tasks generate makes it")
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        name = hashlib.sha256(repr((_VERSION, content, tokenizer.digest(), markers)).encode()).hexdigest()
        arrays = cache.get(f"examples-{name[:16]}", 0, self._encode)
        self._tokens, self._ends = arrays["tokens"], arrays["ends"]
        self.length_N = np.diff(self._ends, prepend=0)
        self.answer_N, self.bin_N, self.difficulty_N = arrays["answer"], arrays["bin"], arrays["difficulty"]

    def _encode(self) -> Arrays:
        tokens, ends, answers, bins, levels = [], [], [], [], []
        end = 0
        for example in read_examples(self.path):
            encoded = encode_example(example, self.tokenizer, markers=self._markers)
            tokens.append(encoded.ids.astype(np.int32))
            end += len(encoded.ids)
            ends.append(end)
            answers.append(encoded.answer_start)
            bins.append(example.bin)
            known = example.difficulty in DIFFICULTIES
            levels.append(DIFFICULTIES.index(example.difficulty) if known else OTHER_DIFFICULTY)
        if not tokens:
            raise UserError(f"{self.path} holds no examples")
        return {
            "tokens": np.concatenate(tokens),
            "ends": np.array(ends, dtype=np.int64),
            "answer": np.array(answers, dtype=np.int32),
            "bin": np.array(bins, dtype=np.int32),
            "difficulty": np.array(levels, dtype=np.int32),
        }

    def __len__(self) -> int:
        return len(self._ends)

    def most_meta(self, meta_token_id: int) -> int:
        """Meta-tokens of the example that has most."""
        if self._most is None:
            last = np.cumsum(self._tokens == meta_token_id)[self._ends - 1]
            self._most = int(np.diff(last, prepend=0).max())
        return self._most

    def ids(self, number: int) -> Ints:
        """Prompt, answer and end: int64 (length_N[number],)."""
        end = int(self._ends[number])
        return self._tokens[end - int(self.length_N[number]) : end].astype(np.int64)


def make_batch(
    examples: Sequence[tuple[EncodedExamples, int]], sample_ids: Sequence[int], length: int, num_meta: int
) -> Batch:
    """Examples as rows of ``length`` slots, padded with ends of documents behind their own; the loss is on the answers
    and their ends.

    The last token of an example is a target alone, so a row has one slot less than its example has tokens.

    Args:
        num_meta: meta-tokens of a row at most, the same for all batches that are read together.
    """
    token_BT = np.full((len(examples), length), examples[0][0].tokenizer.eod_id, dtype=np.int64)
    label_BT = np.full((len(examples), length), IGNORE_INDEX, dtype=np.int64)
    for row, (source, number) in enumerate(examples):
        ids, answer = source.ids(number), int(source.answer_N[number])
        token_BT[row, : len(ids) - 1] = ids[:-1]
        label_BT[row, answer - 1 : len(ids) - 1] = ids[answer:]
    tensors = torch.from_numpy(token_BT), torch.from_numpy(label_BT)
    first = min(int(source.answer_N[number]) for source, number in examples) - 1
    return Batch(*tensors, None, None, num_meta, tuple(sample_ids), first_target=first)


def padded_length(lengths: Ints) -> int:
    """Slots of a batch with examples of these lengths in tokens."""
    return -(-(int(lengths.max()) - 1) // _MULTIPLE) * _MULTIPLE
