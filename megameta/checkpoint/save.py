"""Writing a checkpoint, by one process or by many ranks at once.

Each rank streams the tensors that it owns into files of its own, one tensor in memory at a time. Rank 0 makes the
working directory first and, when every rank has said that its files are on the disk, writes the small files and gives
the directory its name. All ranks see the same directory: between nodes, a shared file system.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megameta.checkpoint.manifest import CONFIG, KINDS, MANIFEST, TRAINER, Manifest, tensor_file_name
from megameta.checkpoint.ranks import Alone, Attempt, Ranks, exchange, from_main
from megameta.checkpoint.store import TrainerState
from megameta.checkpoint.tensor_file import TensorWriter, entry_of
from megameta.config import RunConfig, build_config
from megameta.errors import Superseded, UserError
from megameta.files import replace_directory, sync, write_synced
from megameta.model import ModelConfig

#: Of one rank: (bytes and SHA-256 by file, tensors by kind, what failed).
ShareResult = tuple[dict[str, tuple[int, str]], dict[str, int], str | None]


@dataclasses.dataclass(frozen=True)
class StateEntry:
    """One tensor of a run's state."""

    kind: str
    """ "model" or "optimizer"."""
    name: str
    """Canonical name; of the optimizer's, exp_avg.NAME or exp_avg_sq.NAME."""
    shape: tuple[int, ...]
    """In full, without vocabulary padding."""
    owner: int
    """The rank that writes it."""


class StateSource(Protocol):
    """A run's state, spread over ranks."""

    @property
    def entries(self) -> Sequence[StateEntry]:
        """Those in which this rank takes part, in an order that is the same on all that do.

        Ranks of other pipeline stages have other entries.
        """

    def gather(self, entry: StateEntry) -> Tensor | None:
        """The full float32 tensor on the CPU, on its owner; None elsewhere. Collective among the participants."""


def save_distributed(
    path: Path,
    config: RunConfig,
    source: StateSource,
    trainer: TrainerState | None,
    topology: Ranks,
    attempt: Attempt | None = None,
) -> None:
    """Write a checkpoint directory, whole or not at all; one of the same name is replaced.

    Collective over all ranks of torch.distributed's default group (a lone process needs none). A rank whose disk fails
    goes on gathering for the others. No more than one gathered tensor is kept at a time.

    Args:
        attempt: of the run; files are written in a directory of its own and renamed only while it is the newest.

    Raises:
        UserError: the same on every rank, with the rank and the file that failed. Nothing is left behind, and a
            checkpoint that had the name before still has it.
        Superseded: on every rank, where the attempt is not the newest any more.
        ValueError: on every rank, where two ranks own a tensor of the same name.
    """
    work = working_directory(path, attempt)
    with removed_on_failure(work, topology):
        share = begin(work, path, source, topology)
        for entry in source.entries:
            share.put(entry, source.gather(entry))
        complete(work, path, config, trainer, share.finish(), topology, attempt)


def working_directory(path: Path, attempt: Attempt | None) -> Path:
    """Where a checkpoint is written until it has its name."""
    tag = f".{attempt.number}" if attempt is not None else ""
    return path.with_name(f".{path.name}{tag}.writing")


@contextmanager
def removed_on_failure(work: Path, topology: Ranks) -> Iterator[None]:
    """Rank 0 removes the working directory where the block fails."""
    try:
        yield
    except BaseException:
        if topology.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise


def begin(work: Path, path: Path, source: StateSource, topology: Ranks) -> "Share":
    """Make the working directory and open this rank's files. Collective."""
    return Share(work, source.entries, _prepare(work, path, source, topology), topology.rank)


def complete(
    work: Path,
    path: Path,
    config: RunConfig,
    trainer: TrainerState | None,
    share: ShareResult,
    topology: Ranks,
    attempt: Attempt | None,
) -> None:
    """Give the directory its name, once every rank's files are on the disk. Collective; raises on every rank."""
    shares = exchange(share, topology)
    failures = [failure for *_, failure in shares]
    superseded: str | None = None
    if topology.rank == 0 and not any(failures):
        try:
            failures = [_complete(work, path, config, trainer, shares, attempt)]
        except Superseded as error:
            superseded = str(error)
    if topology.rank == 0 and (superseded or any(failures)):
        shutil.rmtree(work, ignore_errors=True)  # before the others go on
    failures, superseded = from_main((failures, superseded), topology)
    if superseded is not None:
        raise Superseded(superseded)
    _raise_first(path, failures)


def write_checkpoint(
    path: Path,
    config: RunConfig,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor] | None = None,
    trainer: TrainerState | None = None,
) -> None:
    """``save_distributed`` of one process that has the tensors; no other process takes part."""
    save_distributed(path, config, _InMemory(weights, moments or {}), trainer, Alone())


def save_weights(
    path: str | os.PathLike[str], model: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: str | None
) -> None:
    """Write a checkpoint of weights alone, from which ``init.from_checkpoint`` starts."""
    config = build_config({"model": model.to_dict(), "data": {"tokenizer": tokenizer}})
    write_checkpoint(Path(path), config, tensors)


