"""``megameta extend``: what it writes, what it refuses, and the line from a short run to an extended one."""

import json
from pathlib import Path

import pytest
import yaml

from megameta.__main__ import main
from megameta.checkpoint.save import write_checkpoint
from megameta.checkpoint.store import TrainerState, point_latest
from megameta.config import RunConfig, build_config
from megameta.engine.build import DrawnWeights
from megameta.errors import UserError
from megameta.train.extension import extend, extended_config, to_text
from megameta.train.run_config import load_run_config
from tests.support.commands import run_command
from tests.support.paths import ROOT
from tests.support.training import tiny_values, write_corpus

YARN4 = {"position_scaling": "yarn", "position_scaling_factor": 4.0, "original_max_position_embeddings": 32}


def values_of(**changes) -> dict:
    """A run of 4000 steps at 32 slots."""
    settings = {
        "run__dir": "runs/base",
        "train__num_steps": 4000,
        "train__micro_batch_size": 4,
        "train__global_batch_size": 24,
        "optimizer__warmup_steps": 200,
    }
    return tiny_values("text", **{**settings, **changes})


def make_run(config: RunConfig, *, trained: bool = True) -> Path:
    """A checkpoint of the run's initial weights, which says that all steps are done."""
    path = Path(config.run.dir) / "checkpoints" / "step_00000200"
    path.parent.mkdir(parents=True)
    state = TrainerState(200, 200, 0, 0, 200) if trained else None
    write_checkpoint(path, config, DrawnWeights(config.model, 0), trainer=state)
    point_latest(path)
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_continued_pretraining(here, capsys):
    before = build_config(values_of(data__skip=[[3, 5]], deepspeed__steps_per_print=7, init__from_hf="pythia"))
    path = make_run(before)
    extend("runs/base", [], factor=4.0)
    file = here / "base-yarn4.yaml"
    after = load_run_config(file)
    assert {key: getattr(after.model, key) for key in YARN4} == YARN4
    assert (after.data.sequence_length, after.model.max_position_embeddings) == (128, 128)
    assert after.init.from_checkpoint == str(path) and after.run.dir == "runs/base-yarn4"
    assert after.init.from_hf is None, "the run's own weights, not those that it began with"
    assert (after.train.global_batch_size, after.train.micro_batch_size) == (6, 1), "as many slots a step"
    assert after.train.num_steps == 100 and after.checkpoint.interval == after.eval.interval == 25
    o = after.optimizer
    assert (o.lr, o.min_lr, o.warmup_steps, o.schedule) == (2e-4, 2e-5, 10, "cosine"), "from the rate at the end"
    assert after.data.skip == [] and after.deepspeed == {"steps_per_print": 7}
    # All else is as before.
    kept = {"run": {"seed": 7, "device": "cpu"}, "data": {"train": ["text"], "meta_token_fraction": 0.125}}
    for section, entries in kept.items():
        for key, value in entries.items():
            assert getattr(getattr(after, section), key) == value == getattr(getattr(before, section), key)
    text = file.read_text()
    assert text.startswith(f"# Continued pre-training from {path} at 128 slots; its window was 32, positions scaled by")
    assert "  sequence_length: 128  # was 32\n" in text and "  lr: 0.0002  # was 0.002\n" in text
    assert "  hidden_size: 32\n" in text and "log:" in text, "what is not changed and not default"
    assert "betas" not in text, "what is default is not there"
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "Next: megameta train base-yarn4.yaml"
    assert "data.sequence_length" in said and "32 → 128" in said and "shared by up to 6 model replica(s)" in said
    assert (
        "megameta evaluate runs/base data.sequence_length=128 model.position_scaling=yarn"
        " model.position_scaling_factor=4 model.original_max_position_embeddings=32" in said
    )
    assert [entry.name for entry in here.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.parametrize(("method", "factor"), [("ntk", 2.0), ("linear", 1.5), ("none", 4.0)])
def test_methods(method, factor, capsys):
    path = make_run(build_config(values_of(model__position="rnope")))
    extend(str(path), [], factor=factor, method=method, output="long.yaml")
    after = load_run_config("long.yaml")
    assert after.model.position_scaling == method
    assert after.model.position_scaling_factor == (1.0 if method == "none" else factor)
    assert after.model.original_max_position_embeddings == 32
    assert after.data.sequence_length == after.model.max_position_embeddings == 32 * factor
    assert after.run.dir == f"runs/base-{'long' if method == 'none' else method}{factor:g}"
    assert ("position_scaling_factor=" in capsys.readouterr().out) == (method != "none")


def test_values_of_the_command_line_win():
    make_run(build_config(values_of(data__valid={"on": ["0x10"]})))
    overrides = ["run.dir=a place/with a long name " + 80 * "x", "data.train=[other]", "train.global_batch_size=8"]
    extend("runs/base", overrides, factor=4.0, steps=40, lr=1e-3, output="it.yaml")
    after = load_run_config("it.yaml")
    assert after.run.dir == overrides[0].partition("=")[2] and after.data.train == ["other"]
    assert (after.train.global_batch_size, after.train.num_steps, after.optimizer.lr) == (8, 40, 1e-3)
    assert after.optimizer.min_lr == 1e-4 and after.data.valid == {"on": ["0x10"]}


def test_a_batch_that_does_not_divide_stays():
    make_run(build_config(values_of(train__global_batch_size=18, train__micro_batch_size=6)))
    extend("runs/base", [], factor=4.0)
    after = load_run_config("base-yarn4.yaml")
    assert (after.train.global_batch_size, after.train.micro_batch_size) == (18, 1)


def test_a_run_whose_rate_ended_at_zero_and_one_that_was_short():
    config = build_config(values_of(optimizer__min_lr=0.0, train__num_steps=50, optimizer__warmup_steps=5))
    after = extended_config(config, window=32, factor=2, method="yarn", weights="w", run_dir="r")
    assert (after.optimizer.lr, after.train.num_steps, after.optimizer.warmup_steps) == (2e-4, 50, 5)


def test_finetuning_goes_on_in_longer_phases(capsys):
    tuning = {"finetune__directory": "tasks", "finetune__phases": [8, 16, 32], "finetune__eval_bins": [16]}
    make_run(build_config(values_of(data__tokenizer="tok", train__num_steps=3000, **tuning)))
    extend("runs/base", [], factor=4.0)
    after = load_run_config("base-yarn4.yaml", need_files=False)
    assert after.finetune.phases == [32, 64, 128] and after.finetune.eval_bins == [16, 64]
    assert after.train.num_steps == 300, "a tenth, which divides by the phases"
    text = Path("base-yarn4.yaml").read_text()
    assert text.startswith("# Fine-tuning from") and "  phases:  # was [8, 16, 32]\n" in text
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "Next: megameta finetune base-yarn4.yaml"
    assert "megameta tasks evaluate runs/base 'finetune.eval_bins=[32, 64, 128]' model.position_scaling=yarn" in said


def test_an_extended_model_is_extended_further_by_the_total_factor():
    values = values_of(data__sequence_length=128, model__max_position_embeddings=128)
    values["model"] |= YARN4
    make_run(build_config(values))
    with pytest.raises(UserError, match=r"extended already, from 32 to 128 slots by yarn.*--total.*a multiple of 32"):
        extend("runs/base", [], factor=2.0)
    with pytest.raises(UserError, match=r"--factor 4 --total: 128 slots.*give more than 4"):
        extend("runs/base", [], factor=4.0, total=True)
    extend("runs/base", [], factor=8.0, total=True)
    after = load_run_config("base-yarn8.yaml")
    assert (after.data.sequence_length, after.model.original_max_position_embeddings) == (256, 32)
    assert after.model.position_scaling_factor == 8.0 and after.train.global_batch_size == 12, "twice as long as it was"


def test_what_method_none_has_extended_counts_as_extended():
    make_run(build_config(values_of()))
    extend("runs/base", [], factor=4.0, method="none")
    make_run(load_run_config("base-long4.yaml"))
    with pytest.raises(UserError, match="extended already, from 32 to 128 slots by none"):
        extend("runs/base-long4", [], factor=2.0)


def test_weights_from_elsewhere_have_the_models_window(capsys):
    path = make_run(build_config({"model": values_of()["model"]}), trained=False)
    extend(str(path), [], factor=2.0, output="it.yaml")
    after = load_run_config("it.yaml")
    assert after.data.sequence_length == 64 and after.train.global_batch_size == 4, "half of the default"
    assert "data.train is empty" in capsys.readouterr().out
    model = {**values_of()["model"], **YARN4, "max_position_embeddings": 128}
    path = make_run(build_config({"run": {"dir": "longer"}, "model": model}), trained=False)
    with pytest.raises(UserError, match="extended already, from 32 to 128 slots by yarn"):
        extend(str(path), [], factor=2.0)
    extend(str(path), [], factor=8.0, total=True, output="longer.yaml")
    after = load_run_config("longer.yaml")
    assert after.data.sequence_length == 256 and after.train.global_batch_size == 4


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"model__position": "ape"}, {}, r"learned positions cannot be extended: there are 32.*not applicable"),
        ({"model__position": "ape"}, {"method": "none"}, "learned positions cannot be extended"),
        (
            {"model__position": "none"},
            {},
            r"no positions to scale.*megameta evaluate runs/base data.sequence_length=128",
        ),
        ({}, {"factor": 1.0}, "a number above 1"),
        ({}, {"factor": float("nan")}, "a number above 1"),
        ({}, {"factor": 1.3}, "32 slots times that is 41.6, not a whole number"),
        ({}, {"output": "nowhere/it.yaml"}, "nowhere is no directory"),
        ({}, {"output": "there.yaml"}, "there.yaml is there already"),
        ({}, {"overrides": ["run.dir=runs/base"]}, "runs/base is there already.*run.dir=OTHER"),
        ({}, {"overrides": ["train.num_stepz=3"]}, "did you mean train.num_steps"),
        ({}, {"steps": 5, "overrides": ["optimizer.warmup_steps=9"]}, "warmup_steps 9 is not below train.num_steps 5"),
    ],
)
def test_refusals(here, changes, arguments, message):
    make_run(build_config(values_of(**changes)))
    (here / "there.yaml").write_text("mine")
    arguments = {"factor": 4.0, **arguments}
    with pytest.raises(UserError, match=message):
        extend("runs/base", arguments.pop("overrides", []), **arguments)
    assert [path.name for path in here.iterdir() if path.suffix == ".yaml"] == ["there.yaml"]
    assert (here / "there.yaml").read_text() == "mine"


