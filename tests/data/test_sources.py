"""What a configuration trains and evaluates on: forms of data.train, splits, pieces of documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megameta.config import build_config
from megameta.config.validate import problems
from megameta.corpus.indexed_writer import IndexedDatasetWriter
from megameta.data.dataset import IGNORE_INDEX, Dataset, SampleFormat
from megameta.data.indexed import IndexedDataset
from megameta.data.samples import Corpus, DocumentSamples, SampleIndex
from megameta.data.sources import held_out_samples, split_shares, training_data
from megameta.errors import UserError


def write(prefix, lengths, first=1):
    """Documents of these lengths; no token comes twice. Returns them."""
    documents = []
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for length in lengths:
            documents.append(np.arange(first, first + length))
            writer.add_document(documents[-1])
            first += length
    return documents


def config_of(folder, **data):
    data = {"sequence_length": 8, "meta_token_fraction": 0.0, **data}
    train = {"num_steps": 10, "global_batch_size": 4, "micro_batch_size": 4}
    return build_config({"run": {"dir": str(folder / "run")}, "data": data, "train": train})


@pytest.mark.parametrize(
    ("given_train", "sources", "weights"),
    [
        ("a", {"": ["a"]}, None),
        (["a", "b"], {"": ["a", "b"]}, None),
        ([0.3, "a", 0.7, "b"], {"a": ["a"], "b": ["b"]}, [0.3, 0.7]),
        ({"a": 1, "b": 3}, {"a": ["a"], "b": ["b"]}, [1, 3]),
        ({"a": None, "x": ["b", "c"]}, {"a": ["a"], "x": ["b", "c"]}, [None, None]),
        ({"x": {"prefixes": "b", "weight": 2}, "c": 1}, {"x": ["b"], "c": ["c"]}, [2, 1]),
    ],
)
def test_forms_of_train(given_train, sources, weights):
    config = build_config({"data": {"train": given_train}})
    assert config.data.sources == sources
    if weights is not None:
        assert [source.weight for source in config.data.train.values()] == weights
    assert build_config(config.to_dict()) == config


@pytest.mark.parametrize(
    "bad", [[0.3, "a", "b"], [0.3, "a", 0.7], [0.5, "a", 0.5, "a"], {"a": -1}, {"a": {"weigth": 1}}, [True, "a"]]
)
def test_forms_that_are_none(bad):
    with pytest.raises(UserError, match=r"data\.train"):
        build_config({"data": {"train": bad}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": {"a": 1, "b": None}}, "b without a weight, others with one"),
        ({"train": {"a": 1, "b": 1}, "temperature": 2}, "data.temperature is for sources without weights"),
        ({"train": ["a"], "temperature": 2}, "data.temperature needs sources"),
        ({"train": {"a": []}}, "data.train.a: no prefixes"),
        ({"train": "a", "split": [0, 1, 1]}, "that of training above 0"),
        ({"train": "a", "split": [1, -1, 1]}, "0 or more"),
        ({"train": "a", "split": [9, 1, 0], "valid": "b"}, "data.valid.valid: data.split makes a set of that name"),
    ],
)
def test_contradictions(data, message):
    found = problems(build_config({"data": data}), world_size=1, device="cpu")
    assert any(message in problem for problem in found), found


def test_a_mixture_takes_its_shares(tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    write(a, [50, 50], first=1)
    write(b, [500, 100], first=1000)
    data = training_data(config_of(tmp_path, train={a: 3, b: 1}))
    from_a = [data.samples.text(index).token_L.max() < 1000 for index in range(40)]
    assert sum(from_a) == 30 and [report.samples for report in data.reports] == [30, 10]
    assert data.reports[0].epochs == 30 / (99 // 8) and data.reports[0].share == 0.75
    assert data.epochs(20) == {a: 15 / (99 // 8), b: 5 / (599 // 8)}
    assert training_data(config_of(tmp_path, train=[a])).epochs(6) == {"data": 0.5}
    by_tokens = training_data(config_of(tmp_path, train={a: None, b: None}))
    assert [report.share for report in by_tokens.reports] == [1 / 7, 6 / 7]
    flatter = training_data(config_of(tmp_path, train={a: None, b: None}, temperature=2.0))
    assert flatter.reports[1].share / flatter.reports[0].share == pytest.approx(6**0.5)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_announcing_random_access_changes_no_token(tmp_path, dtype):
    """Ranges of less and more than a page, at the file's begin, end and off the pages' bounds; an empty file."""
    tokens = np.arange(30_000).astype(dtype)
    with IndexedDatasetWriter(tmp_path / "a", dtype) as writer:
        writer.add_document(tokens)
    with IndexedDatasetWriter(tmp_path / "empty", dtype) as writer:
        writer.add_document([])
    dataset, empty = IndexedDataset(tmp_path / "a"), IndexedDataset(tmp_path / "empty")
    dataset.expect_random_access()
    empty.expect_random_access()
    for start, count in ((0, 1), (0, 30_000), (2047, 2049), (4095, 9000), (29_999, 1), (17_001, 12_999), (30_000, 0)):
        assert dataset.tokens(start, count).tolist() == list(range(start, start + count))
    assert empty.tokens(0, 0).tolist() == []


def test_a_source_without_tokens(tmp_path):
    write(tmp_path / "a", [50])
    write(tmp_path / "empty", [0])
    with pytest.raises(UserError, match=r"no tokens in .*empty"):
        training_data(config_of(tmp_path, train={str(tmp_path / "a"): None, str(tmp_path / "empty"): None}))


def test_a_split_is_by_documents_and_whole(tmp_path):
    """Megatron's rule: documents round(begin · n) to round(end · n) of each dataset; no document in two parts."""
    documents = write(tmp_path / "a", range(9, 30))
    prefix = str(tmp_path / "a")
    config = config_of(tmp_path, train=prefix, split=[80, 15, 5])
    shares = split_shares(config.data)
    assert list(shares) == ["train", "valid", "test"]
    assert [edge for share in shares.values() for edge in share] == pytest.approx([0, 0.8, 0.8, 0.95, 0.95, 1])
    held_out = held_out_samples(config)
    assert list(held_out) == ["valid", "test"]
    train = training_data(config).samples
    n = len(documents)
    cuts = {"train": slice(0, round(0.8 * n)), "valid": slice(round(0.8 * n), round(0.95 * n)), "test": slice(20, n)}
    assert cuts["test"].start == round(0.95 * n)
    for name, samples in {"train": train, **held_out}.items():
        text = np.concatenate(documents[cuts[name]])
        seen = {int(t) for index in range(samples.samples_per_epoch) for t in samples.text(index).token_L}
        assert seen <= set(text.tolist()) and len(seen) >= len(text) - 8
    mixed = config_of(tmp_path, train={prefix: 1}, split=[80, 20, 0])
    assert list(held_out_samples(mixed)) == [f"valid/{prefix}"]


