"""Mixtures against Megatron's rule written out in plain Python, and their bookkeeping against counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megameta.data import blend as module
from megameta.data.blend import MAX_SOURCES, BlendedSamples, blend, normalized, weights_by_tokens
from megameta.data.samples import Text
from megameta.errors import UserError


def megatron_rule(weights, count):
    """build_blending_indices of Megatron-LM, after its C++: (source, sample within the source) of each sample."""
    total = 0.0
    for weight in weights:
        total += weight
    shares = [weight / total for weight in weights]
    taken = [0] * len(shares)
    chosen = []
    for index in range(count):
        size = float(index) if index > 1 else 1.0
        best, most = 0, shares[0] * size - taken[0]
        for source in range(1, len(shares)):
            error = shares[source] * size - taken[source]
            if error > most:
                best, most = source, error
        chosen.append((best, taken[best]))
        taken[best] += 1
    return chosen


class Counted:
    """A source whose text says which of its samples it is."""

    def __init__(self, number, samples_per_epoch):
        self.number, self.samples_per_epoch = number, samples_per_epoch

    def text(self, index):
        return Text(np.array([self.number, index]), np.zeros(2, dtype=np.int64))


@given(
    st.lists(st.one_of(st.floats(1e-6, 1e6), st.integers(1, 9).map(float)), min_size=1, max_size=7),
    st.integers(0, 400),
)
@settings(max_examples=150, deadline=None)
def test_megatrons_rule(weights, count):
    # np.sum and a loop may differ in the last bit of the total only from eight terms on.
    mixture = BlendedSamples({str(n): Counted(n, 10) for n in range(len(weights))}, weights, count)
    found = [tuple(mixture.text(index).token_L.tolist()) for index in range(count)]
    assert found == megatron_rule(weights, count)


@pytest.mark.parametrize("guess", [None, lambda weights, places: np.zeros((len(places), len(weights)))])
@pytest.mark.parametrize("weights", [[4, 3, 2, 1], [1, 1, 1], [1, 1e-3, 1e-5, 0.3], [5], list(range(1, 60))])
def test_chunks_side_by_side(monkeypatch, weights, guess):
    """A long blend is made in chunks from guessed counts; wrong guesses cost time alone."""
    monkeypatch.setattr(module, "_CHUNKS", 8)
    if guess is not None:
        monkeypatch.setattr(module, "_near_shares", guess)
    found = blend(normalized(weights), 5003)
    assert found.tolist() == [source for source, _ in megatron_rule(weights, 5003)]


def test_equal_weights_take_turns():
    assert blend(normalized([1, 1, 1]), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_a_longer_run_begins_like_a_shorter_one():
    weights = normalized([0.5, 0.31, 0.19])
    assert blend(weights, 5000)[:777].tolist() == blend(weights, 777).tolist()


def test_every_source_stays_near_its_share():
    random = np.random.default_rng(0)
    weights = normalized(random.random(300) + 0.01)
    source = blend(weights, 20_000)
    for count in (1000, 7777, 20_000):
        taken = np.bincount(source[:count], minlength=300)
        assert np.abs(taken - weights * count).max() < 2


def test_bookkeeping_across_blocks():
    """More samples than the distance between two kept counts."""
    mixture = BlendedSamples({"a": Counted(0, 100), "b": Counted(1, 1000)}, [0.3, 0.7], 40_000)
    source = blend(normalized([0.3, 0.7]), 40_000)
    for index in (0, 1, 16_383, 16_384, 16_385, 33_333, 39_999):
        number, place = mixture.text(index).token_L.tolist()
        assert number == source[index] and place == np.count_nonzero(source[:index] == number)
    for count in (0, 5, 16_384, 40_000):
        assert mixture.taken(count).tolist() == np.bincount(source[:count], minlength=2).tolist()
    assert mixture.epochs(40_000) == {"a": 120.0, "b": 28.0}


def test_temperature():
    assert weights_by_tokens([100, 400], 1) == [0.25, 1.0]
    assert weights_by_tokens([100, 400], 2) == [0.5, 1.0]
    assert weights_by_tokens([100, 400], 1e9) == pytest.approx([1.0, 1.0])


def test_too_many_sources():
    sources = {str(n): Counted(n, 1) for n in range(MAX_SOURCES + 1)}
    with pytest.raises(UserError, match="1001 sources, at most 1000"):
        BlendedSamples(sources, [1.0] * len(sources), 10)
