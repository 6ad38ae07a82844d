"""Recording what meta-tokens do while training: the numbers of an analysis, and a training that does not notice."""

import json

import pytest
import torch

from megameta.config import build_config
from megameta.config.validate import problems
from megameta.engine.pipeline_engine import make_engine
from megameta.paper.analysis.attention_numbers import attention_numbers
from megameta.paper.analysis.boost import changes
from megameta.paper.analysis.training import AttentionProbe
from megameta.train.schedule import learning_rate
from tests.support.analyses import subject_of
from tests.support.ranks import run_ranks
from tests.support.training import step_loader, tiny_config, tiny_values, weights_digest

STEPS = 6


def _run(topology, corpus, stage, precision, every):
    """Losses, norms and weights of a run with a measurement every so many steps, and what was measured."""
    config = tiny_config(
        corpus, parallel__zero_stage=stage, data__valid=corpus, analysis__interval=1, train__precision=precision
    )
    engine = make_engine(config, topology)
    loader = step_loader(config, topology)
    probe = AttentionProbe(config, topology)
    results, measured = [], []
    for step in range(1, STEPS + 1):
        torch.manual_seed(step)
        result = engine.train_step(loader.read(step - 1, step), learning_rate(step, STEPS, config.optimizer))
        results.append((result.loss, result.grad_norm, float(torch.rand(()))))
        if every and step % every == 0:
            measured.append(probe.measure(engine))
    digest = weights_digest(engine)
    loader.close()
    engine.destroy()
    return results, digest, measured


def _both(topology, corpus, cases):
    return {case: (_run(topology, corpus, *case, 0), _run(topology, corpus, *case, 2)) for case in cases}


@pytest.mark.parametrize(
    "cases",
    [
        [(1, "fp32")],
        # 3 last: it patches torch for the rest of the process
        pytest.param([(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")], marks=pytest.mark.slow),
    ],
)
def test_training_does_not_notice(corpus, cases):
    """Bitwise, under every ZeRO stage and in bf16."""
    by_rank = run_ranks(_both, 2, corpus, cases)
    for case in cases:
        for found in by_rank:
            (results, weights, none), (watched, weights_watched, measured) = found[case]
            assert none == [] and len(measured) == STEPS // 2
            assert results == watched and weights == weights_watched, case
            assert len({entry["meta_mass"] for entry in measured}) == len(measured)  # it follows the weights
            assert measured == by_rank[0][case][1][2]  # every rank has the same numbers
    exact = [by_rank[0][case][1][2][-1] for case in cases if case[1] == "fp32"]
    assert all(found == pytest.approx(exact[0], abs=1e-5) for found in exact)  # whatever the stage


def test_a_run_records_what_an_analysis_of_its_checkpoint_finds(trained):
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    recorded = [line for line in lines if "analysis" in line]
    assert [line["step"] for line in recorded] == [20, 40]
    assert all(line["seconds"] > 0 and line["share_of_steps"] > 0 for line in recorded)
    subject = subject_of(trained)
    count = subject.config.analysis.num_samples
    inside, alone = (attention_numbers(subject, count, meta_tokens=meta) for meta in (True, False))
    boost = changes(subject, count)
    expected = {
        "entropy_drop": alone["entropy"].nanmean() - inside["entropy"].nanmean(),
        "entropy_drop_normalised": alone["normalised"].nanmean() - inside["normalised"].nanmean(),
        "logit_boost": boost["meta_logit"].nanmean() - boost["text_logit"].nanmean(),
        "largest_logit_rise": boost["largest"].nanmean(),
        "boost_entropy_drop": -boost["boosted_entropy"].nanmean(),
        "meta_mass": inside["mass"].nanmean(),
        "meta_share": inside["share"].nanmean(),
    }
    assert recorded[-1]["analysis"] == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-5)


def test_a_run_writes_series_for_tensorboard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("analysis/meta_mass")] == [20, 40]
    assert {"analysis/entropy_drop", "analysis/logit_boost"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__tensor_parallel_size": 2}, "no tensor or pipeline parallelism"),
        ({"parallel__pipeline_parallel_size": 2}, "no tensor or pipeline parallelism"),
        ({"data__meta_token_fraction": 0.0}, "leaves none"),
        ({"data__valid": {}}, "needs a held-out set"),
        ({"data__valid": {}, "data__split": (9, 0, 1)}, "needs a held-out set"),
        ({"finetune__directory": "tasks"}, "fine-tuning has none"),
    ],
)
def test_refused_where_it_would_mean_nothing(changes, message):
    values = {"data__valid": "x", "analysis__interval": 10} | changes
    found = problems(build_config(tiny_values("x", **values)), world_size=2, device="cpu")
    assert sum("analysis.interval" in problem and message in problem for problem in found) == 1
    values["analysis__interval"] = 0
    found = problems(build_config(tiny_values("x", **values)), world_size=2, device="cpu")
    assert not any("analysis.interval" in problem for problem in found)


def test_a_split_is_held_out_text():
    config = build_config(tiny_values("x", analysis__interval=10, data__split=(8, 1, 1)))
    assert not any("analysis.interval" in problem for problem in problems(config, world_size=1, device="cpu"))
