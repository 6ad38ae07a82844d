"""Held-out loss against a naive loop over the raw documents; the same on any layout."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megameta.data.dataset import meta_positions
from megameta.data.indexed import IndexedDataset
from megameta.engine.build import build_model
from megameta.engine.loss_module import Scores
from megameta.parallel.topology import Topology
from megameta.train.evaluation import EvalResult, Evaluator
from tests.support.ranks import run_ranks
from tests.support.training import META, VOCABULARY, tiny_config, write_corpus

WANTED = 11  # divides by no micro-batch or number of ranks here
BYTES = torch.arange(1, VOCABULARY + 1)  # bytes that each token is said to stand for


def make_config(corpus, **changes):
    return tiny_config(corpus, data__valid={"all": corpus, "same": [corpus]}, eval__num_samples=WANTED, **changes)


def naive(config, corpus, metas):
    """(loss sum, targets, bytes): window by window, token by token."""
    data = IndexedDataset(corpus)
    text = np.concatenate([data.document(d) for d in range(data.num_documents)])
    owner = np.concatenate([np.full(data.document_lengths[d], d) for d in range(data.num_documents)])
    model = build_model(config).double().eval()
    length = config.data.text_per_sample
    windows = (len(text) - 1) // length
    total, targets, num_bytes = 0.0, 0, 0
    for n in range(WANTED):
        window = n * windows // WANTED
        tokens = list(text[window * length : window * length + length + 1])
        owners = list(owner[window * length : window * length + length + 1])
        places = set(meta_positions(config.run.seed, window, length + metas, metas).tolist())
        slots, documents = [], []
        for t in range(length + metas + 1):
            slots.append(META if t in places else tokens.pop(0))
            documents.append((documents[-1] if documents else owners[0]) if t in places else owners.pop(0))
        position = [0]
        for t in range(1, len(slots) - 1):
            position.append(position[-1] + 1 if documents[t] == documents[t - 1] else 0)
        with torch.no_grad():
            log_p = F.log_softmax(
                model(
                    torch.tensor([slots[:-1]]),
                    document_BT=torch.tensor([documents[:-1]]),
                    position_BT=torch.tensor([position]),
                )[0],
                dim=-1,
            )
        first = next(t for t, token in enumerate(slots) if token != META)
        for t in range(len(slots) - 1):
            if slots[t + 1] != META and t + 1 != first and documents[t + 1] == documents[t]:
                total -= float(log_p[t, slots[t + 1]])
                targets += 1
                num_bytes += int(BYTES[slots[t + 1]])
    return total, targets, num_bytes


def _evaluate(topology, corpus, micros):
    from megameta.engine.pipeline_engine import make_engine

    results = {}
    for micro, stage in micros:
        config = make_config(corpus, train__micro_batch_size=micro, parallel__zero_stage=stage)
        engine = make_engine(config, topology)
        evaluator = Evaluator(config, topology)
        evaluator.byte_counts = BYTES
        results[micro, stage] = evaluator.run(engine)
        assert not engine.engine.module.training
        engine.destroy()
    return results


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("valid") / "v", tokens=2000)


@pytest.fixture(scope="module")
def measured(corpus):
    """By (ranks, micro-batch, stage)."""
    out = {}
    for ranks, micros in ((1, [(1, 1), (8, 0)]), (2, [(1, 0), (2, 1), (4, 3)])):
        reports = run_ranks(_evaluate, ranks, corpus, micros)
        assert all(report == reports[0] for report in reports), "ranks disagree"
        out |= {(ranks, *key): value for key, value in reports[0].items()}
    return out


@pytest.mark.parametrize(("name", "metas"), [("all", 4), ("all/no-meta", 0)])
def test_perplexity_and_bits_against_a_naive_loop(measured, corpus, name, metas):
    total, targets, num_bytes = naive(make_config(corpus), corpus, metas)
    for where, results in measured.items():
        result = results[name]
        assert result.targets == targets, where
        assert result.loss == pytest.approx(total / targets, rel=1e-5), where
        assert result.perplexity == pytest.approx(math.exp(total / targets), rel=1e-4), where
        assert result.bits_per_byte == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5), where


def test_the_same_targets_with_and_without_injection(measured):
    for results in measured.values():
        assert results.keys() == {"all", "all/no-meta", "same", "same/no-meta"}
        assert results["all"] == results["same"]
        assert results["all"].targets == results["all/no-meta"].targets
        assert results["all"].loss != results["all/no-meta"].loss


def test_the_layout_does_not_matter(measured):
    for name in ("all", "all/no-meta"):
        losses = [results[name].loss for results in measured.values()]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
        assert len({results[name].targets for results in measured.values()}) == 1


def targets_of(config, topology=Topology()):  # noqa: B008 - frozen
    evaluator = Evaluator(config, topology)
    return {
        name: [t for batch in evaluator.batches(name) for t in batch.label_BT[batch.label_BT >= 0].tolist()]
        for name in evaluator.sets
    }


def test_a_twin_has_the_very_same_targets(corpus):
    """No meta-tokens and T − M slots: the same text, the same targets, in the same order (spec §4)."""
    meta = targets_of(make_config(corpus))
    twin = targets_of(
        make_config(corpus, data__sequence_length=28, data__meta_token_fraction=0.0, model__meta_attention=False)
    )
    assert twin.keys() == {"all", "same"}
    assert meta["all"] == meta["all/no-meta"] == twin["all"]


def test_all_of_a_set_and_more_than_all(corpus):
    whole = tiny_config(
        corpus,
        data__valid=corpus,
        data__document_mask=False,
        data__reset_positions=False,
        eval__num_samples=0,
        eval__without_injection=False,
    )
    everything = targets_of(whole)
    text = IndexedDataset(corpus)
    windows = (text.num_tokens - 1) // 28
    assert everything.keys() == {"valid"} and len(everything["valid"]) == 28 * windows
    more = targets_of(tiny_config(corpus, data__valid=corpus, eval__num_samples=10**6))
    assert len(more["valid"]) <= 28 * windows


def test_ranks_share_the_samples(corpus):
    config = make_config(corpus, train__micro_batch_size=2)
    alone = targets_of(config)["all"]
    passes, shared = set(), []
    for rank in range(4):
        topology = Topology(world_size=4, rank=rank)
        shared += targets_of(config, topology)["all"]
        passes.add(sum(1 for _ in Evaluator(config, topology).batches("all")))
    assert sorted(shared) == sorted(alone)
    assert passes == {2}, "every rank must make as many passes"


def test_result_without_bytes_or_targets():
    def of(loss_sum, targets, num_bytes):
        return EvalResult.of(Scores(loss_sum, targets, num_bytes, correct=0, rows=1, exact=0))

    assert of(2.0, 4, 0) == EvalResult(0.5, math.exp(0.5), None, 4)
    assert of(0.0, 0, 0).loss == 0.0
    assert of(1e9, 1, 1).perplexity == math.exp(700), "a number even for a loss beyond any"
    assert replace(of(math.log(2) * 8, 8, 1), loss=0.0).bits_per_byte == pytest.approx(8.0)