class _InMemory:
    """A source over mappings."""

    def __init__(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        self._tensors = {"model": weights, "optimizer": moments}
        self.entries = [
            StateEntry(kind, name, entry_of(tensors, name).shape, 0)
            for kind, tensors in self._tensors.items()
            for name in tensors
        ]

    def gather(self, entry: StateEntry) -> Tensor:
        return self._tensors[entry.kind][entry.name].detach().float().cpu()


def _prepare(work: Path, path: Path, source: StateSource, ranks: Ranks) -> dict[tuple[str, str], int]:
    """Make the working directory; the owner of every tensor by kind and name. Collective."""
    failure = None
    if ranks.rank == 0:
        try:
            work.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        except OSError as error:
            failure = f"{work}: {error}"
    owned = [(entry.kind, entry.name) for entry in source.entries if entry.owner == ranks.rank]
    said = exchange((failure, owned), ranks)
    _raise_first(path, [failure for failure, _ in said])
    owner: dict[tuple[str, str], int] = {}
    for rank, (_, keys) in enumerate(said):
        for key in keys:
            if key[0] not in KINDS or key in owner:
                raise ValueError(f"{key} is of no known kind, or owned by ranks {owner.get(key)} and {rank} at once")
            owner[key] = rank
    return owner


def _file_names(owner: Mapping[tuple[str, str], int], rank: int) -> dict[str, str]:
    """A rank's file of each kind of which it owns tensors; only ranks that do are counted."""
    names = {}
    for kind in KINDS:
        writers = sorted({writer for key, writer in owner.items() if key[0] == kind})
        if rank in writers:
            names[kind] = tensor_file_name(kind, writers.index(rank), len(writers))
    return names


class Share:
    """The files of one rank. Failures are kept, not raised: the other ranks wait in the next gather."""

    def __init__(
        self, work: Path, entries: Sequence[StateEntry], owner: Mapping[tuple[str, str], int], rank: int
    ) -> None:
        self._rank = rank
        self._names = _file_names(owner, rank)
        self._counts = dict.fromkeys(KINDS, 0)
        self._writers: dict[str, TensorWriter] = {}
        self._failure: str | None = None
        for entry in entries:
            if owner.get((entry.kind, entry.name)) != entry.owner:
                self._failure = f"{entry.kind} {entry.name}: rank {entry.owner} does not know that it should write it"
        for kind, name in self._names.items():
            with self._keeping_failure(kind):
                own = [(entry.name, entry.shape) for entry in entries if (entry.kind, entry.owner) == (kind, rank)]
                self._writers[kind] = TensorWriter(work / name, own)
                self._counts[kind] = len(own)

    def put(self, entry: StateEntry, tensor: Tensor | None) -> None:
        """Write a gathered tensor if it is this rank's to write and nothing has failed yet."""
        if entry.owner != self._rank or self._failure is not None:
            return
        with self._keeping_failure(entry.kind):
            if tensor is None:
                raise ValueError(f"{entry.name} was not gathered on its owner")
            self._writers[entry.kind].write(entry.name, tensor)

    def fail(self, said: str) -> None:
        """Nothing more is written; what is said is raised with the other failures."""
        self._failure = self._failure or said

    def finish(self) -> ShareResult:
        """Close the files, with everything on the disk."""
        files: dict[str, tuple[int, str]] = {}
        for kind, writer in self._writers.items():
            if self._failure is not None:
                writer.abandon()
                continue
            with self._keeping_failure(kind):
                files[self._names[kind]] = writer.close()
        return files, self._counts, self._failure

    @contextmanager
    def _keeping_failure(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any: whatever it is, it is raised on every rank in the end
            said = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
            self._failure = self._failure or f"{self._names[kind]}: {said}"


def _complete(
    work: Path,
    path: Path,
    config: RunConfig,
    trainer: TrainerState | None,
    shares: Sequence[tuple],
    attempt: Attempt | None,
) -> str | None:
    """Write the small files and give the directory its name; what failed, if something did."""
    files: dict[str, tuple[int, str]] = {}
    counts = dict.fromkeys(KINDS, 0)
    for share_files, share_counts, _ in shares:
        files |= share_files
        counts = {kind: counts[kind] + share_counts[kind] for kind in KINDS}
    try:
        for name, (size, _) in files.items():
            if not (work / name).is_file() or (work / name).stat().st_size != size:
                return f"{name}: rank 0 does not see what another rank wrote; run.dir must be shared by all nodes"
        if trainer is not None:
            files[TRAINER] = write_synced(work / TRAINER, json.dumps(dataclasses.asdict(trainer), indent=1))
        files[CONFIG] = write_synced(work / CONFIG, config.to_yaml())
        write_synced(work / MANIFEST, Manifest(dict(sorted(files.items())), counts).render())
        sync(work)
        if attempt is not None:
            attempt.check()
        replace_directory(work, path)
    except OSError as error:
        return str(error)
    return None


def _raise_first(path: Path, failures: Sequence[str | None]) -> None:
    """Raise the first rank's failure, if any rank has one."""
    for rank, failure in enumerate(failures):
        if failure is not None:
            more = sum(other is not None for other in failures) - 1
            others = f" (and {more} other rank{'s' * (more > 1)})" if more else ""
            raise UserError(
                f"cannot save {path}: rank {rank}, {failure}{others};"
                " free space or mend the disk, then start the run again: earlier checkpoints are untouched"
            )
