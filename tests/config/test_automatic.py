"""What "auto" stands for: settled at the first start, kept by a resume on any device."""

import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megameta.checkpoint import latest_checkpoint
from megameta.config import assume, build_config, load_config, settle
from megameta.engine import build as setup
from megameta.engine import compile as compiling
from megameta.engine.build import settle_on
from megameta.engine.compile import saved_seconds
from megameta.errors import UserError
from megameta.parallel.topology import Topology
from tests.support.commands import one_error, run_command
from tests.support.ranks import run_ranks
from tests.support.runs import last_step
from tests.support.training import tiny_values

AUTO, FP32, BF16, FP16 = (build_config({"train": {"precision": name}}) for name in ("auto", "fp32", "bf16", "fp16"))
LARGE = build_config({"model": {"vocab_size": 50258}, "data": {"sequence_length": 1024}})
SMALL = build_config({"model": {"vocab_size": 61}, "data": {"sequence_length": 1024}})


def with_train(config, **values):
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


@pytest.mark.parametrize(
    ("device", "capability", "saved", "expected"),
    [
        ("cpu", 8, None, "fp32"),
        ("cuda", 9, None, "bf16"),
        ("cuda", 8, None, "bf16"),
        ("cuda", 7, None, "fp32"),  # a V100 multiplies in fp16 alone
        ("cuda", 9, FP32, "fp32"),
        ("cpu", 8, BF16, "bf16"),
        ("cuda", 7, BF16, "bf16"),
        ("cuda", 9, FP16, "fp16"),
        ("cuda", 9, AUTO, "bf16"),
    ],
)
def test_precision(device, capability, saved, expected):
    found = settle(AUTO, device, capability=capability, saved=saved)
    keys = {"train": {"precision", "compile", "fused_loss"}}
    assert found.train.precision == expected
    assert found.model_dump(exclude=keys) == AUTO.model_dump(exclude=keys)
    assert settle(found, "cuda", capability=9, saved=FP16) is found, "what is given is not touched"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("compiles", [False, True])
def test_compile_and_fused_loss(device, compiles):
    """A GPU takes the loss from logits where nothing is compiled, and no device bothers for few logits."""
    found = settle(LARGE, device, compiles=compiles).train
    assert (found.compile, found.fused_loss) == ("blocks" if compiles else "none", device == "cpu" or compiles)
    assert settle(SMALL, device, compiles=compiles).train.fused_loss is False
    given = settle(with_train(LARGE, compile="blocks", fused_loss=False), device).train
    assert (given.compile, given.fused_loss) == ("blocks", False)
    began = settle(with_train(SMALL, compile="none", fused_loss=True), device)
    kept = settle(LARGE, device, compiles=compiles, saved=began).train
    assert (kept.compile, kept.fused_loss) == ("none", True), "a resumed run keeps what it began with"


@pytest.fixture
def lines(monkeypatch):
    """What the log says."""
    said = []
    monkeypatch.setattr(setup.LOG, "info", lambda text, *values: said.append(text % values))
    return said


