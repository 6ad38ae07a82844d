"""Every number of an analysis against its definition, in float64 loops over the dense oracle; and what must hold."""

import dataclasses
import math

import pytest
import torch

from megameta.paper.analysis.attention_numbers import attention_numbers
from megameta.paper.analysis.boost import changes
from megameta.paper.analysis.branch import branch_layers, losses, part_numbers
from megameta.paper.analysis.distances import bin_labels, bin_of_pairs, num_bins
from megameta.paper.analysis.estimates import estimate
from megameta.paper.analysis.lens import lens_numbers
from megameta.paper.analysis.mass import mass_by_distance, ratio_by_distance
from megameta.paper.analysis.residual import KINDS, cosines, norms
from tests.support.analyses import HEADS, LAYERS, SAMPLES, close, dense, nan_mean

T = 32
BINS = [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]


def entropy_of(row) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


def table(sequences, number) -> list:
    """[layer][sequence][head] of a function of (sequence, layer, head)."""
    return [[[number(s, layer, head) for head in range(HEADS)] for s in sequences] for layer in range(LAYERS)]


def test_distances():
    assert [bin_labels(T)[i] for i in range(5)] == ["1", "2–3", "4–7", "8–15", "16–31"] and num_bins(T) == 5
    assert bin_labels(20)[-1] == "16–19" and bin_labels(33)[-1] == "32" and num_bins(2) == 1
    found = bin_of_pairs(T, torch.device("cpu"))
    for t in range(T):
        for s in range(T):
            expected = next((i for i, (low, high) in enumerate(BINS) if low <= t - s <= high), -1)
            assert found[t, s] == expected


@pytest.mark.parametrize("meta_tokens", [True, False])
def test_entropy(subject, meta_tokens):
    found = attention_numbers(subject, SAMPLES, meta_tokens=meta_tokens)
    sequences = dense(subject, meta_tokens=meta_tokens)

    def of(number):
        return table(sequences, lambda s, c, h: nan_mean([number(s, s.weights[c][h][t], t) for t in s.queries()]))

    def text_alone(s, row, t):
        whole = sum(row[key] for key in s.text_keys(t))
        return entropy_of([row[key] / whole for key in s.text_keys(t)])

    close(found["entropy"], of(lambda s, row, t: entropy_of(row)))
    close(found["normalised"], of(lambda s, row, t: entropy_of(row) / math.log(len(s.keys(t)))))
    close(found["uniform"], of(lambda s, row, t: math.log(len(s.keys(t)))))
    close(found["text_entropy"], of(text_alone))
    for value in (found["entropy"], found["text_entropy"]):
        assert bool(((value >= 0) & (value <= math.log(T)) | value.isnan()).all())
    assert bool((found["normalised"].nan_to_num() <= 1 + 1e-6).all())


def test_the_queries_are_the_same_text_with_and_without_meta_tokens(subject):
    for inside, alone in zip(dense(subject), dense(subject, meta_tokens=False), strict=True):
        text = [t for t in range(T) if not inside.is_meta[t]]
        assert [text.index(t) for t in inside.queries()] == list(alone.queries())
        assert not any(alone.is_meta)


def test_logits_and_mass(subject):
    found, sequences = attention_numbers(subject, SAMPLES), dense(subject)

    def of(number):
        return table(sequences, lambda s, c, h: nan_mean([number(s, c, h, t) for t in s.seers()]))

    def mean_score(keys):
        return lambda s, c, h, t: nan_mean([float(s.scores[c][h][t][key]) for key in keys(s, t)])

    close(found["mass"], of(lambda s, c, h, t: sum(float(s.weights[c][h][t][key]) for key in s.meta_keys(t))))
    close(found["share"], of(lambda s, c, h, t: len(s.meta_keys(t)) / len(s.keys(t))))
    close(found["largest"], of(lambda s, c, h, t: max(s.scores[c][h][t])))
    close(found["meta_logit"], of(mean_score(lambda s, t: s.meta_keys(t))), 5e-5)
    close(found["text_logit"], of(mean_score(lambda s, t: s.text_keys(t))), 5e-5)
    close(found["boosted_entropy"], of(lambda s, c, h, t: entropy_of(s.weights[c][h][t])))


