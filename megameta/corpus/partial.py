"""Work of ``preprocess`` that is not finished: PREFIX.partial/, from which the same command goes on.

command.json   what makes the output what it is: inputs, tokenizer, keys, flags
journal.json   how far the work is known to be on disk; replaced every few seconds, after the files were synced
N.bin, N.sizes, N.bounds, N.idx    the dataset of the Nth key (see growing.py)

Only what the journal names counts: whatever was written after it is cut off when work goes on, so the command may be
killed at any moment. The directory is locked while a command works in it.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megameta.corpus.growing import GrowingDataset, GrowingPaths, Lengths
from megameta.corpus.readers import Position
from megameta.errors import UserError
from megameta.files import sync, sync_file

FORMAT = 1


@dataclass
class Counts:
    """What has been done so far. Bytes: ``input_bytes`` as stored on disk, ``text_bytes`` as UTF-8 text."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: int = 0
    input_bytes: int = 0
    text_bytes: int = 0
    seconds: float = 0.0
    named_bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Journal:
    """How far the work is: all before ``position`` is in the first ``lengths`` of each key's files.

    ``publishing``: all is written, the .idx files too, and files may have got their final names already.
    """

    position: Position
    lengths: list[Lengths]
    counts: Counts
    publishing: bool = False


class PartialOutput:
    """The directory PREFIX.partial. Use ``locked`` around everything but ``publishing``."""

    def __init__(self, prefix: str, keys: Sequence[str]) -> None:
        self.directory = Path(prefix + ".partial")
        self._keys = keys

    def paths(self, number: int) -> GrowingPaths:
        return GrowingPaths.beside(str(self.directory / str(number)))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the directory and keep other commands out of it. The lock ends with the process, however it ends."""
        handle = self._lock()
        try:
            yield
        finally:
            os.close(handle)

    def _lock(self) -> int:
        while True:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                raise UserError(f"cannot write {self.directory}: {error.strerror}") from error
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(handle), os.stat(self.directory)):
                    return handle
            except BlockingIOError as error:
                os.close(handle)
                raise UserError(
                    f"another command is at work in {self.directory}: wait for it, or give another --output-prefix"
                ) from error
            except FileNotFoundError:  # the other command has just finished and removed it
                pass
            os.close(handle)

    def journal(self) -> Journal | None:
        """The last journal, or None where nothing was committed. Raises UserError for one that is damaged."""
        name = self.directory / "journal.json"
        if not name.exists():
            return None
        try:
            value = json.loads(name.read_text(encoding="utf-8"))
            lengths = [Lengths(**entry) for entry in value["lengths"]]
            return Journal(Position(**value["position"]), lengths, Counts(**value["counts"]), value["publishing"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{name} cannot be read: {error!r}. Throw the partial work away with --restart") from error

    def begin(self, command: dict[str, Any]) -> None:
        """Write down what this work is, before anything of it is committed."""
        self._write("command.json", command)

    def require_same(self, command: dict[str, Any]) -> None:
        """Raise UserError, naming the differences, unless the work here is that of ``command``."""
        name = self.directory / "command.json"
        try:
            then = json.loads(name.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read. Throw the partial work away with --restart") from error
        changes = describe_changes(then, command)
        if changes:
            raise UserError(
                f"{self.directory} holds unfinished work, since which has changed: {'; '.join(changes)}. Go back to "
                "what it was, or throw the unfinished work away with --restart"
            )

    def commit(self, journal: Journal) -> None:
        self._write("journal.json", asdict(journal))

    def _write(self, name: str, value: Any) -> None:
        temporary = self.directory / (name + ".tmp")
        with open(temporary, "wb") as file:
            file.write(json.dumps(value).encode())
            sync_file(file)
        os.replace(temporary, self.directory / name)
        sync(self.directory)

    def remove(self) -> None:
        """Throw the work away: the journal first, so that a kill meanwhile leaves nothing that counts."""
        for name in ("journal.json", "journal.json.tmp"):
            (self.directory / name).unlink(missing_ok=True)
        for entry in self.directory.iterdir():
            entry.unlink()

    def remove_directory(self) -> None:
        """Throw the work and the directory away."""
        self.remove()
        self.directory.rmdir()


def describe_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two commands' descriptions, in words."""
    changes = []
    if then.get("format") != now["format"]:
        changes.append("the program's version")
    old, new = ({entry[0]: entry[1:] for entry in command.get("inputs", [])} for command in (then, now))
    if list(old) != list(new):
        changes.append(f"the list of inputs ({len(old)} then, {len(new)} now)")
    for name in [name for name in new if name in old and old[name] != new[name]][:5]:
        what = f"{old[name][0]} bytes then, {new[name][0]} now" if old[name][0] != new[name][0] else "modified since"
        changes.append(f"{name} ({what})")
    words = {"hub": "--hf-dataset", "tokenizer": "the tokenizer", "keys": "--json-keys", "append_eod": "--append-eod"}
    return changes + [words[key] for key in words if then.get(key) != now[key]]


def describe_inputs(files: Sequence[str]) -> list[list[Any]]:
    """[absolute path, bytes, time of the last change in ns] of each input; of a directory, of all it holds."""
    result = []
    for name in files:
        parts = [part for part in Path(name).rglob("*") if part.is_file()] if os.path.isdir(name) else [Path(name)]
        stats = [part.stat() for part in parts]
        newest = max((stat.st_mtime_ns for stat in stats), default=0)
        result.append([os.path.abspath(name), sum(stat.st_size for stat in stats), newest])
    return result


class Committer:
    """Commits every ``interval`` seconds, in a thread, so that nobody waits for the disk. A context manager."""

    def __init__(self, partial: PartialOutput, datasets: Sequence[GrowingDataset], interval: float) -> None:
        self._partial, self._datasets, self._interval = partial, datasets, interval
        self._last = time.monotonic()
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def offer(self, position: Position, counts: Counts) -> None:
        """All up to ``position`` has been added to the datasets. Raises what an earlier commit raised."""
        if time.monotonic() - self._last < self._interval or (self._running and not self._running.done()):
            return
        self.wait()
        self._last = time.monotonic()
        self._running = self._thread.submit(self._commit, self._journal(position, counts, False))

    def finish(self, position: Position, counts: Counts) -> Journal:
        """The last commit, with the .idx files written; its journal."""
        self.wait()
        for dataset in self._datasets:
            dataset.write_index()
        journal = self._journal(position, counts, True)
        self._commit(journal)
        return journal

    def _journal(self, position: Position, counts: Counts, publishing: bool) -> Journal:
        for dataset in self._datasets:
            dataset.flush()
        lengths = [dataset.lengths for dataset in self._datasets]
        return Journal(position, lengths, Counts(**asdict(counts)), publishing)

    def _commit(self, journal: Journal) -> None:
        for dataset in self._datasets:
            dataset.sync()
        self._partial.commit(journal)

    def wait(self) -> None:
        if self._running is not None:
            self._running.result()

    def close(self) -> None:
        self._thread.shutdown(wait=True)