def test_a_part_too_small_is_named(tmp_path):
    write(tmp_path / "a", [9] * 10)
    with pytest.raises(UserError, match=r"data\.split, test: .*0 tokens are fewer"):
        held_out_samples(config_of(tmp_path, train=str(tmp_path / "a"), split=[97, 0, 3]))


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(lambda lengths: max(lengths) > 1),
    st.integers(1, 7),
    st.one_of(st.none(), st.integers(0, 99)),
)
@settings(max_examples=80, deadline=None)
def test_pieces_cover_every_document_once(tmp_path_factory, lengths, per_sample, seed):
    folder = tmp_path_factory.mktemp("pieces")
    documents = write(folder / "a", lengths)
    samples = DocumentSamples(Corpus([str(folder / "a")]), per_sample, seed)
    for epoch in range(2):
        first = epoch * samples.samples_per_epoch
        texts = [samples.text(first + place) for place in range(samples.samples_per_epoch)]
        targets = sorted(int(t) for text in texts for t in text.token_L[1 : text.num_tokens])
        assert targets == sorted(int(t) for document in documents for t in document[1:])
        for text in texts:
            assert len(text.token_L) == per_sample + 1 and not text.token_L[text.num_tokens :].any()
            assert (np.diff(text.token_L[: text.num_tokens]) == 1).all()


def test_padding_has_no_loss_and_text_keeps_its_targets(tmp_path):
    document = write(tmp_path / "a", [11])[0]
    samples = DocumentSamples(Corpus([str(tmp_path / "a")]), 16, None)
    for meta in (0, 4):
        form = SampleFormat(text_per_sample=16, num_meta_tokens=meta, meta_token_id=0 if meta == 0 else 99, seed=3)
        sample = Dataset(samples, form)[0]
        # With a leading meta-token the first token of the text is predicted too.
        leading = meta > 0 and sample.token_T[0] == 99
        assert sample.label_T[sample.label_T != IGNORE_INDEX].tolist() == document[0 if leading else 1 :].tolist()


def test_many_short_documents_are_gathered_as_one_by_one(tmp_path):
    """The path for samples of many documents, over one dataset and over two, against joining."""
    random = np.random.default_rng(1)
    lengths = random.integers(0, 4, 300)
    documents = write(tmp_path / "a", lengths[:200]) + write(tmp_path / "b", lengths[200:], first=10_000)
    joined = np.concatenate(documents)
    owner = np.repeat(np.arange(300), lengths)
    for names in (["a", "b"], ["a"]):
        config = config_of(tmp_path, train=[str(tmp_path / name) for name in names], sequence_length=64)
        corpus = Corpus(config.data.train)
        samples = SampleIndex(corpus, 64, None)
        for index in range(samples.samples_per_epoch):
            text, cut = samples.text(index), slice(index * 64, index * 64 + 65)
            assert text.token_L.tolist() == joined[cut].tolist()
            assert text.document_L.tolist() == np.unique(owner[cut], return_inverse=True)[1].tolist()
