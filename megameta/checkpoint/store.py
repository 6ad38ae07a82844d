"""The form of a checkpoint on disk, and how one is found, checked and read.

    RUN/checkpoints/step_00000200/
        model-00001-of-00004.safetensors      weights by canonical name, float32, in full, vocabulary padding left out
        optimizer-00001-of-00004.safetensors  AdamW's moments: exp_avg.NAME and exp_avg_sq.NAME
        …                                     one of each for every rank that wrote some; which tensor is in which file
                                              means nothing
        trainer.json                          step, data position, counts, loss scale
        config.yaml                           the resolved configuration of the run
        manifest.json                         sizes and SHA-256 of the files above, and of itself (``manifest``)
    RUN/checkpoints/latest                    name of the newest whole checkpoint, moved last

The tensors are those of the plain ``GPT`` whatever layout trained them, so that any layout reads what any other wrote:
whole or by slice, as it needs them. Any safetensors program can read them, too.

A checkpoint appears under its name when it is whole: it is written beside it, synced, and renamed (``save``). One made
of weights alone (converted from elsewhere) has no optimizer files and no trainer.json. Version 1, which one process
wrote into model.safetensors and optimizer.safetensors, is read like version 2.

Where several nodes take part, RUN is in a file system that they share.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from megameta.checkpoint.manifest import (
    CONFIG,
    KINDS,
    MANIFEST,
    REMEDY,
    SUFFIX,
    TRAINER,
    Manifest,
    kind_of,
    read_manifest,
)
from megameta.checkpoint.ranks import Alone, Ranks, exchange
from megameta.checkpoint.tensor_file import StoredTensors
from megameta.config import RunConfig, build_config
from megameta.errors import UserError
from megameta.files import sha256, write_text_atomically

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
    manifest: Manifest

    def weights(self) -> StoredTensors:
        """Weights by canonical name; read from the files when they are asked for."""
        return self._tensors("model")

    def moments(self) -> StoredTensors:
        """AdamW's moments, as exp_avg.NAME and exp_avg_sq.NAME; read when they are asked for."""
        return self._tensors("optimizer")

    def _tensors(self, kind: str) -> StoredTensors:
        return StoredTensors([self.path / name for name in self.manifest.tensor_files(kind)])

    @property
    def has_trainer(self) -> bool:
        """Whether training can go on from it; otherwise it holds weights alone."""
        return TRAINER in self.manifest.files

    def trainer(self) -> TrainerState:
        """Where the run stood.

        Raises:
            UserError: the file is not there or not readable.
        """
        path = self.path / TRAINER
        try:
            return TrainerState(**json.loads(path.read_bytes().decode("utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: missing or not readable ({error}); {REMEDY}") from error


def step_name(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Inverse of ``step_name``."""
    return int(path.name.rpartition("_")[2])


# --- the newest one -------------------------------------------------------------------------------------------------


def point_latest(path: Path) -> None:
    """Make ``path`` the newest checkpoint of its directory, atomically."""
    write_text_atomically(path.parent / LATEST, path.name + "\n")


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run directory, None where there is none.

    Raises:
        UserError: the file ``latest`` is damaged or names no checkpoint.
    """
    directory = run_dir / "checkpoints"
    return directory / _read_latest(directory) if (directory / LATEST).exists() else None


def _read_latest(directory: Path) -> str:
    pointer = directory / LATEST
    try:
        name = pointer.read_bytes().decode("utf-8").strip()
        plain = name.isprintable() and Path(name).name == name and len(name) < 200
        there = plain and (directory / name / MANIFEST).is_file()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{pointer}: not readable ({error}); {_what_to_point_to(directory)}") from error
    if not there:
        remedy = _what_to_point_to(directory, name)
        raise UserError(f"{pointer}: names {name[:80]!r}, which is no checkpoint (no {MANIFEST}); {remedy}")
    return name


def _what_to_point_to(directory: Path, name: str = "") -> str:
    found = sorted(path.parent.name for path in directory.glob(f"*/{MANIFEST}"))
    # A process that was killed while it replaced a checkpoint by another of the same name (files.replace_directory).
    if f".{name}.old" in found:
        return f"rename {directory}/.{name}.old to {name}: it was being replaced when the writing process was killed"
    names = [found_name for found_name in found if not found_name.startswith(".")]
    if not names:
        return f"there is no checkpoint in {directory}: copy one back, or remove this file to start from the beginning"
    return f"write the name of a checkpoint into it, the newest being {names[-1]}"


def retire(directory: Path, keep: int) -> list[Path]:
    """Take the oldest checkpoints beyond ``keep`` out of sight; they and unfinished ones, for the caller to remove.

    Those of steps after ``latest``, the newest, go first: the run was taken back to an earlier one (a loss spike, a
    damaged file), and what they were part of is abandoned. The one that ``latest`` names always stays.

    Raises:
        UserError: ``latest`` names no checkpoint; nothing has been touched.
    """
    latest = _read_latest(directory)
    doomed = [*directory.glob(".step_*.old"), *directory.glob(".step_*.writing")]
    for path in sorted(directory.glob("step_*"), key=lambda path: (path.name <= latest, path.name))[: -max(keep, 1)]:
        # renamed first, so that what is left of an interrupted removal does not look like a checkpoint
        hidden = path.with_name(f".{path.name}.old")
        if hidden in doomed:
            shutil.rmtree(hidden)
            doomed.remove(hidden)
        doomed.append(path.rename(hidden))
    return doomed


def prune(directory: Path, keep: int) -> None:
    """``retire``, and remove."""
    for path in retire(directory, keep):
        shutil.rmtree(path)


# --- opening --------------------------------------------------------------------------------------------------------


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


@dataclasses.dataclass
class _Findings:
    """What one rank has seen of a checkpoint."""

    checkpoint: Checkpoint | None = None
    problems: list[tuple[str, int, str]] = dataclasses.field(default_factory=list)
    """(name of the file, 0 for its bytes and 1 for what they mean, message); no name where it is about the whole."""
    tensors: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """Tensors by kind in the files that this rank has read."""


def open_checkpoint(path: str | os.PathLike[str], topology: Ranks | None = None) -> Checkpoint:
    """Find a checkpoint and check every file against the manifest.

    With a topology of several ranks it is collective over torch.distributed's default group: each rank hashes a share
    of the files, and all of them return or all raise the same error.

    Raises:
        UserError: a file is missing, cut short or altered, or the format is not this one.
    """
    ranks = topology or Alone()
    mine = _inspect(path, ranks)
    seen = exchange((mine.problems, mine.tensors), ranks)
    problems = [(name, what, rank, text) for rank, (found, _) in enumerate(seen) for name, what, text in found]
    checkpoint = mine.checkpoint
    if problems or checkpoint is None:  # none, and no problem anywhere: cannot be
        _, _, rank, text = min(problems)
        raise UserError(text if rank == 0 else f"{text} (seen by rank {rank})")
    expected = checkpoint.manifest.tensors
    for kind in KINDS:
        total = sum(tensors[kind] for _, tensors in seen)
        if expected is not None and total != expected[kind]:
            files = ", ".join(checkpoint.manifest.tensor_files(kind)) or f"no {kind} file"
            raise UserError(f"{checkpoint.path}: {total} instead of {expected[kind]} tensors in {files}; {REMEDY}")
    return checkpoint


def _inspect(path: str | os.PathLike[str], ranks: Ranks) -> _Findings:
    """Check a share of the files. No error leaves it: the other ranks wait for what this one has found."""
    result = _Findings()
    try:
        directory = find_checkpoint(path)
        manifest = read_manifest(directory)
        unlisted = sorted({file.name for file in directory.glob(f"*{SUFFIX}")} - manifest.files.keys())
    except (UserError, OSError) as error:
        result.problems.append(("", 0, str(error)))
        return result
    for name in unlisted:
        text = f"{directory / name}: not in {MANIFEST}; move it out of the checkpoint if it is not part of it, else"
        result.problems.append((name, 0, f"{text} {REMEDY}"))
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name][0], name))
    for name in by_size[ranks.rank :: ranks.world_size]:
        try:
            _check_file(directory / name, *manifest.files[name])
            kind = kind_of(name)
            if kind is not None:
                result.tensors[kind] += len(StoredTensors([directory / name]))
        except UserError as error:
            result.problems.append((name, 0, str(error)))
    if not any(name == CONFIG for name, *_ in result.problems):
        try:
            result.checkpoint = Checkpoint(directory, _read_config(directory / CONFIG), manifest)
        except UserError as error:
            result.problems.append((CONFIG, 1, str(error)))
    return result


def _check_file(file: Path, size: int, digest: str) -> None:
    try:
        if not file.is_file():
            raise UserError(f"{file}: missing; {REMEDY}")
        if file.stat().st_size != size:
            raise UserError(f"{file}: {file.stat().st_size} bytes instead of {size}; {REMEDY}")
        if sha256(file) != digest:
            raise UserError(f"{file}: its content is not what was written (SHA-256 differs); {REMEDY}")
    except OSError as error:
        raise UserError(f"{file}: not readable ({error}); {REMEDY}") from error


def _read_config(file: Path) -> RunConfig:
    try:
        raw = yaml.safe_load(file.read_bytes().decode("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: missing or not readable ({error}); {REMEDY}") from error
    return build_config(raw, str(file))


def load_weights(path: str | os.PathLike[str]) -> tuple[RunConfig, StoredTensors]:
    """Configuration and weights (float32, logical rows, by canonical name) of a checkpoint or a run's latest one."""
    checkpoint = open_checkpoint(path)
    return checkpoint.config, checkpoint.weights()
