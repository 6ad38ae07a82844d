"""Samples against a slow loop written from spec §1: injection, labels, documents, positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megameta.config import DataSection
from megameta.data import dataset as module
from megameta.data.dataset import IGNORE_INDEX, SampleFormat, build_sample, meta_positions, periodic_positions
from megameta.data.samples import Text
from megameta.errors import UserError

META = 999


def make_text(length, ends=()):
    """L + 1 tokens 100, 101, …; a new document begins at each of ``ends``."""
    document = np.cumsum(np.isin(np.arange(length + 1), list(ends)))
    return Text(np.arange(100, 101 + length), document.astype(np.int64))


def slow_sample(text, positions, form):
    """Tokens, labels, documents, positions of the T slots, one at a time; slot T is there for its token alone."""
    slots, length = [], form.text_per_sample + len(positions)
    token, owner = list(text.token_L), list(text.document_L)
    current = owner[0]
    for t in range(length + 1):
        if t in positions:
            slots.append((META, True, current))  # of the text before it; a leading run of the first document
        else:
            current = owner.pop(0)
            slots.append((token.pop(0), False, current))
    assert not token
    labels, documents, place = [], [], []
    text_seen = 0
    for t in range(length):
        _, is_meta, document = slots[t]
        text_seen += not is_meta
        following, following_is_meta, following_document = slots[t + 1]
        counts = not following_is_meta
        if form.document_mask and following_document != document:
            counts = False
        if form.skip_first_target and text_seen == 0:
            counts = False
        labels.append(following if counts else IGNORE_INDEX)
        documents.append(document)
        place.append(0 if t == 0 or documents[t - 1] != document else place[-1] + 1)
    return [s[0] for s in slots[:length]], labels, documents, place


def check(text, index, form):
    sample = build_sample(text, index, form)
    positions = meta_positions(form.seed, index, form.sequence_length, form.num_meta_tokens).tolist()
    tokens, labels, documents, place = slow_sample(text, positions, form)
    assert sample.token_T.tolist() == tokens
    assert sample.label_T.tolist() == labels
    assert (sample.document_T is None) == (not form.document_mask)
    assert form.document_mask is False or sample.document_T.tolist() == documents
    assert (sample.position_T is None) == (not form.reset_positions)
    assert form.reset_positions is False or sample.position_T.tolist() == place
    assert sample.index == index
    for array in (sample.token_T, sample.label_T, sample.document_T, sample.position_T):
        assert array is None or (array.dtype == np.int64 and array.shape == (form.sequence_length,))
    return sample


@given(st.integers(1, 20), st.integers(0, 8), st.integers(0, 10**6), st.booleans(), st.booleans(), st.data())
@settings(max_examples=200, deadline=None)
def test_against_the_slow_loop(length, metas, index, masked, skip_first, data):
    ends = data.draw(st.sets(st.integers(1, length)))
    reset = masked and data.draw(st.booleans())
    form = SampleFormat(length, metas, META, 7, masked, reset, skip_first)
    check(make_text(length, ends if masked else ()), index, form)


def at(monkeypatch, *positions):
    monkeypatch.setattr(module, "meta_positions", lambda seed, index, length, count: np.array(positions))


X = IGNORE_INDEX


def test_written_out(monkeypatch):
    """A leading run, a run at a document's end, and one at the very end."""
    at(monkeypatch, 0, 1, 4, 5, 8)
    form = SampleFormat(4, 5, META, 0, document_mask=True, reset_positions=True)
    sample = build_sample(make_text(4, ends=(2,)), 3, form)
    #        slot                      0     1    2    3     4     5    6    7     8   then 104
    assert sample.token_T.tolist() == [META, META, 100, 101, META, META, 102, 103, META]
    assert sample.label_T.tolist() == [X, 100, 101, X, X, X, 103, X, 104]
    assert sample.document_T.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert sample.position_T.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    plain = build_sample(make_text(4), 3, SampleFormat(4, 5, META, 0))
    assert plain.label_T.tolist() == [X, 100, 101, X, X, 102, 103, X, 104]
    skipping = build_sample(make_text(4), 3, SampleFormat(4, 5, META, 0, skip_first_target=True))
    assert skipping.label_T.tolist() == [X, X, 101, X, X, 102, 103, X, 104]


