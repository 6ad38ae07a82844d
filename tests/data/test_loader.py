"""The samples of an optimiser step do not depend on the layout."""

import dataclasses

import numpy as np
import pytest
import torch

from megameta.corpus.indexed_writer import IndexedDatasetWriter
from megameta.data.dataset import Dataset, SampleFormat
from megameta.data.loader import Batch, StepLoader, next_batch_number
from megameta.data.samples import Corpus, SampleIndex
from megameta.model import ModelConfig, make_context

GLOBAL = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "d"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in (30, 11, 80, 7, 400, 3):
            writer.add_document(np.arange(length))
    form = SampleFormat(12, 3, 999, 5, document_mask=True, reset_positions=True)
    return Dataset(SampleIndex(Corpus([str(prefix)]), 12, 5), form)


def read(dataset, number, *, ranks, micro, then=None):
    """Batches of every rank."""
    out = []
    for rank in range(ranks):
        loader = StepLoader(
            dataset, micro_batch_size=micro, global_batch_size=GLOBAL, data_parallel_size=ranks, data_parallel_rank=rank
        )
        assert loader.accumulation_steps == GLOBAL // (micro * ranks)
        out.append(loader.read(number, then))
        loader.close()
    return out


def in_order(by_rank):
    """All samples of a step as one batch, accumulation steps first, ranks within them."""
    steps = [batch for batches in zip(*by_rank) for batch in batches]
    ids = [i for batch in steps for i in batch.sample_ids]
    fields = ("token_BT", "label_BT", "document_BT", "position_BT")
    return ids, {name: torch.cat([getattr(batch, name) for batch in steps]) for name in fields}


@pytest.mark.parametrize(
    "number", [0, 1, 2, 7]
)  # 44 samples an epoch: batch 2 holds the end of one and the next's start
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_same_samples_in_the_same_order(dataset, number, ranks, micro):
    ids, tensors = in_order(read(dataset, number, ranks=ranks, micro=micro))
    assert ids == list(range(number * GLOBAL, (number + 1) * GLOBAL))
    for row, index in enumerate(ids):
        sample = dataset[index]
        assert tensors["token_BT"][row].tolist() == sample.token_T.tolist()
        assert tensors["label_BT"][row].tolist() == sample.label_T.tolist()
        assert tensors["document_BT"][row].tolist() == sample.document_T.tolist()
        assert tensors["position_BT"][row].tolist() == sample.position_T.tolist()


def test_batches_say_what_they_hold(dataset):
    for batches in read(dataset, 3, ranks=2, micro=4):
        for batch in batches:
            assert batch.num_targets == int((batch.label_BT >= 0).sum())
            assert batch.num_meta_columns == 3 == int((batch.token_BT == 999).sum(1).max())
            assert batch.token_BT.dtype == torch.int64 and batch.token_BT.shape == (4, 15)


def test_reading_ahead_changes_nothing(dataset):
    loader = StepLoader(dataset, micro_batch_size=4, global_batch_size=GLOBAL)
    plan = [(0, 1), (1, 5), (5, 6), (2, None), (6, 7), (7, 8)]  # 2 was not announced, 8 is never fetched
    for number, then in plan:
        ids = [i for batch in loader.read(number, then) for i in batch.sample_ids]
        assert ids == list(range(number * GLOBAL, (number + 1) * GLOBAL))
    loader.close()


def test_a_failure_in_the_reading_thread_reaches_the_reader(dataset):
    class Broken:
        form = dataset.form

        def __getitem__(self, index):
            raise OSError("the disk is gone")

    loader = StepLoader(Broken(), micro_batch_size=4, global_batch_size=GLOBAL)
    with pytest.raises(OSError, match="the disk is gone"):
        loader.read(0)
    loader.close()


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        ([], [0, 1, 2, 3, 4, 5]),
        ([(0, 2)], [2, 3, 4, 5, 6, 7]),
        ([(1, 3), (4, 5)], [0, 3, 5, 6, 7, 8]),
        ([(3, 5), (1, 3)], [0, 5, 6, 7, 8, 9]),  # they touch, in any order
        ([(1, 9), (2, 4)], [0, 9, 10, 11, 12, 13]),  # one inside the other
        ([(1, 4), (3, 6)], [0, 6, 7, 8, 9, 10]),  # they overlap
    ],
)
def test_skipped_ranges(skip, expected):
    visited, number = [], 0
    for _ in range(6):
        number = next_batch_number(number, skip)
        visited.append(number)
        number += 1
    assert visited == expected


@pytest.mark.parametrize("metas", [0, 3])
def test_runs_of_documents_are_those_that_the_model_would_find(metas):
    meta, config = 5, ModelConfig(vocab_size=6, hidden_size=8, num_heads=1, num_layers=1, max_position_embeddings=12)
    token_BT = torch.zeros(2, 12, dtype=torch.int64)
    token_BT[0, [0, 4, 5][:metas]] = meta
    token_BT[1, [11][:metas]] = meta
    document_BT = torch.tensor([[0] * 5 + [1] * 7, [3] * 11 + [4]])
    batch = Batch(token_BT, token_BT, document_BT, None, metas, (0, 1)).with_runs(meta).to("cpu")
    found = make_context(config, token_BT, document_BT=document_BT, num_meta_columns=metas)
    runs = batch.document_runs
    assert torch.equal(runs.rows.bounds_N, found.mask.documents.runs.bounds_N)
    assert runs.rows.bounds_N[:5].tolist() == [0, 5, 12, 23, 24]
    if metas:
        assert torch.equal(runs.meta.bounds_N, found.meta.mask.documents.runs.bounds_N)
        assert runs.meta.bounds_N[:5].tolist() == [0, 2, 3, 4, 6], "two of document 0, one of 1; one of 4, padding"
    assert batch.padded(8, token=0).document_runs is None
    assert dataclasses.replace(batch, document_BT=None, document_runs=None).with_runs(meta).document_runs is None


def test_padding_changes_nothing_before_it():
    batch = Batch(
        token_BT=torch.arange(10).view(2, 5),
        label_BT=torch.arange(10).view(2, 5),
        document_BT=torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]),
        position_BT=torch.arange(5).expand(2, 5),
        num_meta_columns=0,
        sample_ids=(0, 1),
        group_BT=torch.arange(1, 6).expand(2, 5),
    )
    padded = batch.padded(4, token=7)
    assert padded.token_BT.tolist() == [[0, 1, 2, 3, 4, 7, 7, 7], [5, 6, 7, 8, 9, 7, 7, 7]]
    assert padded.label_BT[:, 5:].eq(-100).all() and padded.num_targets == batch.num_targets
    assert padded.document_BT[:, 5:].tolist() == [[2] * 3, [1] * 3], "a document of its own"
    assert padded.position_BT[:, 5:].eq(0).all()
    assert padded.group_BT.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]] * 2
    assert batch.padded(5, token=7) is batch
    plain = dataclasses.replace(batch, document_BT=None, position_BT=None).padded(3, token=7)
    assert plain.document_BT is None and plain.position_BT is None and plain.token_BT.shape == (2, 6)