@pytest.fixture
def compiler(monkeypatch):
    """One that works at once; a step saves half a second."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    monkeypatch.setattr(compiling, "saved_seconds", lambda config, topology: 0.5 * config.train.num_steps)


def test_a_long_run_is_compiled(compiler, lines):
    long, short = (with_train(LARGE, num_steps=steps) for steps in (80, 50))
    assert settle_on(long, Topology()).train.compile == "blocks" and not lines
    assert settle_on(short, Topology()).train.compile == "none"
    assert lines == ["blocks are not compiled: it takes about 30 s, and would save about 25 s of this run"]
    assert settle_on(with_train(long, compile="none"), Topology()).train.compile == "none" and len(lines) == 1


def test_a_resumed_run_stays_compiled_where_it_can(compiler, lines, monkeypatch):
    short = with_train(LARGE, num_steps=1)
    began = settle(short, "cpu", compiles=True)
    assert settle_on(short, Topology(), began) == began and not lines
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = settle_on(short, Topology(), began)
    assert found == with_train(began, compile="none"), "the loss is taken as before"
    assert len(lines) == 1 and lines[0].startswith("blocks are not compiled any more: a C++ compiler is needed")
    written = settle(short, "cpu")
    assert settle_on(with_train(LARGE, num_steps=80), Topology(), written).train.compile == "none" and len(lines) == 1


def test_a_broken_compiler_is_named(compiler, lines, monkeypatch, tmp_path):
    from torch._inductor import config as inductor  # a second and a half

    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(inductor.cpp, "cxx", (str(broken),))  # where a new process has it from CXX
    monkeypatch.setattr(inductor, "compile_threads", 1)  # no processes that outlive the test
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        pytest.skip("Python's headers are missing, which is found first: apt install python3-dev")
    assert settle_on(with_train(LARGE, num_steps=80), Topology()).train.compile == "none"
    assert len(lines) == 1 and lines[0].startswith("blocks are not compiled: a compiler is there, and fails: ")


def test_tasks_are_never_compiled(compiler, lines):
    tasks = LARGE.model_copy(update={"finetune": LARGE.finetune.model_copy(update={"directory": "tasks"})})
    assert settle_on(with_train(tasks, num_steps=80), Topology()).train.compile == "none"
    assert lines == ["blocks are not compiled: lengths of tasks differ, and each would compile anew"]


def _on_ranks(topology):
    compiling.BACKEND = "eager"
    compiling.saved_seconds = lambda config, topology: 100.0 * topology.rank  # too little on the first alone
    return settle_on(with_train(LARGE, num_steps=80), topology).train.compile


def test_all_ranks_do_the_same():
    assert run_ranks(_on_ranks, 2) == ["none", "none"]


def test_what_compiling_saves():
    """More of a longer run, and of a wider model; less where ranks share the work."""
    base = saved_seconds(LARGE, Topology())
    assert saved_seconds(with_train(LARGE, num_steps=2000), Topology()) == pytest.approx(2 * base)
    assert saved_seconds(LARGE, Topology(world_size=2)) == pytest.approx(base / 2)
    wide = LARGE.model_copy(update={"model": replace(LARGE.model, hidden_size=1536)})
    assert saved_seconds(wide, Topology()) > 1.5 * base


def test_auto_is_the_default():
    train = build_config({}).train
    assert {train.precision, train.compile, train.fused_loss} == {"auto"}


@pytest.mark.parametrize("value", ["yes please", 2, "none"])
def test_a_value_that_is_neither_is_one_problem(value):
    with pytest.raises(UserError, match=r"1 problem.*\n.*train.fused_loss: Input should be 'auto', True or False"):
        build_config({"train": {"fused_loss": value}})


def test_estimates_assume_a_device():
    assert (assume(LARGE, "cuda").run.device, assume(LARGE, "cuda").train.precision) == ("cuda", "bf16")
    given = build_config({"run": {"device": "cpu"}})
    assert assume(given, "cuda").run.device == "cpu"


@pytest.mark.parametrize(("began", "shown"), [("auto", "fp32"), ("bf16", "bf16")])
def test_a_resumed_run_keeps_what_it_began_with(tmp_path, corpus, began, shown):
    values = tiny_values(corpus, train__precision=began, train__num_steps=8, checkpoint__interval=4)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    train = ("megameta", "train", "run.yaml", "run.dir=run")
    first = run_command(tmp_path, *train)
    assert first.returncode == 0, first.stderr
    assert f"ZeRO 0, {shown})" in first.stderr and f", measured with {shown} products" in first.stderr
    assert first.stderr.count("blocks are not compiled: it takes about 30 s, and would save about 0 s of this run") == 1
    again = run_command(tmp_path, *train, "train.num_steps=12", "train.precision=auto")
    assert again.returncode == 0, again.stderr
    assert "compiled" not in again.stderr
    assert f"ZeRO 0, {shown})" in again.stderr
    for path in (tmp_path / "run" / "config.yaml", latest_checkpoint(tmp_path / "run") / "config.yaml"):
        stored = load_config(path).train
        assert (stored.precision, stored.compile, stored.fused_loss) == (shown, "none", False)
    other = "fp32" if shown == "bf16" else "bf16"
    refused = run_command(tmp_path, *train, "train.num_steps=16", f"train.precision={other}")
    assert (refused.returncode, last_step(tmp_path / "run")) == (1, 12)
    assert f"train.precision: '{shown}' in the checkpoint, '{other}' now" in one_error(refused.stderr)
