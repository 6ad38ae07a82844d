"""Every variant of the paper by configuration alone: each trains as a plain float64 loop does."""

import pytest

from megameta.engine.pipeline_engine import make_engine
from tests.support.ranks import run_ranks
from tests.support.training import oracle_run, step_loader, take_steps, tiny_config

STEPS = 4
VARIANTS: dict[str, dict] = {
    "Meta + APE": {"model__position": "ape"},
    "Meta + RoPE": {},
    "Meta + NoPE": {"model__position": "none"},
    "Meta + RNoPE": {"model__position": "rnope"},
    "GPT-2 APE": {"model__position": "ape", "model__meta_attention": False, "data__meta_token_fraction": 0.0},
    "GPT-2 RoPE": {"model__meta_attention": False, "data__meta_token_fraction": 0.0},
    "GPT-2 NoPE": {"model__position": "none", "model__meta_attention": False, "data__meta_token_fraction": 0.0},
    "GPT-2 RNoPE": {"model__position": "rnope", "model__meta_attention": False, "data__meta_token_fraction": 0.0},
    "pause tokens": {"model__meta_attention": False},
    "the branch in one layer": {"model__meta_layers": [1]},
    "k = 0.25": {"data__meta_token_fraction": 0.25},
    "k = 0 with the branch": {"data__meta_token_fraction": 0.0},
    "periodic": {"data__meta_token_placement": "periodic"},
    "positions zeroed, rotary": {"model__zero_meta_positions": True},
    "positions zeroed, learned": {"model__zero_meta_positions": True, "model__position": "ape"},
    "embedding zeroed": {"model__zero_meta_embedding": True},
    "YaRN": {
        "model__position_scaling": "yarn",
        "model__position_scaling_factor": 4.0,
        "model__original_max_position_embeddings": 8,
    },
}


def _train_all(topology, corpus):
    found = {}
    for name, changes in VARIANTS.items():
        config = tiny_config(corpus, **changes)
        engine = make_engine(config, topology)
        loader = step_loader(config, topology)
        found[name] = [result.loss for result in take_steps(engine, loader, config, 1, STEPS)]
        loader.close()
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def trained(corpus):
    return run_ranks(_train_all, 1, corpus)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_as_the_loop_does(name, corpus, trained):
    expected = oracle_run(tiny_config(corpus, **VARIANTS[name]), STEPS)["losses"]
    assert trained[name] == pytest.approx(expected, rel=2e-5)


def test_variants_differ(trained):
    """None of the switches is without effect."""
    last = [losses[-1] for losses in trained.values()]
    assert len({round(loss, 5) for loss in last}) == len(last)
