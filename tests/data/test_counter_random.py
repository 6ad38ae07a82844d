"""The random stream against an independent SplitMix64, and meta positions written out: they may never change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megameta.data.counter_random import choose, make_key, mix, permutation, stream
from megameta.data.dataset import meta_positions

WORD = 2**64


class SplitMix64:
    """The generator as published (Vigna's splitmix64.c), one number at a time, in plain integers."""

    def __init__(self, state):
        self.state = state % WORD

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) % WORD
        z = self.state
        z = ((z ^ (z // 2**30)) * 0xBF58476D1CE4E5B9) % WORD
        z = ((z ^ (z // 2**27)) * 0x94D049BB133111EB) % WORD
        return z ^ (z // 2**31)


def test_published_values():
    """First outputs of splitmix64.c for the seed 1234567, as quoted by Rosetta Code."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert stream(1234567, 5).tolist() == expected
    generator = SplitMix64(1234567)
    assert [generator.next() for _ in range(5)] == expected


@given(st.integers(0, WORD - 1), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_stream_is_splitmix64(key, count):
    generator = SplitMix64(key)
    assert stream(key, count).tolist() == [generator.next() for _ in range(count)]


@given(st.integers(0, WORD - 1))
@settings(max_examples=60, deadline=None)
def test_mix_is_its_finaliser(value):
    generator = SplitMix64(value - 0x9E3779B97F4A7C15)
    assert mix(value) == generator.next()


def test_every_part_of_a_key_and_its_place_count():
    keys = [
        make_key(),
        make_key(0),
        make_key(1),
        make_key(0, 0),
        make_key(0, 1),
        make_key(1, 0),
        make_key(1, "documents", 0),
        make_key(1, "samples", 0),
        make_key(1, "samples", 1),
        make_key(2, "samples", 0),
        make_key(1, "meta-tokens", 0),
        make_key("samples", 1, 0),
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < WORD for key in keys)


def _key(*words):
    """make_key, once more: the finaliser chained over 64-bit words."""
    key = 0
    for word in words:
        key = SplitMix64(((key + 0x9E3779B97F4A7C15) % WORD ^ word) - 0x9E3779B97F4A7C15).next()
    return key


@given(st.integers(0, 2**63), st.integers(0, 2**40), st.integers(1, 60), st.data())
@settings(max_examples=80, deadline=None)
def test_meta_positions_are_the_smallest_of_a_stream(seed, index, length, data):
    """An independent reading of the draw: each slot has a random number, the M smallest hold meta-tokens."""
    count = data.draw(st.integers(0, length))
    label = [int.from_bytes(b"meta-tok", "little"), int.from_bytes(b"ens", "little")]
    generator = SplitMix64(_key(seed, *label, index))
    numbers = [generator.next() for _ in range(length)]
    assert meta_positions(seed, index, length, count).tolist() == sorted(
        sorted(range(length), key=numbers.__getitem__)[:count]
    )


GOLDEN = {
    # (seed, sample index, T, M): positions
    (1234, 0, 32, 3): [1, 7, 16],
    (1234, 1, 32, 3): [1, 12, 16],
    (0, 0, 16, 1): [4],
    (7, 123456789, 64, 6): [25, 39, 42, 46, 56, 58],
    (1234, 96000000, 1024, 102): [
        7,
        29,
        32,
        51,
        59,
        65,
        91,
        95,
        100,
        109,
        115,
        141,
        145,
        158,
        178,
        190,
        191,
        199,
        200,
        203,
        211,
        212,
        218,
        219,
        220,
        235,
        239,
        245,
        307,
        330,
        332,
        335,
        341,
        364,
        366,
        378,
        384,
        385,
        407,
        420,
        458,
        463,
        472,
        477,
        486,
        500,
        518,
        523,
        551,
        552,
        562,
        567,
        568,
        581,
        586,
        597,
        612,
        624,
        630,
        636,
        647,
        654,
        655,
        667,
        675,
        681,
        683,
        685,
        690,
        697,
        715,
        716,
        725,
        748,
        751,
        759,
        774,
        789,
        791,
        801,
        804,
        809,
        815,
        824,
        829,
        838,
        854,
        859,
        863,
        890,
        905,
        911,
        915,
        921,
        927,
        954,
        982,
        983,
        992,
        993,
        999,
        1010,
    ],
    (1099511627777, 5, 10, 5): [0, 2, 3, 4, 7],
    (3, 9, 8, 0): [],
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_meta_positions(case):
    assert meta_positions(*case).tolist() == GOLDEN[case]


@given(st.integers(0, WORD - 1), st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_choose_has_no_repeats_and_is_ascending(key, population, data):
    count = data.draw(st.integers(0, population))
    chosen = choose(key, population, count)
    assert chosen.dtype == np.int64 and len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    assert not count or (chosen[0] >= 0 and chosen[-1] < population)


@given(st.integers(0, WORD - 1), st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_permutation_holds_each_once(key, count):
    assert sorted(permutation(key, count).tolist()) == list(range(count))


def _chi_square(counts, expected):
    return float(((np.asarray(counts) - expected) ** 2 / expected).sum())


def test_meta_positions_are_uniform():
    """Chi-square over slots, and over pairs of neighbours, at six standard deviations."""
    length, count, draws = 32, 4, 8000
    hits, pairs = np.zeros(length), np.zeros(length - 1)
    for index in range(draws):
        places = meta_positions(1234, index, length, count)
        hits[places] += 1
        chosen = np.zeros(length, dtype=bool)
        chosen[places] = True
        pairs += chosen[1:] & chosen[:-1]
    # Without replacement the variance of a count is (1 − M/T) of the Poisson one.
    statistic = _chi_square(hits, draws * count / length) / (1 - count / length)
    assert abs(statistic - (length - 1)) < 6 * np.sqrt(2 * (length - 1))
    assert statistic > 5  # a lattice would be too even
    together = draws * count * (count - 1) / (length * (length - 1))
    assert abs(pairs - together).max() < 6 * np.sqrt(together)


def test_permutations_are_uniform():
    counts = {}
    for epoch in range(6000):
        order = tuple(permutation(make_key(5, "samples", epoch), 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert _chi_square(list(counts.values()), 6000 / 24) < 23 + 6 * np.sqrt(46)
