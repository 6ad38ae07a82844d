"""What a run leaves in its directory, read by tests."""

import json
from pathlib import Path

from megameta.checkpoint import open_checkpoint

#: What a step writes into metrics.jsonl apart from times.
EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "targets", "batch")


def records(directory: str | Path) -> list[dict]:
    """Lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return [line if "eval" in line else {key: line[key] for key in EXACT} for line in lines]


def hashes(directory: str | Path) -> dict[str, str]:
    """SHA-256 of the tensors in the latest checkpoint."""
    manifest = json.loads((open_checkpoint(directory).path / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}


def last_step(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except ValueError:  # being written
            continue
    return 0


def checkpoints(directory: Path) -> list[str]:
    return sorted(p.name for p in (directory / "checkpoints").iterdir())


def latest_step(directory: Path) -> int:
    return int((directory / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
