"""``megameta reproduce`` in miniature, as a user runs it."""

import json
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.commands import run_command

SCALE = """
description: a miniature
seeds: [1]
arms: [gpt2-ape, meta-rope]
corpus: {vocab_size: 1800, max_bytes: 200000}
tasks: {names: [copying], bins: [32, 48, 64], difficulties: [easy, medium], train: 300, test: 60}
phases: [32, 48]
model: {hidden_size: 32, num_layers: 1, num_heads: 2}
pretrain:
  data: {sequence_length: 48}
  train: {num_steps: 3, micro_batch_size: 4, global_batch_size: 4}
  optimizer: {lr: 2.0e-3, min_lr: 2.0e-4, warmup_steps: 1}
  eval: {num_samples: 8}
finetune:
  train: {num_steps: 3, micro_batch_size: 8, global_batch_size: 8} # made a multiple of the two phases
  optimizer: {lr: 2.0e-3, min_lr: 1.0e-5, warmup_steps: 1}
test_examples: 12
inference: {model: {hidden_size: 64}, prompt: 32, new_tokens: 4, rounds: 3}
"""


def reproduce(directory: Path, *arguments: str) -> CompletedProcess[str]:
    return run_command(directory, "megameta", "reproduce", *arguments, "--scale", "mine.yaml", "--output", "out")


def check_a_partial_report(directory: Path, whole: str) -> None:
    """One evaluation not done: its row is gone, nothing is run, the rest is as it was."""
    stamp = directory / "out/jobs/evaluate/meta-rope/copying/1/positions-zeroed.json"
    kept = stamp.read_text()
    stamp.unlink()
    partial = reproduce(directory, "figure1", "--partial")
    assert partial.returncode == 0, partial.stdout + partial.stderr
    report = (directory / "out/figure1/report.md").read_text(encoding="utf-8")
    count = len(list((directory / "out/jobs").rglob("*.json"))) + 1
    assert f"**Not whole: {count - 1} of {count} jobs have run.**" in report
    rows = [line for line in whole.splitlines() if line.startswith("|") and not line.startswith("| time of")]
    lost = {line for line in rows if line not in report}
    assert lost == {line for line in rows if line.startswith("| Meta + RoPE, positions zeroed")} != set()
    assert not stamp.exists()
    stamp.write_text(kept)


@pytest.mark.slow
def test_figure_and_tables_in_miniature(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SCALE)
    listed = reproduce(tmp_path, "figure1", "--dry-run")
    assert listed.returncode == 0 and "to do finetune/meta-rope/copying/1" in listed.stdout
    early = reproduce(tmp_path, "figure1", "--partial")
    assert early.returncode == 1 and "nothing is done yet" in early.stderr
    stopped = reproduce(tmp_path, "figure1", "--time-limit", "0.03")
    assert stopped.returncode == 75 and "the same command goes on" in stopped.stdout, stopped.stderr
    done = reproduce(tmp_path, "figure1")
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    report = (out / "figure1" / "report.md").read_text(encoding="utf-8")
    for expected in (
        "Meta + RoPE",
        "GPT-2, learned positions",
        "the paper at 512 after 128, 256, 512",
        "nothing is claimed",
        "64 (not trained)",
    ):
        assert expected in report, expected
    assert (out / "figure1" / "figure1.png").stat().st_size > 20_000
    scores = json.loads((out / "scores/tasks/gpt2-ape/copying/1/as-trained.json").read_text())
    assert {cell["bin"] for cell in scores["cells"]} == {32, 48}  # learned positions end
    check_a_partial_report(tmp_path, report)

    second = reproduce(tmp_path, "table2")
    assert second.returncode == 0, second.stdout + second.stderr
    trained = [line for line in second.stdout.splitlines() if "finetune/" in line and "evaluate/" not in line]
    assert not trained, trained  # the same models
    table2 = (out / "table2" / "report.md").read_text(encoding="utf-8")
    assert "Meta + RoPE, positions zeroed" in table2 and "Examples a cell: 32: 12, 48: 12, 64: 12" in table2

    third = reproduce(tmp_path, "ppl")
    assert third.returncode == 0, third.stdout + third.stderr
    assert "the same targets in all rows" in (out / "ppl" / "report.md").read_text(encoding="utf-8")
    fourth = reproduce(tmp_path, "inference")
    assert fourth.returncode == 0, fourth.stdout + fourth.stderr
    refused = reproduce(tmp_path, "table1")
    assert refused.returncode == 1 and "no table1 section" in refused.stderr
