"""The closed form of samples against an oracle that really joins the documents into one long array."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megameta.corpus.indexed_writer import IndexedDatasetWriter
from megameta.data.counter_random import make_key, permutation
from megameta.data.samples import Corpus, SampleIndex
from megameta.errors import UserError


def write(prefix, lengths, first=0):
    """Documents of these lengths; every token of the corpus is another number. Returns the documents."""
    documents = []
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for length in lengths:
            documents.append(np.arange(first, first + length))
            writer.add_document(documents[-1])
            first += length
    return documents


def joined(documents, seed, epoch):
    """(tokens, document of each token) of an epoch, joined for real."""
    order = range(len(documents)) if seed is None else permutation(make_key(seed, "documents", epoch), len(documents))
    tokens = np.concatenate([documents[d] for d in order])
    owner = np.concatenate([np.full(len(documents[d]), d) for d in order])
    return tokens, owner


def naive(documents, per_sample, seed, index):
    total = sum(len(d) for d in documents)
    per_epoch = (total - 1) // per_sample
    epoch, place = index // per_epoch, index % per_epoch
    sample = place if seed is None else permutation(make_key(seed, "samples", epoch), per_epoch)[place]
    tokens, owner = joined(documents, seed, epoch)
    cut = slice(sample * per_sample, sample * per_sample + per_sample + 1)
    numbers, seen = [], []
    for o in owner[cut]:
        if o not in seen:
            seen.append(o)
        numbers.append(seen.index(o))
    return tokens[cut].tolist(), numbers


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 1),
    st.integers(1, 8),
    st.one_of(st.none(), st.integers(0, 2**40)),
    st.integers(0, 12),
)
@settings(max_examples=150, deadline=None)
def test_closed_form(lengths, per_sample, seed, split):
    with tempfile.TemporaryDirectory() as folder:
        # in two datasets, the second of which may be empty
        first = write(Path(folder) / "a", lengths[:split])
        second = write(Path(folder) / "b", lengths[split:], first=sum(lengths[:split]))
        corpus = Corpus([f"{folder}/a", f"{folder}/b"])
        if sum(lengths) < per_sample + 1:
            with pytest.raises(UserError, match=r"fewer than one sample's .* lower data\.sequence_length"):
                SampleIndex(corpus, per_sample, seed)
            return
        index = SampleIndex(corpus, per_sample, seed)
        assert index.samples_per_epoch == (sum(lengths) - 1) // per_sample
        for i in range(3 * index.samples_per_epoch):
            text = index.text(i)
            assert (text.token_L.tolist(), text.document_L.tolist()) == naive(first + second, per_sample, seed, i)


@pytest.fixture
def corpus(tmp_path):
    documents = write(tmp_path / "c", [5, 0, 17, 1, 1, 0, 40, 3, 23, 0])
    return Corpus([str(tmp_path / "c")]), documents


def test_an_epoch_sees_each_token_once_apart_from_its_tail(corpus):
    index = SampleIndex(corpus[0], 7, seed=3)
    assert index.samples_per_epoch == 12
    tails = set()
    for epoch in range(6):
        texts = [index.text(epoch * 12 + j).token_L for j in range(12)]
        inputs = np.concatenate([t[:-1] for t in texts])
        assert len(set(inputs.tolist())) == 84
        # A text of L + 1 tokens ends with the token that the following one begins with.
        starts = {int(t[0]) for t in texts}
        assert sum(int(t[-1]) in starts for t in texts) == 11
        tokens, _ = joined(corpus[1], 3, epoch)
        assert set(range(90)) - set(inputs.tolist()) == set(tokens[84:].tolist())
        tails.add(tuple(tokens[84:].tolist()))
    assert len(tails) > 1, "always the same tokens are dropped"


def test_order_of_reading_does_not_matter(corpus):
    forward = SampleIndex(corpus[0], 7, seed=3)
    expected = [forward.text(i).token_L.tolist() for i in range(36)]
    jumping = SampleIndex(corpus[0], 7, seed=3)
    for i in np.random.default_rng(0).permutation(36):
        assert jumping.text(int(i)).token_L.tolist() == expected[i]


def test_epochs_and_seeds_differ_and_none_keeps_the_order(corpus):
    def epoch(seed, number):
        index = SampleIndex(corpus[0], 7, seed)
        return [index.text(number * 12 + j).token_L.tolist() for j in range(12)]

    assert epoch(3, 0) != epoch(3, 1)
    assert sorted(map(sum, epoch(3, 0))) != sorted(map(sum, epoch(3, 1))), "the documents' order does not change"
    assert epoch(3, 0) != epoch(4, 0)
    assert epoch(None, 0) == epoch(None, 1) == [list(range(7 * j, 7 * j + 8)) for j in range(12)]


def test_a_corpus_needs_a_dataset():
    with pytest.raises(UserError, match=r"data\.train"):
        Corpus([])