def test_the_boost_is_the_embedding_as_it_is_minus_zeroed(subject):
    found = changes(subject, SAMPLES)
    normal, zeroed = dense(subject), dense(subject, zero_meta_embedding=True)
    pairs = list(zip(normal, zeroed, strict=True))

    def boost_of(pair, c, h):
        a, b = pair
        rises = [
            nan_mean([float(a.scores[c][h][t][key] - b.scores[c][h][t][key]) for key in a.meta_keys(t)])
            for t in a.seers()
        ]
        return nan_mean(rises)

    def drop_of(pair, c, h):
        a, b = pair
        return nan_mean([entropy_of(a.weights[c][h][t]) - entropy_of(b.weights[c][h][t]) for t in a.seers()])

    close(found["meta_logit"], table(pairs, boost_of), 1e-4)
    close(found["boosted_entropy"], table(pairs, drop_of), 1e-4)
    assert float(found["meta_logit"].nan_to_num().abs().max()) > 0.01  # there is something to see


def test_mass_by_distance(subject):
    found, sequences = mass_by_distance(subject, SAMPLES), dense(subject)

    def of(number):
        """[sequence][bin]: sums over pairs in the bin, a query."""
        rows = []
        for s in sequences:
            queries = list(s.seers())
            rows.append(
                [
                    sum(number(s, t, key) for t in queries for key in s.keys(t) if low <= t - key <= high)
                    / len(queries)
                    if queries
                    else math.nan
                    for low, high in BINS
                ]
            )
        return rows

    def mean_weight(s, c, t, key):
        return sum(float(s.weights[c][h][t][key]) for h in range(HEADS)) / HEADS

    close(
        found.meta_CNX,
        [of(lambda s, t, key, c=c: mean_weight(s, c, t, key) if s.is_meta[key] else 0.0) for c in range(LAYERS)],
    )
    close(
        found.text_CNX,
        [of(lambda s, t, key, c=c: 0.0 if s.is_meta[key] else mean_weight(s, c, t, key)) for c in range(LAYERS)],
    )
    close(found.share_NX, of(lambda s, t, key: s.is_meta[key] / len(s.keys(t))))
    close(found.meta_keys_NX, of(lambda s, t, key: s.is_meta[key]))
    close(found.text_keys_NX, of(lambda s, t, key: not s.is_meta[key]))
    whole = attention_numbers(subject, SAMPLES)
    difference = found.meta_CNX.sum(dim=-1) - whole["mass"].mean(dim=-1)
    assert float(difference.nan_to_num().abs().max()) < 1e-6
    assert float((found.share_NX.sum(dim=-1) - whole["share"][0, :, 0]).nan_to_num().abs().max()) < 1e-6
    ratio_CX = ratio_by_distance(found)
    meta, text = found.meta_CNX[1].nanmean(dim=0), found.text_CNX[1].nanmean(dim=0)
    keys = found.meta_keys_NX.nanmean(dim=0), found.text_keys_NX.nanmean(dim=0)
    assert float(ratio_CX[1, 2]) == pytest.approx(float(meta[2] / keys[0][2] / (text[2] / keys[1][2])))


def test_cosines(subject):
    found, sequences = cosines(subject, SAMPLES), dense(subject)
    table_VD = subject.model.embedding.tokens.weight.double()
    tokens = [row for batch in subject.held_out(SAMPLES) for row in batch.token_BT.tolist()]

    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    for query, key in KINDS:
        expected = [[0.0] * len(BINS) for _ in range(LAYERS + 1)]
        counts = [0] * len(BINS)
        for s, token in zip(sequences, tokens, strict=True):
            for t in (t for t in range(T) if s.is_meta[t] == (query == "meta")):
                for earlier in (other for other in s.text_keys(t) if other < t):
                    place = next(i for i, (low, high) in enumerate(BINS) if low <= t - earlier <= high)
                    counts[place] += 1
                    for level, x_TD in enumerate(s.levels):
                        other = table_VD[token[earlier]] if key == "embeddings" else x_TD[earlier]
                        expected[level][place] += cosine(x_TD[t], other)
        assert found.pairs[query].tolist() == counts
        close(found.total[query, key], expected)
        mean = found.mean(query, key)
        assert bool(((mean.abs() <= 1 + 1e-6) | mean.isnan()).all())


def test_norms(subject):
    found, sequences = norms(subject, SAMPLES), dense(subject)
    for kind, wanted in (("meta", True), ("text", False)):
        expected = [
            [nan_mean([float(s.levels[e][t].norm()) for t in range(T) if s.is_meta[t] == wanted]) for s in sequences]
            for e in range(LAYERS + 1)
        ]
        close(found[kind], expected)


def cross_entropy(logit_V, label) -> float:
    return float(torch.logsumexp(logit_V, dim=0) - logit_V[label])


