"""``make quickstart`` in miniature: programs started one after the other, as a newcomer does."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def quickstart(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    tiny = ["model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "train.num_steps=6"]
    tiny += ["optimizer.warmup_steps=2", "eval.num_samples=8", "eval.interval=3", "log.tensorboard=false"]
    command = [sys.executable, "tools/quickstart.py", "--output", str(output), "--vocab-size", "400"]
    command += ["--corpus-bytes", "150000", *arguments, *tiny]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)


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
