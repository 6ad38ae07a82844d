"""A data collator for HuggingFace's Trainer that injects meta-tokens as training does (spec §1); copied into exports.

Letters: B sequences, T slots of the longest.
"""

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from megameta.data.meta_positions import meta_positions, periodic_positions
from megameta.model.loss import IGNORE_INDEX


class MetaTokenCollator:
    """Sequences of text to a batch with meta-tokens, labels and padding: ``Trainer(data_collator=...)``.

    A sequence of L tokens becomes one of T slots, T the largest with T − ⌊k · T⌋ = L; the ⌊k · T⌋ others hold
    meta-tokens. Labels are the slots' own tokens (the model shifts them), −100 where there is no loss: at meta-tokens,
    at padding, and at a sequence's first slot, which nothing predicts. So the number of labels that are not −100, by
    which ``Trainer`` divides (``num_items_in_batch``), is the number of targets.

    Random places are a pure function of the seed and of the sequence's number, its entry ``index`` where it has one:
    with the numbers, seed and lengths of a pre-training run they are that run's places. Without an entry, its tokens
    and ``epoch`` make the number, so that neither the order nor the number of workers matters.

    Attributes:
        epoch: makes for other places in each epoch; ``epoch_callback`` sets it.

    Args:
        fraction: k; 0 injects nothing (meta-tokens that are in the text stay, and have no loss).
        placement: random, or periodic: evenly spaced.
        max_length: T at most; text that does not fit is cut off at its end.
        pad_token_id: where sequences end before the longest one, with an attention mask of 0.
    """

    def __init__(
        self,
        meta_token_id: int,
        *,
        fraction: float = 0.1,
        placement: Literal["random", "periodic"] = "random",
        seed: int = 0,
        max_length: int | None = None,
        pad_token_id: int = 0,
    ) -> None:
        if not 0 <= fraction <= 0.5:
            raise ValueError(f"fraction {fraction} is not between 0 and 0.5")
        if placement not in ("random", "periodic"):
            raise ValueError(f"placement {placement!r} is neither 'random' nor 'periodic'")
        self.meta_token_id = meta_token_id
        self.fraction = fraction
        self.placement = placement
        self.seed = seed
        self.max_length = max_length
        self.pad_token_id = pad_token_id
        self.epoch = 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels, each (B, T) int64.

        Args:
            features: each with input_ids, and if it likes with attention_mask (0: not text, left out), labels (as long
                as input_ids, not shifted; −100: no loss) and index.
        """
        rows = [self._inject(feature) for feature in features]
        length = max(len(token_T) for token_T, _ in rows)
        batch = {
            "input_ids": torch.full((len(rows), length), self.pad_token_id),
            "attention_mask": torch.zeros(len(rows), length, dtype=torch.int64),
            "labels": torch.full((len(rows), length), IGNORE_INDEX),
        }
        for row, (token_T, label_T) in enumerate(rows):
            batch["input_ids"][row, : len(token_T)] = torch.from_numpy(token_T)
            batch["attention_mask"][row, : len(token_T)] = 1
            batch["labels"][row, : len(token_T)] = torch.from_numpy(label_T)
        return batch

    def epoch_callback(self) -> TrainerCallback:
        """For ``Trainer(callbacks=[...])``: meta-tokens get other places in each epoch."""
        return _NextEpoch(self)

    def _inject(self, feature: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of one sequence's slots."""
        token_L = np.asarray(feature["input_ids"], dtype=np.int64)
        label_L = np.asarray(feature.get("labels", token_L), dtype=np.int64)
        mask = feature.get("attention_mask")
        if mask is not None:
            is_text = np.asarray(mask, dtype=bool)
            token_L, label_L = token_L[is_text], label_L[is_text]
        if token_L.ndim != 1 or not len(token_L) or label_L.shape != token_L.shape:
            raise ValueError("every sequence needs input_ids, one or more, and as many labels where it has labels")
        length, count = self._slots(len(token_L))
        token_L, label_L = token_L[: length - count], label_L[: length - count]
        if self.placement == "periodic":
            places = periodic_positions(length, count)
        else:
            places = meta_positions(self.seed, self._number(feature, token_L), length, count)
        is_text_T = np.ones(length, dtype=bool)
        is_text_T[places] = False
        token_T, label_T = np.full(length, self.meta_token_id), np.full(length, IGNORE_INDEX)
        token_T[is_text_T], label_T[is_text_T] = token_L, label_L
        label_T[token_T == self.meta_token_id] = IGNORE_INDEX
        label_T[0] = IGNORE_INDEX
        return token_T, label_T

    def _slots(self, text: int) -> tuple[int, int]:
        """T and the number of meta-tokens, in exact arithmetic on the decimal k."""
        fraction = Fraction(str(self.fraction))
        length = int(text / (1 - fraction))
        if self.max_length is None or length <= self.max_length:
            return length, length - text
        return self.max_length, int(fraction * self.max_length)

    def _number(self, feature: Mapping[str, Any], token_L: np.ndarray) -> int:
        if "index" in feature:
            return int(feature["index"])
        content = self.epoch.to_bytes(8, "little") + token_L.astype("<i8").tobytes()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class _NextEpoch(TrainerCallback):
    def __init__(self, collator: MetaTokenCollator) -> None:
        self._collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._collator.epoch = int((state.epoch or 0) + 1e-6)
