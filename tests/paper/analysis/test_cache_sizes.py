"""Rules of a cache on batches: the numbers slot by slot, the same size for all rules, bytes that are really held."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from megameta.config import build_config
from megameta.data.dataset import IGNORE_INDEX, SampleFormat
from megameta.data.loader import Batch
from megameta.data.samples import Text
from megameta.model import GPT, KeepRule, ModelConfig, PruningCache, initialize_weights
from megameta.paper.analysis.cache_rules import (
    FULL,
    RANDOM,
    SINKS,
    WINDOW,
    WITH_META,
    Scored,
    matched_rules,
    peak_bytes,
    rows_seen,
    run_rules,
    score,
    second_half,
)
from megameta.paper.analysis.cache_sizes import accuracy, cache_sizes, task_finding
from megameta.paper.analysis.rate_distortion import EARLIER_SITE, META_SITE, TEXT_SITE, read_sites
from megameta.paper.analysis.registry import Options
from megameta.paper.analysis.subject import Subject
from megameta.statistics import wilson

VOCAB, LENGTH, METAS, WINDOWS = 41, 40, 6, 9


class RandomText:
    """Windows of random tokens, in two documents each."""

    samples_per_epoch = WINDOWS

    def text(self, index: int) -> Text:
        token_L = np.random.default_rng(index).integers(0, VOCAB - 1, LENGTH - METAS + 1)
        return Text(token_L, (np.arange(len(token_L)) >= 12 + index).astype(np.int64))


def make_subject(document_mask: bool, **changes: object) -> Subject:
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": LENGTH}
    config = ModelConfig(**{**shape, "attention_backend": "sdpa", **changes})
    model = GPT(config, vocab_multiple=8).eval().requires_grad_(False)
    initialize_weights(model, replace(config, initializer_range=0.4), seed=3)
    form = SampleFormat(LENGTH - METAS, METAS, config.meta_token_id, 5, document_mask, document_mask, True, VOCAB)
    run = build_config({"model": config.to_dict(), "data": {"sequence_length": LENGTH}})
    return Subject("tiny", run, model, None, "valid", RandomText(), form)


@pytest.fixture(scope="module", params=[False, True], ids=["one text", "documents"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return make_subject(request.param)


def slot_by_slot(subject: Subject, batch: Batch, rule: KeepRule) -> list[float]:
    """Mean loss of each sequence's targets, each sequence alone, one slot a pass."""
    found = []
    for row in range(len(batch.token_BT)):
        cache, losses = PruningCache(rule), []
        for t in range(batch.token_BT.shape[1]):
            part = (slice(row, row + 1), slice(t, t + 1))
            documents = None if batch.document_BT is None else batch.document_BT[part]
            positions = None if batch.position_BT is None else batch.position_BT[part]
            logits = subject.model(batch.token_BT[part], document_BT=documents, position_BT=positions, cache=cache)
            label = int(batch.label_BT[row, t])
            if label != IGNORE_INDEX:
                losses.append(-float(logits[0, 0].double().log_softmax(dim=0)[label]))
        found.append(sum(losses) / len(losses))
    return found


