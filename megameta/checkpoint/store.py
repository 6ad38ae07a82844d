"""The form of a checkpoint on disk.

    RUN/checkpoints/step_00000200/
        model.safetensors       weights by canonical name, float32, in full, vocabulary padding left out
        optimizer.safetensors   AdamW's moments: exp_avg.NAME and exp_avg_sq.NAME
        trainer.json            step, data position, counts, loss scale
        config.yaml             the resolved configuration of the run
        manifest.json           format, sizes and SHA-256 of the files above
    RUN/checkpoints/latest      name of the newest whole checkpoint, moved last

A checkpoint appears under its name when it is whole: it is written beside it, synced, and renamed. One made of
weights alone (converted from elsewhere) has no optimizer.safetensors and no trainer.json.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megameta.config import RunConfig, build_config
from megameta.errors import UserError
from megameta.model import ModelConfig

FORMAT = "megameta-checkpoint"
VERSION = 1
WEIGHTS, OPTIMIZER, TRAINER, CONFIG, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "trainer.json",
    "config.yaml",
    "manifest.json",
)
LATEST = "latest"


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """Where a run stands."""

    step: int
    """Optimiser steps done."""
    next_batch: int
    """Number of the global batch to read next (data.skip makes it run ahead of the step)."""
    tokens: int
    """Slots seen, meta-tokens included."""
    targets: int
    """Targets that counted in losses."""
    optimizer_step: int
    """Updates made; fewer than ``step`` where fp16 skipped some."""
    loss_scale: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose files have been checked against its manifest."""

    path: Path
    config: RunConfig

    def weights(self) -> dict[str, Tensor]:
        """Weights by canonical name, on the CPU."""
        return _read_tensors(self.path / WEIGHTS)

    def moments(self) -> dict[str, Tensor]:
        """AdamW's moments, on the CPU."""
        return _read_tensors(self.path / OPTIMIZER)

    @property
    def has_trainer(self) -> bool:
        """Whether training can go on from it; otherwise it holds weights alone."""
        return (self.path / TRAINER).exists()

    def trainer(self) -> TrainerState:
        """Where the run stood."""
        return TrainerState(**json.loads((self.path / TRAINER).read_text(encoding="utf-8")))


def step_name(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step_{step:08d}"


def write_checkpoint(
    path: Path,
    config: RunConfig,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor] | None = None,
    trainer: TrainerState | None = None,
) -> None:
    """Write a checkpoint directory, whole or not at all; one of the same name is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        save_file(dict(weights), work / WEIGHTS, metadata={"format": "pt"})
        if moments is not None:
            save_file(dict(moments), work / OPTIMIZER, metadata={"format": "pt"})
        if trainer is not None:
            (work / TRAINER).write_text(json.dumps(dataclasses.asdict(trainer), indent=1), encoding="utf-8")
        (work / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(work.iterdir())}
        manifest = {"format": FORMAT, "version": VERSION, "files": files}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in work.iterdir():
            _sync(file)
        _sync(work)
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            work.rename(path)
            shutil.rmtree(old)
        else:
            work.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def point_latest(path: Path) -> None:
    """Make ``path`` the newest checkpoint of its directory, atomically."""
    write_text_atomically(path.parent / LATEST, path.name + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a small file, whole or not at all."""
    work = path.with_name(f".{path.name}.writing")
    with work.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    work.replace(path)
    _sync(path.parent)


def prune(directory: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond ``keep``, and unfinished ones. The one that ``latest`` names is the newest.

    Those of steps after ``latest`` go first: the run was taken back to an earlier one (a loss spike, a damaged file),
    and what they were part of is abandoned.
    """
    for path in [*directory.glob(".step_*.old"), *directory.glob(".step_*.writing")]:
        shutil.rmtree(path)
    latest = (directory / LATEST).read_text(encoding="utf-8").strip()
    for path in sorted(directory.glob("step_*"), key=lambda path: (path.name <= latest, path.name))[:-keep]:
        # renamed first, so that what is left of an interrupted removal does not look like a checkpoint
        doomed = path.rename(path.with_name(f".{path.name}.old"))
        shutil.rmtree(doomed)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run directory, None where there is none."""
    pointer = run_dir / "checkpoints" / LATEST
    if not pointer.exists():
        return None
    return run_dir / "checkpoints" / pointer.read_text(encoding="utf-8").strip()


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a user means: a checkpoint directory, or the latest of a run directory.

    Raises:
        UserError: neither.
    """
    given = Path(path)
    if (given / MANIFEST).exists():
        return given
    if found := latest_checkpoint(given):
        return found
    raise UserError(f"{given}: neither a checkpoint (no {MANIFEST}) nor a run with one (no checkpoints/{LATEST})")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Find a checkpoint and check every file against the manifest.

    Raises:
        UserError: a file is missing, cut short or altered, or the format is not this one.
    """
    directory = find_checkpoint(path)
    remedy = "use an older checkpoint of the run (write its name into checkpoints/latest) or copy this one again"
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        kind, version = manifest["format"], manifest["version"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory / MANIFEST}: missing or not readable ({error}); {remedy}") from error
    if kind != FORMAT or version != VERSION:
        raise UserError(f"{directory}: format {kind} version {version}; this program reads {FORMAT} version {VERSION}")
    for name, (size, digest) in files.items():
        file = directory / name
        if not file.is_file():
            raise UserError(f"{file}: missing; {remedy}")
        if file.stat().st_size != size:
            raise UserError(f"{file}: {file.stat().st_size} bytes instead of {size}; {remedy}")
        if _sha256(file) != digest:
            raise UserError(f"{file}: its content is not what was written (SHA-256 differs); {remedy}")
    raw = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))
    return Checkpoint(directory, build_config(raw, str(directory / CONFIG)))


def load_weights(path: str | os.PathLike[str]) -> tuple[RunConfig, dict[str, Tensor]]:
    """Configuration and weights (float32, logical rows, by canonical name) of a checkpoint or a run's latest one."""
    checkpoint = open_checkpoint(path)
    return checkpoint.config, checkpoint.weights()


def save_weights(
    path: str | os.PathLike[str], model: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: str | None
) -> None:
    """Write a checkpoint of weights alone, from which ``init.from_checkpoint`` starts."""
    config = build_config({"model": model.to_dict(), "data": {"tokenizer": tokenizer}})
    write_checkpoint(Path(path), config, {name: tensor.contiguous() for name, tensor in tensors.items()})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable as safetensors: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
