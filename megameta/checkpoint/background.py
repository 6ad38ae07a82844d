"""Saving while training goes on: the tensors are copied, a thread of each rank writes them, and the main threads agree.

    begin            collective: the working directory; the thread starts, copies this rank's tensors to host memory and
                     writes them. Where ranks must come together for a tensor (ZeRO 1 to 3, tensor parallelism) the
                     main threads make the copies first.
    wait_for_copies  before weights and moments change again: a forward and a backward pass later, so that there is
                     seldom anything to wait for
    is_writing       whether this rank's thread is at work; the trainer asks all ranks, in a collective that it makes
                     anyway
    complete         collective: waits for the threads, then the small files and the name, as in a save without threads

On a GPU the thread's copies queue up with the training's kernels. Threads make no collective. Until ``complete`` the
checkpoint is a hidden working directory, so that a run that is killed in between goes on from the one before; what is
left is removed when the next checkpoint is published.
"""

import logging
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megameta.attempt import Attempt
from megameta.checkpoint.ranks import Ranks
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

Copies = list[tuple[StateEntry, Tensor]]


class _Writer(threading.Thread):
    """Writes this rank's share from copies, which ``copy`` makes or has made."""

    def __init__(self, share: Share, copy: Callable[[], Copies], wait_for_removal: Callable[[], None]) -> None:
        super().__init__(name="checkpoint-writer", daemon=True)
        self._share, self._copy, self._wait_for_removal = share, copy, wait_for_removal
        self._cancelled = threading.Event()
        self.has_copied = threading.Event()
        self.result: ShareResult | None = None

    def run(self) -> None:
        """Failures are kept by the share, and raised by ``complete`` on every rank."""
        copies: Copies = []
        try:
            copies = self._copy()
        except Exception as error:  # any: whatever it is, it is raised on every rank in the end
            self._share.fail(f"copying the state: {type(error).__name__}: {error}")
        finally:
            self.has_copied.set()
        self._wait_for_removal()  # so that the disk never holds more than checkpoint.keep and this one
        for entry, tensor in copies:
            if self._cancelled.is_set():
                break
            self._share.put(entry, tensor)
        self.result = self._share.finish()

    def cancel(self) -> None:
        """End after the tensor that is being written."""
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
    """Saves of one rank, one at a time. The host memory is taken at the first and kept for the next."""

    def __init__(self, topology: Ranks, *, pin_memory: bool = False) -> None:
        self._topology, self._pin_memory = topology, pin_memory
        self._memory: dict[tuple[str, str], Tensor] = {}
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
        source: StateSource,
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
            copy = partial(self._copy, source)
            if not source.is_local:
                copies = copy()
                copy = partial(list, copies)
            writer = _Writer(share, copy, self.wait_for_removal)
            self._save = _Save(work, path, config, trainer, attempt, writer)
            writer.start()

    def _copy(self, source: StateSource) -> Copies:
        gathered = [(entry, source.gather(entry, self._memory_of(entry))) for entry in source.entries]
        return [(entry, tensor) for entry, tensor in gathered if tensor is not None]

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

    def _take_memory(self, source: StateSource) -> None:
        """One piece for all tensors of this rank. Here, not in the thread, which is on the first GPU unless it is told
        otherwise."""
        own = [entry for entry in source.entries if entry.owner == self._topology.rank]
        if self._memory.keys() == {(entry.kind, entry.name) for entry in own}:
            return
        sizes = [math.prod(entry.shape) for entry in own]
        whole = torch.empty(sum(sizes), dtype=torch.float32)
        if self._pin_memory and len(whole):
            page_lock(whole)
        pieces = zip(own, whole.split(sizes), strict=True)
        self._memory = {(entry.kind, entry.name): piece.view(entry.shape) for entry, piece in pieces}

    def _memory_of(self, entry: StateEntry) -> Tensor | None:
        return self._memory[entry.kind, entry.name] if entry.owner == self._topology.rank else None


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
