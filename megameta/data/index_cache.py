"""Orders of large corpora on disk, so that a start takes a moment and the ranks of a node share memory.

An entry is a directory of .npy files and index.json with their checksums, under a name made of what it depends on. It
is written beside its place and renamed, so it is whole or absent; one that does not pass its checks is made again.
Ranks that start together on one file system wait for the first of them; where locks do not work, or each node has a
file system of its own, they make it several times over, each whole.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

LOG = logging.getLogger("megameta")
#: Of the contents: a change of how orders are made makes all entries stale.
VERSION = 1
#: Entries of an order from which on it is kept: fewer are made in the time that files take.
MIN_ENTRIES = 200_000
_INDEX = "index.json"

Arrays = dict[str, npt.NDArray[np.integer]]


def digest(array: npt.NDArray[np.generic], *parts: int | str) -> str:
    """A name for content: 16 hexadecimal digits of an array's bytes and of further values."""
    found = hashlib.blake2b(repr((VERSION, array.dtype.str, array.shape, *parts)).encode(), digest_size=8)
    found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()


class IndexCache:
    """Arrays by name and number in a directory, which may be shared by runs, ranks and nodes, and removed at any time.

    Args:
        directory: made when it is needed. Where it cannot be written nothing is kept, and a warning says so once.
    """

    def __init__(self, directory: str | os.PathLike[str], min_entries: int = MIN_ENTRIES) -> None:
        self.directory = Path(directory)
        self._min_entries = min_entries
        self._warned = False

    def pays(self, entries: int) -> bool:
        """Whether an order of so many entries is worth its files."""
        return entries >= self._min_entries

    def get(self, family: str, number: int, make: Callable[[], Arrays]) -> Arrays:
        """The arrays of entry ``number``, memory-mapped; from ``make`` where there are none, or damaged ones.

        Of a family only the last two numbers stay on disk.
        """
        place = self.directory / f"{family}-{number}"
        found = _load(place)
        if found is not None:
            return found
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with _lock(self.directory / f"{family}.lock"):
                found = _load(place)  # another process may have made it while this one waited
                if found is None:
                    LOG.info("making %s", place)
                    made = make()
                    _store(place, made)
                    self._forget(family, number - 2)
                    found = _load(place)
        except OSError as error:
            if not self._warned:
                LOG.warning("%s: the order of the data is not kept there: %s", self.directory, error)
            self._warned = True
        return found if found is not None else make()

    def _forget(self, family: str, last: int) -> None:
        for old in self.directory.glob(f"{family}-*"):
            end = old.name.removeprefix(f"{family}-")
            if end.isdigit() and int(end) <= last:
                shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file's lock. A process that dies lets go of it; where a file system has none, nobody waits."""
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            LOG.info("%s: no locks here (%s)", path, error)
        yield


def _store(place: Path, arrays: Arrays) -> None:
    temporary = place.with_name(f"{place.name}.tmp-{os.uname().nodename}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        sums: dict[str, list[int]] = {}
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
            sums[name] = [len(array), zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)]
        (temporary / _INDEX).write_text(json.dumps({"version": VERSION, "arrays": sums}) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if place.exists():  # and did not pass its checks, or another node was first
            shutil.rmtree(place, ignore_errors=True)
        try:
            os.rename(temporary, place)
        except OSError:
            if _load(place) is None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(place: Path) -> Arrays | None:
    """The arrays of an entry, or None where it is absent or not as it was written."""
    try:
        index = json.loads((place / _INDEX).read_text(encoding="utf-8"))
        found: Arrays = {}
        for name, (length, checksum) in index["arrays"].items():
            array = np.asarray(np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            if len(array) != length or zlib.crc32(array.view(np.uint8).data) != checksum:
                raise ValueError(f"{name}.npy is not as it was written")
            found[name] = array
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        LOG.warning("%s: damaged (%s); it is made again", place, error)
        return None
    return found
