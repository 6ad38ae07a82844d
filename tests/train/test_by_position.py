"""Loss by position in the sequence against a loop over the raw documents, token by token."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megameta.data.dataset import meta_positions
from megameta.data.indexed import IndexedDataset
from megameta.engine.build import build_model
from megameta.engine.loss_module import LossModule, Scores, make_scores, sum_scores
from megameta.errors import UserError
from megameta.parallel.topology import Topology
from megameta.train.evaluation import Evaluator, PositionResult
from tests.support.training import META, tiny_config, write_corpus

WANTED, TEXT = 11, 28


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("by_position") / "v", tokens=2000)


def make_config(corpus, **changes):
    return tiny_config(corpus, data__valid=corpus, eval__num_samples=WANTED, **changes)


def measure(config, buckets):
    """Scores by set, in this process."""
    module = LossModule(build_model(config)).eval()
    evaluator = Evaluator(config, Topology(), buckets)
    score = partial(module, score=True, num_groups=buckets)
    found = {}
    with torch.no_grad():
        for name in evaluator.sets:
            total, counts = sum_scores(score, evaluator.batches(name), None, "cpu", buckets)
            found[name] = make_scores(total.tolist(), counts)
    return found


def naive(config, corpus, metas, buckets):
    """[loss sum, targets] of each bucket: the place of a word is counted over the words that come before it."""
    data = IndexedDataset(corpus)
    text = np.concatenate([data.document(d) for d in range(data.num_documents)])
    owner = np.concatenate([np.full(data.document_lengths[d], d) for d in range(data.num_documents)])
    model = build_model(config).double().eval()
    windows = (len(text) - 1) // TEXT
    found = [[0.0, 0] for _ in range(buckets)]
    for n in range(WANTED):
        window = n * windows // WANTED
        words = list(zip(text[window * TEXT :], owner[window * TEXT :]))[: TEXT + 1]
        places = set(meta_positions(config.run.seed, window, TEXT + metas, metas).tolist())
        slots, owners, word_at, seen = [], [], {}, 0
        for t in range(TEXT + metas + 1):
            if t in places:
                slots.append(META)
                owners.append(owners[-1] if owners else words[0][1])
            else:
                slots.append(int(words[seen][0]))
                owners.append(words[seen][1])
                word_at[t] = seen  # so many words come before it
                seen += 1
        starts = [t for t in range(len(slots)) if t == 0 or owners[t] != owners[t - 1]]
        position = [t - max(s for s in starts if s <= t) for t in range(len(slots) - 1)]
        with torch.no_grad():
            logits = model(
                torch.tensor([slots[:-1]]),
                document_BT=torch.tensor([owners[:-1]]),
                position_BT=torch.tensor([position]),
            )[0]
        for t, before in word_at.items():
            if before == 0 or owners[t] != owners[t - 1]:
                continue
            bucket = next(b for b in range(buckets) if before - 1 < TEXT * (b + 1) / buckets)
            found[bucket][0] -= float(F.log_softmax(logits[t - 1], dim=-1)[slots[t]])
            found[bucket][1] += 1
    return found


@pytest.mark.parametrize("buckets", [1, 5, TEXT])
def test_buckets_against_a_naive_loop(corpus, buckets):
    config = make_config(corpus)
    measured = measure(config, buckets)
    for name, metas in (("valid", 4), ("valid/no-meta", 0)):
        expected = naive(config, corpus, metas, buckets)
        assert [targets for _, targets in measured[name].by_group] == [targets for _, targets in expected]
        losses = [loss for loss, _ in measured[name].by_group]
        assert losses == pytest.approx([loss for loss, _ in expected], rel=1e-5)


@pytest.mark.parametrize("documents", [{}, {"data__cross_documents": False}], ids=["run on", "padded"])
def test_buckets_add_up_to_the_total_which_they_do_not_change(corpus, documents):
    config = make_config(corpus, **documents)
    plain, parted = measure(config, 0), measure(config, 7)
    for name, scores in parted.items():
        assert plain[name].by_group == ()
        assert (scores.loss_sum, scores.targets) == (plain[name].loss_sum, plain[name].targets)
        assert sum(loss for loss, _ in scores.by_group) == pytest.approx(scores.loss_sum, rel=1e-6)
        assert sum(targets for _, targets in scores.by_group) == scores.targets
        assert len({loss for loss, _ in scores.by_group}) == 7


def test_a_twin_has_the_same_targets_in_every_bucket(corpus):
    def targets(config):
        evaluator = Evaluator(config, Topology(), 6)
        found = {}
        for name in evaluator.sets:
            for batch in evaluator.batches(name):
                for label, group in zip(batch.label_BT.flatten().tolist(), batch.group_BT.flatten().tolist()):
                    if label >= 0:
                        found.setdefault((name, group), []).append(label)
        return found

    meta = targets(make_config(corpus))
    # The last word of the vocabulary is one like others, where there are no meta-tokens.
    shape = {"data__sequence_length": TEXT, "data__meta_token_fraction": 0.0, "model__meta_attention": False}
    twin = targets(make_config(corpus, model__meta_token_id=5, **shape))
    for group in range(6):
        assert meta["valid", group] == meta["valid/no-meta", group] == twin["valid", group] != []


def test_what_a_row_says():
    scores = Scores(6.0, 4, 0, 0, 2, 0, ((4.0, 2), (0.0, 0), (1e9, 1)))
    rows = PositionResult.of(scores, TEXT)
    assert [(row.first, row.last) for row in rows] == [(1, 10), (11, 19), (20, 28)]
    assert rows[0] == PositionResult(1, 10, 2.0, math.exp(2.0), 2)
    assert (rows[1].loss, rows[1].perplexity, rows[1].targets) == (None, None, 0)
    assert rows[2].perplexity == math.exp(700)
    for buckets in (1, 5, 28):  # every position is in the bucket whose row names it
        rows = PositionResult.of(Scores(0.0, 0, 0, 0, 0, 0, ((0.0, 0),) * buckets), TEXT)
        named = [b for b, row in enumerate(rows) for _ in range(row.first, row.last + 1)]
        assert named == [(j - 1) * buckets // TEXT for j in range(1, TEXT + 1)]


@pytest.mark.parametrize("buckets", [-1, TEXT + 1])
def test_more_buckets_than_positions(corpus, buckets):
    with pytest.raises(UserError, match=f"{buckets} buckets of positions: a sequence has 28 tokens of text"):
        Evaluator(make_config(corpus), Topology(), buckets)
