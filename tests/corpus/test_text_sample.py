"""Samples of a corpus: from everywhere, as large as asked for, the same for a seed."""

import collections
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megameta.corpus import text_sample as module
from megameta.corpus.text_sample import Reservoir, TextSample, pieces
from megameta.data.counter_random import make_key, mix


def corpus(folder, counts):
    """A file for each letter with so many texts of 100 bytes; all of one letter stand together."""
    files = []
    for letter, count in counts.items():
        rows = [json.dumps({"text": f"{letter}{number:05d}" + letter * 94}) + "\n" for number in range(count)]
        (folder / f"{letter}.jsonl").write_text("".join(rows))
        files.append(str(folder / f"{letter}.jsonl"))
    return files


def test_a_sample_is_from_all_inputs_in_proportion(tmp_path):
    files = corpus(tmp_path, {"a": 600, "b": 300, "c": 100})
    taken = collections.Counter()
    for seed in range(40):
        texts = list(TextSample(files, size=10_000, seed=seed))
        assert len(texts) == 100 and texts == sorted(texts), "as large as asked for, in the corpus's order"
        taken.update(text[0] for text in texts)
    # 4000 draws: standard deviations of 29 (without replacement, 60 %), 27 and 18.
    assert abs(taken["a"] - 2400) < 130 and abs(taken["b"] - 1200) < 130 and abs(taken["c"] - 400) < 90, taken


def test_every_place_has_the_same_chance(tmp_path):
    """Whichever the seed: the first and the last tenth of a corpus are drawn as often."""
    files = corpus(tmp_path, {"a": 500})
    tenths = collections.Counter()
    for seed in range(60):
        tenths.update(int(text[1:6]) // 50 for text in TextSample(files, size=5000, seed=seed))
    assert all(abs(tenths[tenth] - 300) < 85 for tenth in range(10)), tenths


def test_the_same_seed_gives_the_same_sample(tmp_path):
    files = corpus(tmp_path, {"a": 300})
    first, second = (list(TextSample(files, size=3000, seed=7)) for _ in range(2))
    assert first == second != list(TextSample(files, size=3000, seed=8))


def test_all_of_the_corpus_without_a_size(tmp_path):
    files = corpus(tmp_path, {"a": 30, "b": 20})
    sample = TextSample(files, checked=7)
    assert [text[0] for text in sample] == ["a"] * 30 + ["b"] * 20
    assert len(sample.to_check) == 7 and len(set(sample.to_check)) == 7


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 200), st.integers(0, 9))
def test_a_reservoir_against_sorting(lengths, size, seed):
    """What is kept are the first texts by priority until their bytes reach the size."""
    reservoir = Reservoir(seed, "x", size, in_bytes=True)
    texts = [f"{number}:".ljust(length, "x") for number, length in enumerate(lengths)]
    for number, text in enumerate(texts):
        reservoir.offer(number, text, len(text))
    kept, held = set(), 0
    for number in sorted(range(len(texts)), key=lambda n: mix(make_key("x", seed) + n * 0x9E3779B97F4A7C15)):
        if held < size:
            kept.add(number)
            held += len(texts[number])
    assert reservoir.texts() == [texts[number] for number in sorted(kept)]


@settings(deadline=None, max_examples=80)
@given(st.text(alphabet="ab\n👋", max_size=400))
def test_pieces_are_the_text(text):
    original, module.PIECE_CHARS = module.PIECE_CHARS, 40
    try:
        found = list(pieces(text))
    finally:
        module.PIECE_CHARS = original
    assert "".join(found) == text and all(0 < len(piece) <= 40 for piece in found)


def test_one_long_document_does_not_fill_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARS", 100)
    rows = ["x" * 50_000, *("y" * 100 for _ in range(500))]
    random.Random(0).shuffle(rows)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    found = collections.Counter(text[0] for text in TextSample([str(tmp_path / "a.jsonl")], size=40_000))
    assert found["x"] == pytest.approx(200, abs=45) and found["y"] == pytest.approx(200, abs=45)