def test_without_meta_tokens():
    sample = build_sample(make_text(4), 0, SampleFormat(4, 0, META, 0))
    assert sample.token_T.tolist() == [100, 101, 102, 103]
    assert sample.label_T.tolist() == [101, 102, 103, 104]
    assert sample.document_T is None and sample.position_T is None
    skipping = build_sample(make_text(4), 0, SampleFormat(4, 0, META, 0, skip_first_target=True))
    assert skipping.label_T.tolist() == [101, 102, 103, 104], "100 is nobody's target: nothing to skip"


@given(st.integers(1, 30), st.integers(0, 10), st.integers(0, 10**6), st.booleans(), st.data())
@settings(max_examples=100, deadline=None)
def test_skip_first_target_makes_targets_those_of_the_twin(length, metas, index, masked, data):
    """With and without injection the same text tokens are targets (spec §4)."""
    ends = data.draw(st.sets(st.integers(1, length))) if masked else ()
    text = make_text(length, ends)
    with_meta = build_sample(text, index, SampleFormat(length, metas, META, 7, masked, skip_first_target=True))
    without = build_sample(text, index, SampleFormat(length, 0, META, 7, masked, skip_first_target=True))
    assert [x for x in with_meta.label_T if x != X] == [x for x in without.label_T if x != X]


def test_positions_are_those_of_the_index_and_seed():
    form = SampleFormat(28, 4, META, 7)
    draws = [tuple(np.flatnonzero(build_sample(make_text(28), i, form).token_T == META)) for i in range(50)]
    assert len(set(draws)) > 45
    assert draws[5] == tuple(meta_positions(7, 5, 32, 4))
    other = SampleFormat(28, 4, META, 8)
    assert tuple(np.flatnonzero(build_sample(make_text(28), 5, other).token_T == META)) != draws[5]


def test_format_of_a_configuration():
    data = DataSection(sequence_length=64, meta_token_fraction=0.1, document_mask=True, reset_positions=True)
    form = SampleFormat.of(data, META, 5)
    assert form == SampleFormat(58, 6, META, 5, True, True, False)
    assert form.sequence_length == 64


@pytest.mark.parametrize(("fraction", "slots", "expected"), [(0.29, 100, 29), (0.1, 1024, 102), (0.0, 64, 0)])
def test_number_of_meta_tokens(fraction, slots, expected):
    data = DataSection(sequence_length=slots, meta_token_fraction=fraction)
    assert data.num_meta_tokens == expected
    assert data.text_per_sample == slots - expected


@pytest.mark.parametrize(
    ("vocabulary", "meta", "message"),
    [(104, META, r"text of sample 3 holds token 104, and model\.vocab_size is 104"), (105, 102, "the meta-token 102")],
)
def test_text_of_another_tokenizer_is_refused(vocabulary, meta, message):
    with pytest.raises(UserError, match=message + r".*another tokenizer"):
        build_sample(make_text(4), 3, SampleFormat(4, 1, meta, 0, vocab_size=vocabulary))
    # A baseline without meta-tokens may have text in the last id.
    assert build_sample(make_text(4), 3, SampleFormat(4, 0, 104, 0, vocab_size=105)).label_T.tolist()[-1] == 104


def test_periodic_places_are_golden_and_different():

    assert periodic_positions(32, 4).tolist() == [4, 12, 20, 28]
    assert periodic_positions(30, 4).tolist() == [3, 11, 18, 26]
    assert periodic_positions(10, 0).tolist() == []
    for length, count in ((1024, 102), (7, 7), (9, 5)):
        places = periodic_positions(length, count)
        assert len(set(places.tolist())) == count and places[0] >= 0 and places[-1] < length
