"""The data collator: training's own samples, and labels whose number is that of the targets."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from megameta.data.dataset import SampleFormat, build_sample
from megameta.data.samples import Text
from megameta.hf.collator import MetaTokenCollator
from tests.support.exports import make_pair

META = 11


def words(length: int, seed: int = 0) -> list[int]:
    """Ids without the meta-token."""
    return np.random.default_rng(seed).integers(12, 37, length).tolist()


@pytest.mark.parametrize("placement", ["random", "periodic"])
def test_slots_are_those_of_pre_training(placement) -> None:
    form = SampleFormat(29, 3, META, seed=5, periodic=placement == "periodic")
    collator = MetaTokenCollator(META, fraction=0.1, placement=placement, seed=5, max_length=32)
    numbers = (0, 7, 12345)
    texts = [words(30, seed) for seed in numbers]
    samples = [
        build_sample(Text(np.array(text), np.zeros(30, dtype=np.int64)), number, form)
        for number, text in zip(numbers, texts, strict=True)
    ]
    # What training reads as a target only, the 30th token, has no slot here.
    batch = collator([{"input_ids": text[:29], "index": number} for number, text in zip(numbers, texts, strict=True)])
    assert batch["input_ids"].tolist() == [sample.token_T.tolist() for sample in samples]
    assert batch["labels"][:, 1:].tolist() == [sample.label_T[:-1].tolist() for sample in samples]
    assert (batch["labels"][:, 0] == -100).all() and batch["attention_mask"].all()


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.125, 0.29, 0.5])
def test_number_of_meta_tokens(fraction: float) -> None:
    """Against a search: the most slots in which so much text and their share of meta-tokens fit exactly."""
    k = Fraction(str(fraction))
    for text in range(1, 80):
        slots = max(T for T in range(text, 3 * text + 3) if T - int(k * T) == text)
        row = MetaTokenCollator(META, fraction=fraction)([{"input_ids": words(text)}])["input_ids"][0]
        assert len(row) == slots and int((row == META).sum()) == slots - text
        assert row[row != META].tolist() == words(text)
    cut = MetaTokenCollator(META, fraction=0.25, max_length=16)([{"input_ids": words(40)}])["input_ids"][0]
    assert len(cut) == 16 and cut[cut != META].tolist() == words(40)[:12]


def test_padding_labels_and_masks() -> None:
    collator = MetaTokenCollator(META, fraction=0.25, pad_token_id=3)
    prompt = {"input_ids": [20, 21, META, 23, 24, 25], "labels": [-100, -100, -100, 23, 24, 25]}
    padded = {"input_ids": [0, 0, 30, META, 31, 32], "attention_mask": [0, 0, 1, 1, 1, 1]}
    batch = collator([prompt, padded])
    length = batch["attention_mask"].sum(dim=1).tolist()
    assert length == [8, 5] and batch["input_ids"].shape == (2, 8)
    for row, kept in enumerate([[20, 21, 23, 24, 25], [30, 31, 32]]):
        ids, labels = (batch[name][row, : length[row]] for name in ("input_ids", "labels"))
        assert ids[ids != META].tolist() == kept
        assert labels[0] == -100 and (labels[ids == META] == -100).all()
        # a text token's label is itself, where it has a loss
        assert ((labels == ids) | (labels == -100)).all()
    assert [label for label in batch["labels"][0].tolist() if label != -100] == [23, 24, 25]
    assert batch["input_ids"][1, 5:].eq(3).all() and batch["labels"][1, 5:].eq(-100).all()


def test_the_number_of_labels_is_the_number_of_targets() -> None:
    """So the sum over Trainer's num_items_in_batch is the mean, however it counts."""
    _, _, model = make_pair(position="ape")
    collator = model.meta_token_collator(fraction=0.25)
    assert (collator.max_length, collator.meta_token_id) == (64, META)
    batch = collator([{"input_ids": words(length, length)} for length in (3, 9, 31)])
    count = (batch["labels"] != -100).sum()
    assert count == (batch["labels"][:, 1:] != -100).sum()
    with torch.no_grad():
        mean, given = model(**batch).loss, model(**batch, num_items_in_batch=count).loss
    assert mean == pytest.approx(float(given), rel=1e-6)


def test_places_depend_on_seed_text_and_epoch_alone() -> None:
    def places(text, seed=0, epoch=0, beside=()):
        collator = MetaTokenCollator(META, seed=seed)
        collator.epoch = epoch
        row = collator([{"input_ids": text}, *({"input_ids": other} for other in beside)])["input_ids"][0]
        return (row == META).nonzero().flatten().tolist()

    text, other = words(90, 1), words(90, 2)
    assert places(text) == places(text, beside=[other, words(200)])
    found = [places(text), places(other), places(text, seed=1), places(text, epoch=1)]
    assert all(found[i] != found[j] for i in range(4) for j in range(i))


def test_what_is_no_sequence_is_refused() -> None:
    for feature in ({"input_ids": []}, {"input_ids": [1, 2], "labels": [1]}, {"input_ids": [[1, 2]]}):
        with pytest.raises(ValueError, match="every sequence needs input_ids"):
            MetaTokenCollator(META)([feature])
    with pytest.raises(ValueError, match=r"fraction 0\.7"):
        MetaTokenCollator(META, fraction=0.7)
    with pytest.raises(ValueError, match="placement 'often'"):
        MetaTokenCollator(META, placement="often")
