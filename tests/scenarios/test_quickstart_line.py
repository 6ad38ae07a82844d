"""``make quickstart`` in miniature: programs started one after the other, as a newcomer does."""

import json
from pathlib import Path
from subprocess import CompletedProcess

from tests.support.commands import run_command
from tests.support.paths import ROOT


def quickstart(output: Path, *arguments: str) -> CompletedProcess[str]:
    tiny = ["model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "train.num_steps=6"]
    tiny += ["optimizer.warmup_steps=2", "eval.num_samples=8", "eval.interval=3", "log.tensorboard=false"]
    options = ["--output", output, "--vocab-size", 400, "--corpus-bytes", 150000, *arguments]
    return run_command(ROOT, "tools/quickstart.py", *options, *tiny)


def test_the_whole_line_in_miniature(tmp_path: Path) -> None:
    output = tmp_path / "quick start"
    done = quickstart(output, "--margin=-5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[8/8]" in done.stdout and "tokens/s" in done.stderr and "ETA" in done.stderr
    report = (output / "report.md").read_text(encoding="utf-8")
    assert "All claims below hold." in report and "No module named 'megameta'" in report
    assert (output / "loss.png").stat().st_size > 10_000
    models = json.loads((output / "samples.json").read_text(encoding="utf-8"))["models"]
    assert all("MegametaForCausalLM" in model["class"] and len(model["samples"]) == 4 for model in models)
    # Started again, all is done but the report; and what does not hold is a failure.
    again = quickstart(output, "--margin=50")
    assert again.returncode == 1, again.stdout + again.stderr
    assert again.stdout.count("done before") == 7
    assert "2 of 5 claims do not hold" in again.stderr
    assert "Traceback" not in again.stderr
