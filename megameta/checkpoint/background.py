"""Saving while training goes on: the tensors are copied, a thread of each rank writes them, and the main threads agree.

    begin            collective: the working directory. The thread starts: it copies what this rank holds of the state
                     to host memory, sends it to the ranks that write it, and writes what is this rank's to write
    wait_for_copies  before weights and moments change again: a forward and a backward pass later, so that there is
                     seldom anything to wait for
    is_writing       whether this rank's thread is at work; ranks tell each other with the losses of each step
    complete         collective: waits for the threads, then the small files and the name, as in a save without threads

On a GPU the thread's copies queue up with the training's kernels. What threads send goes from host memory to host
memory, in a process group that nothing else uses; they make no collective. Until ``complete`` the
checkpoint is a hidden working directory, so that a run that is killed in between goes on from the one before; what is
left is removed when the next checkpoint is published.
"""

import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megameta.checkpoint.ranks import Attempt, Ranks
from megameta.checkpoint.save import (
    Share,
    ShareResult,
    StateEntry,
    StateSource,
    begin,
    complete,
    removed_on_failure,
    working_directory,
)
from megameta.checkpoint.store import TrainerState, retire
from megameta.config import RunConfig

LOG = logging.getLogger("megameta")


class StateInParts(StateSource, Protocol):
    """A run's state of which each rank can read what it holds, without the other ranks."""

    def holders(self, entry: StateEntry) -> Mapping[int, int]:
        """How many float32 elements each rank has to give of an entry. Collective over all ranks at the first call."""

    def part(self, entry: StateEntry) -> Tensor:
        """This rank's part of an entry that it is a holder of, flat: a view, which changes with the state."""

    def assemble(self, entry: StateEntry, parts: Mapping[int, Tensor]) -> Tensor:
        """The whole tensor from its holders' parts, by rank. On the CPU."""