def test_a_killed_write_leaves_no_half_of_a_file(here, monkeypatch):
    make_run(build_config(values_of()))
    monkeypatch.setattr("megameta.files.sync_file", lambda file: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        extend("runs/base", [], factor=4.0)
    assert not (here / "base-yarn4.yaml").exists()


@pytest.mark.parametrize("factor", [4, 8])
def test_the_papers_files_are_what_it_chooses(here, factor):
    before = load_run_config(ROOT / "configs/paper/meta-rope.yaml", need_files=False)
    paper = load_run_config(ROOT / f"configs/paper/meta-rope-yarn{factor}.yaml", need_files=False)
    made = extended_config(
        before,
        window=1024,
        factor=factor,
        method="yarn",
        weights="runs/paper-meta-rope",
        run_dir=f"runs/paper-meta-rope-yarn{factor}",
        overrides=["train.global_batch_size=64"] if factor == 8 else [],  # 60 does not divide by 8 GPUs
    )
    assert made == paper
    (here / "it.yaml").write_text(to_text(made, before, ["made"]))
    assert load_run_config(here / "it.yaml", need_files=False) == paper


def test_a_value_that_is_by_chance_that_of_the_default_model_is_written(here):
    """12 key and value heads are the default of 12 heads, not of 24."""
    shape = {"model__hidden_size": 96, "model__num_heads": 24, "model__num_key_value_heads": 12}
    before = build_config(values_of(**shape, model__intermediate_size=3072, model__vocab_size=50259))
    made = extended_config(before, window=32, factor=32, method="yarn", weights="w", run_dir="r")
    (here / "it.yaml").write_text(to_text(made, before, ["made"]))
    assert load_run_config("it.yaml") == made


def train(file: str) -> None:
    """In a process of its own, because of DeepSpeed."""
    run_command(Path.cwd(), "megameta", "train", file, check=True)


@pytest.mark.slow
def test_from_a_short_run_to_an_extended_one(here, capsys, monkeypatch):
    """Train at 32, extend to 128, evaluate the weights as they are, train on, evaluate by position at 128."""
    corpus = write_corpus(here / "corpus", tokens=6000)
    values = tiny_values(corpus, run__dir="runs/base", data__valid=corpus, eval__num_samples=20)
    values["data"] |= {"document_mask": False, "reset_positions": False}
    Path("base.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: str, succeeds: bool = True) -> str:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        said = capsys.readouterr()
        assert (end.value.code == 0) == succeeds, said.out + said.err
        return said.out if succeeds else said.err

    train("base.yaml")
    said = command("extend", "runs/base", "--factor", "4", "--steps", "4", "train.global_batch_size=4")
    assert said.splitlines()[-1] == "Next: megameta train base-yarn4.yaml"
    again = command("extend", "runs/base", "--factor", "4", succeeds=False)
    assert again == "error: base-yarn4.yaml is there already: name another with --output, or remove it\n"

    # The command that it prints, in words of the shell that need no quotes here.
    untrained = next(line for line in said.splitlines() if line.startswith("  megameta evaluate")).split()[1:]
    shown = command(*untrained, "--by-position", "4", "--json", "untrained.json")
    assert "1–28" in shown and "85–112" in shown, "112 tokens of text in 128 slots"
    plain = command("evaluate", "runs/base", "data.sequence_length=128", "--json", "plain.json")
    assert "positions" not in plain

    train("base-yarn4.yaml")
    records = [json.loads(line) for line in Path("runs/base-yarn4/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4] and steps[-1]["tokens"] == 4 * 4 * 128
    command("evaluate", "runs/base-yarn4", "--by-position", "4", "--json", "trained.json")

    found = {name: json.loads(Path(f"{name}.json").read_text())["eval"] for name in ("untrained", "plain", "trained")}
    assert "by_position" not in found["plain"]["valid"]
    for name in ("untrained", "trained"):
        for result in found[name].values():
            rows = result["by_position"]
            assert [(row["first"], row["last"]) for row in rows] == [(1, 28), (29, 56), (57, 84), (85, 112)]
            assert sum(row["targets"] for row in rows) == result["targets"] == 20 * 112
            mean = sum(row["loss"] * row["targets"] for row in rows) / result["targets"]
            assert mean == pytest.approx(result["loss"], rel=1e-6)
    first = [record["eval"]["valid"]["loss"] for record in records if "eval" in record]
    losses = {name: found[name]["valid"]["loss"] for name in found}
    assert len(set(losses.values())) == 3, "scaling is on, and training went on"
    assert losses["trained"] == pytest.approx(first[-1], rel=1e-5), "as the run itself has evaluated it"
