"""A sample of T slots: text with meta-tokens at random places, labels, documents, positions (spec §1 and §2)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megameta.config import DataSection
from megameta.data.meta_positions import meta_positions, periodic_positions
from megameta.data.samples import Samples, Text
from megameta.errors import UserError

#: Label of a slot that has no loss; torch's cross_entropy and HuggingFace use the same.
IGNORE_INDEX = -100

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One sequence. All arrays are int64 (T,)."""

    index: int
    token_T: Ints
    label_T: Ints
    document_T: Ints | None
    """Document inside the sample, where documents are masked."""
    position_T: Ints | None
    """Positions, where they restart at document ends."""


@dataclass(frozen=True)
class SampleFormat:
    """How text becomes a sample.

    Attributes:
        num_meta_tokens: M, injected into the T = L + M slots.
        periodic: they are evenly spaced, not at random places.
        skip_first_target: give the sample's first text token no loss, even where a leading meta-token predicts it; a
            model without meta-tokens cannot predict it, so evaluation leaves it out (spec §4, "Twin").
        vocab_size: text with ids from here on is refused; None: not checked.
    """

    text_per_sample: int
    num_meta_tokens: int
    meta_token_id: int
    seed: int
    document_mask: bool = False
    reset_positions: bool = False
    skip_first_target: bool = False
    vocab_size: int | None = None
    periodic: bool = False

    @classmethod
    def of(cls, data: DataSection, meta_token_id: int, seed: int, vocab_size: int | None = None) -> "SampleFormat":
        """The format that a configuration trains on."""
        return cls(
            text_per_sample=data.text_per_sample,
            num_meta_tokens=data.num_meta_tokens,
            meta_token_id=meta_token_id,
            seed=seed,
            document_mask=data.document_mask,
            reset_positions=data.reset_positions,
            vocab_size=vocab_size,
            periodic=data.meta_token_placement == "periodic",  # noqa: S105
        )

    @property
    def sequence_length(self) -> int:
        """Slots T."""
        return self.text_per_sample + self.num_meta_tokens


def build_sample(text: Text, index: int, form: SampleFormat) -> Sample:
    """Inject meta-tokens into L + 1 text tokens and say which slots have a loss.

    Slot t's label is the token of slot t + 1, the L + 1st text token being slot T. There is none where that is a
    meta-token, or padding, or, under a document mask, belongs to another document. A meta-token does predict the text
    token after it, and belongs to the document of the text before it (a leading run: to the first document).
    """
    _check_ids(text, index, form)
    length = form.sequence_length
    is_text = np.ones(length + 1, dtype=bool)
    count = form.num_meta_tokens
    is_text[periodic_positions(length, count) if form.periodic else meta_positions(form.seed, index, length, count)] = (
        False
    )
    slots = np.full(length + 1, form.meta_token_id, dtype=np.int64)
    slots[is_text] = text.token_L
    label_T = np.where(is_text[1:], slots[1:], IGNORE_INDEX)
    if text.num_tokens is not None:
        label_T[np.cumsum(is_text)[1:] > text.num_tokens] = IGNORE_INDEX
    if form.skip_first_target:
        first = int(np.argmax(is_text))
        if first > 0:
            label_T[first - 1] = IGNORE_INDEX
    document_T = position_T = None
    if form.document_mask:
        # The number of text tokens up to a slot says which text token it holds or follows.
        document = text.document_L[np.maximum(np.cumsum(is_text) - 1, 0)]
        label_T[document[1:] != document[:-1]] = IGNORE_INDEX
        document_T = document[:-1]
        if form.reset_positions:
            place = np.arange(length)
            is_start = np.ones(length, dtype=bool)
            is_start[1:] = document_T[1:] != document_T[:-1]
            position_T = place - np.maximum.accumulate(np.where(is_start, place, 0))
    return Sample(index, slots[:-1], label_T, document_T, position_T)


def _check_ids(text: Text, index: int, form: SampleFormat) -> None:
    token_L = text.token_L[: text.num_tokens]
    highest = int(token_L.max())
    if form.vocab_size is not None and highest >= form.vocab_size:
        problem = f"token {highest}, and model.vocab_size is {form.vocab_size}"
    elif form.num_meta_tokens and (token_L == form.meta_token_id).any():
        problem = f"the meta-token {form.meta_token_id}, which no text is encoded to"
    else:
        return
    raise UserError(
        f"the text of sample {index} holds {problem}: the dataset was made with another tokenizer;"
        " set data.tokenizer to the one it was made with"
    )


class Dataset:
    """Samples by index, counting on through epochs."""

    def __init__(self, samples: Samples, form: SampleFormat) -> None:
        self.samples = samples
        self.form = form

    def __len__(self) -> int:
        """Samples of one epoch."""
        return self.samples.samples_per_epoch

    def __getitem__(self, index: int) -> Sample:
        return build_sample(self.samples.text(index), index, self.form)