class _Writer(threading.Thread):
    """Writes this rank's share: ``copy`` reads the state, and ``tensors`` are made of what was copied.

    One that fails or is cancelled still sends to the other ranks what they wait for.
    """

    def __init__(
        self,
        share: Share,
        copy: Callable[[], None],
        tensors: Callable[[], Iterator[tuple[StateEntry, Tensor]]],
        wait_for_removal: Callable[[], None],
    ) -> None:
        super().__init__(name="checkpoint-writer", daemon=True)
        self._share, self._copy, self._tensors, self._wait_for_removal = share, copy, tensors, wait_for_removal
        self._cancelled = threading.Event()
        self.has_copied = threading.Event()
        self.result: ShareResult | None = None

    def run(self) -> None:
        """Failures are kept by the share, and raised by ``complete`` on every rank."""
        with self._keeping_failure("copying the state"):
            self._copy()
        self.has_copied.set()
        self._wait_for_removal()  # so that the disk never holds more than checkpoint.keep and this one
        with self._keeping_failure("bringing the ranks' parts together"):
            for entry, tensor in self._tensors():
                if not self._cancelled.is_set():
                    self._share.put(entry, tensor)
        self.result = self._share.finish()

    @contextmanager
    def _keeping_failure(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # any: whatever it is, it is raised on every rank in the end
            self._share.fail(f"{what}: {type(error).__name__}: {error}")

    def cancel(self) -> None:
        """Write nothing after the tensor that is being written."""
        self._cancelled.set()
        self.join()


@dataclass(frozen=True)
class _Save:
    """A checkpoint that has been begun."""

    work: Path
    path: Path
    config: RunConfig
    trainer: TrainerState | None
    attempt: Attempt | None
    writer: _Writer


class BackgroundSaver:
    """Saves of one rank, one at a time. The host memory is taken at the first and kept for the next.

    Args:
        group: of gloo, with all ranks, and used by nothing else; a lone process needs none.
        pin_memory: lock the pages of the host memory, for copies from a GPU.
    """

    def __init__(self, topology: Ranks, group: dist.ProcessGroup | None = None, *, pin_memory: bool = False) -> None:
        self._topology, self._group, self._pin_memory = topology, group, pin_memory
        self._memory: dict[StateEntry, Tensor] = {}
        self._save: _Save | None = None
        self._remover: threading.Thread | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint has been begun and not completed: the same on every rank."""
        return self._save is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._save is not None and self._save.writer.is_alive()

    def begin(
        self,
        path: Path,
        config: RunConfig,
        source: StateInParts,
        trainer: TrainerState | None,
        attempt: Attempt | None = None,
    ) -> None:
        """Start to copy the state and to write it. Collective; arguments and errors are those of ``save_distributed``.

        The one before must have been completed. The state must not change before ``wait_for_copies``.
        """
        if self._save is not None:
            raise ValueError(f"{self._save.path} has not been completed")
        work = working_directory(path, attempt)
        with removed_on_failure(work, self._topology):
            share = begin(work, path, source, self._topology)
            self._take_memory(source)
            # Read here: DeepSpeed's accessors are not made for two threads.
            parts = [(memory, source.part(entry)) for entry, memory in self._memory.items()]
            writer = _Writer(share, partial(_copy, parts), partial(self._tensors, source), self.wait_for_removal)
            self._save = _Save(work, path, config, trainer, attempt, writer)
            writer.start()

    def _tensors(self, source: StateInParts) -> Iterator[tuple[StateEntry, Tensor]]:
        """The tensors that this rank writes, in full, from all ranks' copies. Every rank has to come to its end.

        All sends are begun at once and each rank receives in the order in which it writes: none waits for a rank that
        waits for it, and ranks write at the same time.
        """
        rank, works = self._topology.rank, []
        for tag, entry in enumerate(source.entries):
            if entry in self._memory and entry.owner != rank:
                works.append(dist.isend(self._memory[entry], entry.owner, group=self._group, tag=tag))
        for tag, entry in enumerate(source.entries):
            if entry.owner == rank:
                yield entry, source.assemble(entry, self._receive(entry, source.holders(entry), tag))
        _finish(works)

    def _receive(self, entry: StateEntry, counts: Mapping[int, int], tag: int) -> dict[int, Tensor]:
        """All holders' copies of an entry, by rank."""
        mine = self._topology.rank
        parts = {r: self._memory[entry] if r == mine else torch.empty(count) for r, count in counts.items()}
        _finish([dist.irecv(part, r, group=self._group, tag=tag) for r, part in parts.items() if r != mine])
        return parts

    def wait_for_copies(self) -> None:
        """Return when the state may change. Not collective."""
        if self._save is not None:
            self._save.writer.has_copied.wait()

    def complete(self) -> Path:
        """Wait until every rank has written, and give the checkpoint its name. Collective.

        Raises:
            UserError, Superseded: as ``save_distributed``, on every rank.
            ValueError: none has been begun.
        """
        if self._save is None:
            raise ValueError("no save has been begun")
        save, self._save = self._save, None
        save.writer.join()
        if save.writer.result is None:
            raise RuntimeError(f"{save.path}: its writing thread has died")
        with removed_on_failure(save.work, self._topology):
            result, ranks = save.writer.result, self._topology
            complete(save.work, save.path, save.config, save.trainer, result, ranks, save.attempt)
        return save.path

    def prune(self, directory: Path, keep: int) -> None:
        """``store.prune``, but for the removal itself, which goes on beside training. Not collective."""
        self.wait_for_removal()
        self._remover = threading.Thread(target=_remove, args=(retire(directory, keep),), name="checkpoint-remover")
        self._remover.start()

    def wait_for_removal(self) -> None:
        """Return when nothing is being removed."""
        if self._remover is not None:
            self._remover.join()

    def cancel(self) -> None:
        """The run ends, or ends for another reason: stop writing, and drop what was begun. Not collective."""
        self.wait_for_removal()
        if self._save is None:
            return
        save, self._save = self._save, None
        save.writer.cancel()
        if self._topology.rank == 0:
            shutil.rmtree(save.work, ignore_errors=True)

    def _take_memory(self, source: StateInParts) -> None:
        """One piece for all that this rank holds. Here, not in the thread, which is on the first GPU unless it is told
        otherwise."""
        held = {entry: source.holders(entry).get(self._topology.rank, 0) for entry in source.entries}
        sizes = {entry: count for entry, count in held.items() if count}
        if {entry: len(piece) for entry, piece in self._memory.items()} == sizes:
            return
        whole = torch.empty(sum(sizes.values()), dtype=torch.float32)
        if self._pin_memory and len(whole):
            page_lock(whole)
        self._memory = dict(zip(sizes, whole.split(list(sizes.values())), strict=True))


def _finish(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:  # None: of a rank outside the group
            work.wait()


def _copy(parts: Sequence[tuple[Tensor, Tensor]]) -> None:
    for memory, part in parts:
        memory.copy_(part)


def page_lock(memory: Tensor) -> None:
    """Lock the pages of a tensor on the host, so that a GPU copies into them while the host goes on. torch's own
    page-locked memory comes in powers of two: 21 bytes a parameter at 152 M in place of 12."""
    runtime = torch.cuda.cudart()
    try:
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    except RuntimeError as error:
        LOG.warning(
            "cannot lock %.1f GB of host memory for asynchronous saves (%s); they take longer. See ulimit -l",
            memory.nbytes / 1e9,
            error,
        )


def _remove(directories: Sequence[Path]) -> None:
    """Said, not raised, where it fails: the run has its checkpoint, and the next publication tries again."""
    for directory in directories:
        try:
            shutil.rmtree(directory)
        except OSError as error:
            LOG.warning("cannot remove the old checkpoint %s: %s", directory, error)
