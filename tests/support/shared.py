"""What many tests read and none may change: made once for all workers, made whole, compared at the end."""

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


class Shared:
    """A folder of things by name; every pytest worker has one of these over the same folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._used: dict[str, str] = {}

    def get(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder ``name``; ``make`` fills it, in the worker that asks first, while the others wait.

        ``make`` fills it under this name, so that paths that it writes down stay true.
        """
        place = self.folder / name
        with self._locked(name):
            digest = self.folder / f"{name}.sha256"
            if not digest.exists():
                shutil.rmtree(place, ignore_errors=True)  # of a worker that failed here
                place.mkdir()
                make(place)
                digest.write_text(digest_of(place))
            self._used[name] = digest.read_text()
        return place

    def check(self) -> None:
        """Fail where a test has changed what others read."""
        changed = [name for name, digest in self._used.items() if digest_of(self.folder / name) != digest]
        assert not changed, f"changed by a test, which should have changed a copy: {', '.join(changed)}"

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def digest_of(folder: Path) -> str:
    """SHA-256 of the names and bytes of all files in a folder."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()