def test_lens(subject):
    found, sequences = lens_numbers(subject, SAMPLES), dense(subject)
    for kind, wanted in (("meta", True), ("text", False)):
        loss, agrees = [], []
        for e in range(LAYERS + 1):
            loss.append([])
            agrees.append([])
            for s in sequences:
                rows = [t for t in range(T) if s.is_meta[t] == wanted and s.label[t] != -100]
                loss[e].append(nan_mean([cross_entropy(s.logits[e][t], s.label[t]) for t in rows]))
                agrees[e].append(nan_mean([float(s.logits[e][t].argmax() == s.logits[-1][t].argmax()) for t in rows]))
        close(found.loss_EN[kind], loss)
        close(found.agrees_EN[kind], agrees, 1e-12)
        assert sum(found.top_E[kind][0].values()) == sum(
            s.is_meta[t] == wanted and s.label[t] != -100 for s in sequences for t in range(T)
        )


def test_what_the_branch_adds(subject):
    found, sequences = part_numbers(subject, SAMPLES), dense(subject)

    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    layers = branch_layers(subject)
    assert layers == [0, 2]

    def of(number):
        return [[nan_mean([number(s, c, t) for t in range(T) if s.is_meta[t]]) for s in sequences] for c in layers]

    for part in ("meta", "causal", "mlp"):
        close(
            found[f"norm {part}"],
            of(lambda s, c, t, part=part: float(s.parts[c][part][t].norm() / s.sources[c][t].norm())),
        )
        close(found[f"cosine {part}"], of(lambda s, c, t, part=part: cosine(s.parts[c][part][t], s.sources[c][t])))
    close(found["cosine meta causal"], of(lambda s, c, t: cosine(s.parts[c]["meta"][t], s.parts[c]["causal"][t])))


@pytest.mark.parametrize("off", [(), (2,), (0, 2)])
def test_losses_without_the_branch(subject, off):
    found, sequences = losses(subject, SAMPLES, off), dense(subject, off=off)
    for name, kinds in (("meta", [True]), ("text", [False]), ("all", [True, False])):
        expected = []
        for s in sequences:
            rows = [t for t in range(T) if s.is_meta[t] in kinds and s.label[t] != -100]
            expected.append(nan_mean([cross_entropy(s.logits[-1][t], s.label[t]) for t in rows]))
        close(found[name], expected)


def test_estimates():
    values = [1.0, 2.0, 4.0, math.nan]
    found = estimate(torch.tensor(values))
    mean = 7 / 3
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values[:3]) / 2)
    assert found.mean == pytest.approx(mean)
    assert found.high - found.mean == pytest.approx(1.96 * deviation / math.sqrt(3)) == found.mean - found.low
    assert math.isnan(estimate(torch.tensor([math.nan])).mean)


def test_held_out_text_is_the_same_at_every_call_and_without_meta_tokens(subject):
    def text(batches, meta):
        return [[token for token in row if token != meta] for b in batches for row in b.token_BT.tolist()]

    meta = subject.form.meta_token_id
    inside = list(subject.held_out(SAMPLES, batch_size=4))
    again = list(subject.held_out(SAMPLES, batch_size=4))
    assert all(torch.equal(a.token_BT, b.token_BT) for a, b in zip(inside, again, strict=True))
    assert [len(b.token_BT) for b in inside] == [4, 2]
    assert all(row.count(meta) == 4 for b in inside for row in b.token_BT.tolist())
    assert text(inside, meta) == text(subject.held_out(SAMPLES, meta_tokens=False), meta)
    assert text(subject.held_out(SAMPLES, first=4), meta) == text(inside, meta)[4:]
    kept = [row[row != -100].tolist() for b in inside for row in b.label_BT]
    alone = [row[row != -100].tolist() for b in subject.held_out(SAMPLES, meta_tokens=False) for row in b.label_BT]
    assert kept == alone  # the same targets


def test_a_twin_reads_the_same_text(subject):
    config = subject.config.model_copy(
        update={"data": subject.config.data.model_copy(update={"meta_token_fraction": 0.0, "sequence_length": 999})}
    )
    weights = {name: p[: subject.config.model.vocab_size] if name == "embedding.tokens.weight" else p
               for name, p in subject.model.named_parameters()}  # fmt: skip
    twin = subject.with_twin("twin", config, weights).twin
    assert twin is not None and not twin.has_meta_tokens
    for a, b in zip(twin.held_out(SAMPLES), subject.held_out(SAMPLES, meta_tokens=False), strict=True):
        assert torch.equal(a.token_BT, b.token_BT) and torch.equal(a.label_BT, b.label_BT)
    assert dataclasses.replace(subject, twin=twin).twin is twin
