"""Layouts as a person uses them: started, gone on with under another layout, exported, and every mistake told once."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.support.commands import one_error, run_command
from tests.support.training import tiny_values, write_corpus

pytestmark = pytest.mark.slow

TWO = ("--nproc-per-node", "2")
TENSOR = ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true", "parallel.zero_stage=2")
PIPELINE = ("parallel.pipeline_parallel_size=2",)


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    done = run_command(folder, "megameta", *arguments)
    return done.returncode, done.stdout + done.stderr


def losses(directory: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def held_out(directory: Path) -> float:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["eval"]["valid"]["loss"] for line in lines if "eval" in line][-1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run in one process to step 8, and one that began tensor-parallel and went on as a pipeline."""
    folder = tmp_path_factory.mktemp("layouts")
    write_corpus(folder / "text")
    values = tiny_values(
        "text",
        data__valid="text",
        train__num_steps=8,
        train__peak_tflops=1.0,
        train__check_replicas_every=3,
        eval__interval=100,
        eval__num_samples=6,
        optimizer__schedule="constant",
        checkpoint__interval=4,
        checkpoint__keep=9,
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    for arguments in (
        ("run.dir=alone",),
        ("run.dir=moved", "train.num_steps=4", *TENSOR, *TWO),
        ("run.dir=moved", *PIPELINE, *TWO),
    ):
        code, said = run(folder, "train", "run.yaml", *arguments)
        assert code == 0, said
        assert "Warning" not in said and "SEED_LAYERS" not in said, said
    return folder


def test_a_run_goes_on_under_another_layout(place):
    alone, moved = losses(place / "alone"), losses(place / "moved")
    assert list(moved) == list(alone) == list(range(1, 9))
    assert list(moved.values()) == pytest.approx(list(alone.values()), rel=1e-5)
    assert held_out(place / "moved") == pytest.approx(held_out(place / "alone"), rel=1e-5)


def test_any_layouts_checkpoint_is_evaluated_and_exported(place):
    code, said = run(place, "evaluate", "moved", "--json", "moved.json")
    assert code == 0, said
    result = json.loads((place / "moved.json").read_text())["eval"]["valid"]["loss"]
    assert result == pytest.approx(held_out(place / "moved"), rel=1e-5)
    from megameta.hf.convert import checkpoint_to_hf

    assert (checkpoint_to_hf(place / "moved", place / "export") / "model.safetensors").exists()


def files(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and "logs" not in path.parts and path.name != ".lock"
    }


def damage_shard(checkpoint: Path) -> None:
    path = next(iter(sorted(checkpoint.glob("optimizer-*"))))
    path.write_bytes(path.read_bytes()[:-100])


def remove_shard(checkpoint: Path) -> None:
    next(iter(sorted(checkpoint.glob("model-*"), reverse=True))).unlink()


def other_version(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 7'))


def deepspeed_form(checkpoint: Path) -> None:
    other = checkpoint.with_name("global_step8")
    other.mkdir()
    (other / "mp_rank_00_model_states.pt").write_bytes(b"")
    (checkpoint.parent / "latest").write_text("global_step8")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (damage_shard, ["optimizer-0000", "bytes instead of", "older checkpoint"]),
        (remove_shard, ["model-0000", "missing", "older checkpoint"]),
        (other_version, ["manifest.json", "version 7"]),
        (deepspeed_form, ["checkpoints/latest", "global_step8", "no checkpoint"]),
    ],
)
def test_what_cannot_be_taken_up_is_told_once_and_left_as_it_is(place, spoil, words):
    name = spoil.__name__
    shutil.copytree(place / "moved", place / name)
    spoil(place / name / "checkpoints" / "step_00000008")
    before = files(place / name)
    code, said = run(place, "train", "run.yaml", f"run.dir={name}", "train.num_steps=9", *TENSOR, *TWO)
    assert code == 1
    message = one_error(said)
    for word in words:
        assert word in message
    assert files(place / name) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*TENSOR, "--nproc-per-node", "3"), ["3 process(es)", "tensor_parallel_size 2", "a multiple of 2"]),
        (("parallel.tensor_parallel_size=8", "--nproc-per-node", "8"), ["num_heads 4", "use 1 or 2 or 4"]),
        ((*PIPELINE, "parallel.zero_stage=3", *TWO), ["zero_stage 3", "zero_stage=1"]),
    ],
)
def test_layouts_that_do_not_fit(place, arguments, words):
    code, said = run(place, "train", "run.yaml", "run.dir=never", *arguments)
    assert code == 1
    message = one_error(said)
    for word in words:
        assert word in message
    assert not (place / "never").exists()
