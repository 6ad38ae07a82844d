"""Stages: where the model is cut, and that stages one after another are the model (no DeepSpeed, no processes)."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from megameta.model import GPT, ModelConfig, initialize_weights
from megameta.parallel.losses import loss_function, score_function
from megameta.parallel.pipeline import (
    Stage,
    StageLoss,
    pack_rows,
    part_costs,
    stage_bounds,
    unpack_rows,
)
from tests.support.models import covering

OPTIONS = {
    "position": ["rope", "ape", "rnope"],
    "tie_embeddings": [True, False],
    "meta_attention": [True, False],
    "parallel_residual": [False, True],
    "zero_meta_positions": [False, True],
}


def make_config(**changes):
    shape = {"vocab_size": 300, "hidden_size": 32, "num_heads": 4, "num_layers": 5, "max_position_embeddings": 16}
    return ModelConfig(**{**shape, **changes})


def make_rows(config, documents=True):
    draw = torch.Generator().manual_seed(1)
    token = torch.randint(0, 299, (3, 16), generator=draw)
    token[:, [2, 5, 6]] = config.meta_token_id
    if not documents:
        return token, None, None
    document = (torch.arange(16) >= 7).long().expand(3, -1).contiguous()
    return token, document, (torch.arange(16) - 7 * document).contiguous()


@pytest.mark.parametrize("options", covering(OPTIONS), ids=str)
@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_stages_one_after_another_are_the_model(options, num_stages):
    config = make_config(**options)
    model = GPT(config).double()
    initialize_weights(model, config, seed=3)
    whole = dict(model.named_parameters())
    stages = [Stage(config, bounds).double() for bounds in stage_bounds(config, num_stages)]
    for stage in stages:
        names = [name for name, _ in stage.named_parameters()]
        assert set(names) <= set(whole), "canonical names"
        stage.load_state_dict({name: whole[name].detach() for name in names})
    held = [name for stage in stages for name, _ in stage.named_parameters()]
    twice = {name for name in held if held.count(name) > 1}
    assert set(held) == set(whole)
    assert twice == ({"embedding.tokens.weight"} if config.tie_embeddings else set())
    for rows in (make_rows(config), make_rows(config, documents=False)):
        x = pack_rows(*rows)
        for stage in stages:
            x = stage(x)
        wanted = model(rows[0], document_BT=rows[1], position_BT=rows[2])
        torch.testing.assert_close(x, wanted)


def test_rows_travel_unchanged():
    for rows in (make_rows(make_config()), make_rows(make_config(), documents=False)):
        assert unpack_rows(pack_rows(*rows)) == rows
    token, document, _ = make_rows(make_config())
    assert unpack_rows(pack_rows(token, document, None)) == (token, document, None)
    positions = pack_rows(token, None, token)
    assert positions[2] is token and not positions[1].any(), "positions are not lost where there are no documents"


@pytest.mark.parametrize("balance", ["parameters", "time"])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"vocab_size": 50000},
        {"tie_embeddings": False, "vocab_size": 9000},
        {"meta_layers": (0, 1, 2)},
        {"meta_layers": (3, 6), "vocab_size": 9000},
        {"meta_layers": (1, 4, 5)},
    ],
    ids=str,
)
def test_no_other_cut_is_cheaper(balance, num_stages, shape):
    config = make_config(num_layers=7, hidden_size=64, **shape)
    embedding, *blocks, head = part_costs(config, balance, 16, 2)

    def costliest(bounds):
        costs = [sum(blocks[a:b]) for a, b in bounds]
        costs[0] += embedding
        costs[-1] += head
        return max(costs)

    bounds = stage_bounds(config, num_stages, balance=balance, length=16, num_meta=2)
    assert bounds[0][0] == 0 and bounds[-1][1] == 7
    assert all(a < b for a, b in bounds) and all(x[1] == y[0] for x, y in itertools.pairwise(bounds))
    cuts = itertools.combinations(range(1, 7), num_stages - 1)
    best = min(costliest(list(itertools.pairwise((0, *cut, 7)))) for cut in cuts)
    assert costliest(bounds) == pytest.approx(best)


def test_blocks_with_the_branch_weigh_more():
    """Seven blocks and no tables to speak of: four without the branch against three with it."""
    config = make_config(num_layers=7, hidden_size=64, vocab_size=10, intermediate_size=32, meta_layers=(4, 5, 6))
    assert [end for _, end in stage_bounds(config, 2)] == [4, 7]
    assert [end for _, end in stage_bounds(make_config(num_layers=7, hidden_size=64, vocab_size=10), 2)] == [4, 7]
    mirrored = make_config(num_layers=7, hidden_size=64, vocab_size=10, intermediate_size=32, meta_layers=(0, 1, 2))
    assert [end for _, end in stage_bounds(mirrored, 2)] == [3, 7]


def test_equal_blocks_go_to_the_stage_that_stays_cheapest():
    """Another way to the same cut, where blocks cost the same: each goes to the stage that is cheapest with it."""
    for layers, vocabulary, stages in itertools.product((5, 8, 12), (300, 9000, 50000), (2, 3, 5)):
        config = make_config(num_layers=layers, hidden_size=64, vocab_size=vocabulary)
        embedding, block, *_, head = part_costs(config, "parameters", 16, 2)
        extra = [embedding, *[0] * (stages - 2), head]
        counts = [1] * stages
        for _ in range(layers - stages):
            counts[min(range(stages), key=lambda s: (extra[s] + (counts[s] + 1) * block, s))] += 1
        assert [end - first for first, end in stage_bounds(config, stages)] == counts


@pytest.mark.parametrize("balance", ["parameters", "time"])
def test_costs_of_blocks_by_kind(balance):
    config = make_config(meta_layers=(1, 3))
    _, *blocks, _ = part_costs(config, balance, 16, 2)
    _, *whole, _ = part_costs(make_config(), balance, 16, 2)
    _, *none, _ = part_costs(make_config(meta_attention=False), balance, 16, 2)
    assert blocks == [none[0], whole[0], none[0], whole[0], none[0]] and none[0] < whole[0]


def test_costs_are_those_of_the_parts():
    config = make_config()
    with torch.device("meta"):
        total = sum(p.numel() for p in GPT(config).parameters())
    costs = part_costs(config, "parameters", 16, 2)
    table = config.padded_vocab_size() * config.hidden_size
    assert sum(costs) == total + table, "the last stage has a copy of the tied table"


def test_scores_are_counted_by_hand():
    """Three rows: all targets right, one of two wrong, no targets."""
    logits = torch.zeros(3, 3, 300)
    labels = torch.tensor([[7, -100, 9], [7, 8, -100], [-100, -100, -100]])
    logits[0, 0, 7] = logits[0, 1, 5] = logits[0, 2, 9] = 4.0
    logits[1, 0, 7] = logits[1, 1, 9] = 4.0
    score = score_function(make_config(), None)
    total = score(logits, labels)
    wanted = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    assert total.tolist() == [pytest.approx(float(wanted)), 3.0, 1.0] and total.dtype == torch.float64
    loss = StageLoss(loss_function(make_config(), None), score)
    loss.scoring = True
    loss(logits, labels)
    assert torch.equal(loss.sums[0], total)


def test_the_loss_is_scaled_for_the_gradient_and_kept_as_it_is():
    loss = StageLoss(loss_function(make_config(), None), score_function(make_config(), None))
    logits, labels = torch.randn(2, 4, 300), torch.tensor([[1, 2, -100, 4], [5, -100, 7, 8]])
    loss.scale = 0.25
    wanted = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss(logits, labels), wanted / 4)
    assert loss.sums[0].dtype == torch.float64 and float(loss.sums[0]) == pytest.approx(float(wanted))