@pytest.mark.parametrize("pinned", ["meta", "none", "random"])
def test_scores_are_those_of_reading_slot_by_slot(subject: Subject, pinned: str) -> None:
    rule = KeepRule(3, 2, pinned, share=0.2)
    batches = [second_half(batch) for batch in subject.held_out(5, batch_size=2)]
    assert all((batch.label_BT[:, : LENGTH // 2] == IGNORE_INDEX).all() for batch in batches)
    found = score(subject.model, batches, rule)
    expected = [loss for batch in batches for loss in slot_by_slot(subject, batch, replace(rule, seed=0))]
    if pinned == "random":  # drawn by the row of the batch, so that rows alone draw otherwise; the first is the same
        assert float(found.loss_N[0]) == pytest.approx(expected[0], rel=1e-5)
    else:
        assert found.loss_N.tolist() == pytest.approx(expected, rel=1e-5)
    full = score(subject.model, batches, None)
    assert full.loss_N.tolist() == pytest.approx(score(subject.model, batches, KeepRule(LENGTH, 0)).loss_N.tolist())
    assert not torch.allclose(full.loss_N, found.loss_N, rtol=1e-3)


def test_rows_that_are_seen_counted_by_hand() -> None:
    subject = make_subject(document_mask=False)
    batch = next(subject.held_out(3, batch_size=3))
    is_meta = batch.token_BT == subject.form.meta_token_id
    for row, value in enumerate(rows_seen(subject.model, batch, KeepRule(5, 2)).tolist()):
        counts = [
            len({s for s in range(t + 1) if t - s < 5 or s < 2 or is_meta[row, s]})
            for t in range(LENGTH)
            if batch.label_BT[row, t] != IGNORE_INDEX
        ]
        assert value == pytest.approx(sum(counts) / len(counts))
    whole = rows_seen(subject.model, batch, None)
    slots = [t + 1 for t in range(LENGTH) if batch.label_BT[0, t] != IGNORE_INDEX]
    assert float(whole[0]) == pytest.approx(sum(slots) / len(slots))


def test_rules_of_a_window_have_one_size(subject: Subject) -> None:
    batches = [second_half(batch) for batch in subject.held_out(WINDOWS, batch_size=3)]
    found = run_rules(subject.model, batches, [3, 9], seed=0)
    assert [result.name for result in found] == [FULL, *[WITH_META, WINDOW, RANDOM] * 2]
    for first in (1, 4):
        ours, window, random = found[first : first + 3]
        assert window.scored.rows == pytest.approx(ours.scored.rows, abs=0.8)  # a window is a whole number
        assert random.scored.rows == pytest.approx(ours.scored.rows, abs=2)  # drawn
        assert window.rule.sinks == random.rule.sinks == SINKS and random.rule.window == ours.rule.window
    assert matched_rules(KeepRule(4), 20.0, 8.0, 8.0)[RANDOM].share == 0  # nothing else could be kept


def test_bytes_are_those_of_the_rows_that_stay() -> None:
    subject = make_subject(document_mask=False)
    batch = next(subject.held_out(1))
    row = 2 * 32 * 4  # keys and values of one row in one layer
    assert peak_bytes(subject.model, batch, None, chunk=7) == 2 * row * (LENGTH + METAS)
    rule = KeepRule(3, 0)
    is_meta = (batch.token_BT[0] == subject.form.meta_token_id).tolist()
    held = [
        len({s for s in range(t + 1) if t + 1 - s < 3 or is_meta[s]}) + sum(is_meta[: t + 1]) for t in range(LENGTH)
    ]
    assert peak_bytes(subject.model, batch, rule, chunk=1) == 2 * row * max(held)


def test_accuracy_and_its_interval() -> None:
    exact = torch.tensor([1.0] * 7 + [0.0] * 13)
    found = accuracy(Scored(exact, exact, exact))
    assert (found.mean, found.low, found.high) == pytest.approx((0.35, *wilson(7, 20)))


def test_exact_matches_are_those_of_greedy_decoding() -> None:
    """Answers that the model itself gives under the rule are right under that rule; one token off is wrong."""
    subject = make_subject(document_mask=False)
    rule = KeepRule(4, 1)
    prompt = next(subject.held_out(4, batch_size=4)).token_BT[:, :30]
    cache, token = PruningCache(rule), prompt
    answer: list[Tensor] = []
    for _ in range(3):
        token = subject.model(token, cache=cache)[:, -1:].argmax(dim=-1)
        answer.append(token)
    ids = torch.cat((prompt, *answer), dim=1)
    label = torch.full_like(ids[:, :-1], IGNORE_INDEX)
    label[:, 29:] = ids[:, 30:]
    label[3, 31] = (label[3, 31] + 1) % VOCAB
    batch = Batch(ids[:, :-1], label, None, None, METAS, (0, 1, 2, 3), first_target=29)
    assert score(subject.model, [batch], rule).exact_N.tolist() == [1, 1, 1, 0]
    finding = task_finding(subject, {"parity": [batch]}, Options())
    assert [row["rule"] for row in finding.tables["accuracy"][:4]] == [FULL, WITH_META, WINDOW, RANDOM]
    assert finding.facts["examples"] == {"parity": 4}


def test_nothing_of_the_model_changes(subject: Subject) -> None:
    """Bit by bit, after both families."""
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    sites = read_sites(subject, WINDOWS, seed=0)
    finding = cache_sizes(subject, Options(num_samples=4))[0]
    assert "4 held-out sequences of 40 slots with 6 meta-tokens" in finding.caption
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name
    assert not subject.model.training and all(not p.requires_grad for p in subject.model.parameters())
    assert sites.states.keys() == {META_SITE, TEXT_SITE, EARLIER_SITE}


def test_sites_are_states_of_the_same_text() -> None:
    """Each example found again by its window: states of a plain forward pass, target behind the meta-token."""
    subject = make_subject(document_mask=False)
    twin = replace(subject, form=replace(subject.form, num_meta_tokens=0))
    sites = read_sites(replace(subject, twin=twin), WINDOWS, seed=0)
    states: dict[str, list[Tensor]] = {name: [] for name in sites.states}
    targets = []
    for draw in range(8):
        reading = replace(subject, form=replace(subject.form, seed=subject.form.seed + draw))
        for batch, plain in zip(
            reading.held_out(WINDOWS, batch_size=1), twin.held_out(WINDOWS, batch_size=1), strict=True
        ):
            x, y = (subject.model.head.norm(subject.hidden_states(one))[0] for one in (batch, plain))
            token = batch.token_BT[0].tolist()
            meta = subject.form.meta_token_id
            for t in range(1, LENGTH):
                following = token[t + 1] if t + 1 < LENGTH else int(batch.label_BT[0, t])
                if token[t] == meta and token[t - 1] != meta and following not in (meta, IGNORE_INDEX):
                    states[META_SITE].append(x[t])
                    states[TEXT_SITE].append(x[t - 1])
                    states["twin"].append(y[sum(one != meta for one in token[:t]) - 1])
                    targets.append(following)
    assert sites.target_N.tolist() == targets
    for name in (META_SITE, TEXT_SITE, "twin"):
        assert torch.allclose(sites.states[name], torch.stack(states[name]), atol=1e-5), name
