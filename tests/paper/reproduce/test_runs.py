"""The runs of an experiment: twins read the same text, equal compute is equal, scales are whole and checked."""

from pathlib import Path
from typing import Any

import pytest

from megameta.config import build_config
from megameta.errors import UserError
from megameta.paper.reproduce.arms import ARMS, COMPARISONS
from megameta.paper.reproduce.jobs import fingerprints
from megameta.paper.reproduce.runs import Experiment, step_count, training_flops
from megameta.paper.reproduce.scale import load_scale, scale_names
from megameta.paper.reproduce.targets import TARGETS


def experiment(tmp_path: Path, *overrides: str, scale: str = "cpu") -> Experiment:
    return Experiment(load_scale(scale, list(overrides)), tmp_path)


#: Has no pre-training and no table1 section.
LACKING = {("cpu-control", "table1"), ("cpu-control", "ppl"), ("gpu-8min", "table1")}
CASES = [(name, target) for name in scale_names() for target in TARGETS if (name, target) not in LACKING]


@pytest.mark.parametrize(("name", "target"), sorted(LACKING))
def test_what_a_scale_lacks_is_said(name: str, target: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no table1 section|needs a scale with pre-training"):
        TARGETS[target].jobs(experiment(tmp_path, scale=name))


@pytest.mark.parametrize(("name", "target"), CASES)
def test_jobs_of_every_scale_stand_after_those_they_need(name: str, target: str, tmp_path: Path) -> None:
    found = experiment(tmp_path, scale=name)
    jobs = TARGETS[target].jobs(found)
    seen: set[str] = set()
    for job in jobs:
        assert set(job.needs) <= seen, job.name
        assert job.name not in seen
        seen.add(job.name)
        if job.inputs and "train" in job.inputs:
            config = build_config(job.inputs)
            assert Path(config.run.dir) == job.outputs[0]
            assert config.run.seed in found.scale.seeds
    assert len({path for job in jobs for path in job.outputs}) == sum(len(job.outputs) for job in jobs)


@pytest.mark.parametrize("name", scale_names())
def test_targets_share_jobs_or_have_their_own(name: str, tmp_path: Path) -> None:
    """Else each target would undo what the other has done."""
    found = experiment(tmp_path, scale=name)
    by_target = [fingerprints(TARGETS[t].jobs(found)) for t in TARGETS if (name, t) not in LACKING]
    for prints in by_target:
        for others in by_target:
            assert all(others[job] == value for job, value in prints.items() if job in others)


@pytest.mark.parametrize(
    ("target", "job", "expected"),
    [
        ("figure1", "evaluate/meta-rope/copying/1/yarn-2", "13178b29421ef229e6eb0c962dd10739"),
        ("table1", "table1/evaluate/meta-rope/x8-at-8/1", "c98830a06e694e9ecee269fcd368646b"),
        ("table2", "evaluate/meta-rope/copying/1/embedding-zeroed", "f7fcb458124ebf170a5c01d241e685f7"),
        ("ppl", "ppl/meta-rope/1", "e403e39135cb8926fb8578c1b533db24"),
        ("inference", "inference", "d3b89aedeada6bd5c801d7b73db60713"),
    ],
)
def test_what_version_0_1_made_is_not_made_again(target: str, job: str, expected: str) -> None:
    """Fingerprints of 0.1.0 for the scale cpu, which hold those of all jobs before: others would delete its outputs."""
    found = Experiment(load_scale("cpu", []), Path("reproduce/cpu"))
    assert fingerprints(TARGETS[target].jobs(found))[job] == expected


def test_twins_read_the_same_text(tmp_path: Path) -> None:
    found = experiment(tmp_path)
    configs = {name: build_config(found.pretraining(arm, 1)) for name, arm in ARMS.items()}
    texts = {name: config.data.text_per_sample for name, config in configs.items()}
    assert len(set(texts.values())) == 1, texts
    assert configs["meta-rope"].data.num_meta_tokens == configs["pause-rope"].data.num_meta_tokens > 0
    assert configs["gpt2-rope"].data.num_meta_tokens == 0
    same = ("train", "optimizer", "eval")
    for name, config in configs.items():
        if ARMS[name].equal_compute is None:
            for section in same:
                assert getattr(config, section) == getattr(configs["meta-rope"], section), (name, section)


def test_arms_differ_in_what_they_say(tmp_path: Path) -> None:
    found = experiment(tmp_path)
    meta, pause, plain = (
        build_config(found.finetuning(ARMS[n], "copying", 3)) for n in ("meta-rope", "pause-rope", "gpt2-rope")
    )
    assert (meta.model.meta_attention, pause.model.meta_attention, plain.model.meta_attention) == (True, False, False)
    assert (meta.finetune.markers, pause.finetune.markers, plain.finetune.markers) == (True, True, False)
    ape = build_config(found.finetuning(ARMS["gpt2-ape"], "copying", 3)).model
    assert ape.position == "ape" and ape.max_position_embeddings == 128
    assert build_config(found.pretraining(ARMS["gpt2-ape"], 3)).model.max_position_embeddings == 128


@pytest.mark.parametrize("kind", ["pretraining", "finetuning"])
def test_equal_compute_has_the_flops_of_the_other(kind: str, tmp_path: Path) -> None:
    found = experiment(tmp_path)

    def raw(name: str) -> dict[str, Any]:
        arm = ARMS[name]
        return found.pretraining(arm, 1) if kind == "pretraining" else found.finetuning(arm, "copying", 1)

    more, meta, same = raw("gpt2-rope-compute"), raw("meta-rope"), raw("gpt2-rope")
    flops = training_flops(more, step_count(more)) / training_flops(meta, step_count(meta))
    assert flops == pytest.approx(1, abs=3 / step_count(same))
    assert step_count(more) > step_count(same)
    if kind == "finetuning":
        assert step_count(more) % len(found.scale.phases) == 0


def test_comparisons_are_of_arms_and_the_control_is_among_them() -> None:
    assert all(first in ARMS and second in ARMS for first, second, _ in COMPARISONS)
    assert any(ARMS[a].branch and not ARMS[b].branch and ARMS[b].meta_tokens for a, b, _ in COMPARISONS)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arms=[gpt3]", "no gpt3"),
        ("phases=[32, 33]", "phases are some of tasks.bins"),
        ("seeds=[1, 1]", "seeds"),
        ("tasks.names=[juggling]", "no juggling"),
        ("taks.names=[]", "taks"),
        ("table1.arms=[meta-ape]", "no rotary positions"),
    ],
)
def test_a_bad_scale_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_scale("cpu", [override])


def test_an_unknown_scale_names_those_there_are() -> None:
    with pytest.raises(UserError, match="there are cpu"):
        load_scale("huge", [])
