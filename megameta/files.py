"""Files and directories that appear whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a small file, whole or not at all."""
    work = path.with_name(f".{path.name}.writing")
    write_synced(work, text)
    work.replace(path)
    sync(path.parent)


def write_synced(path: Path, text: str) -> tuple[int, str]:
    """Write a small file through to the disk; (its bytes, SHA-256 in hexadecimal)."""
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        sync_file(file)
    return len(data), hashlib.sha256(data).hexdigest()


def replace_directory(work: Path, path: Path) -> None:
    """Give a finished directory its name; one that has the name already is kept until the other is in its place.

    A directory cannot be renamed over one that is not empty, so that for a moment, in a process that is killed then,
    there is none of that name and the former one is ``.NAME.old``.
    """
    if not path.exists():
        work.rename(path)
        sync(path.parent)
        return
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    try:
        work.rename(path)
    except BaseException:
        old.rename(path)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)  # prune removes what is left


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside ``path`` that takes its name when the block ends well, in place of what is there
    (callers refuse that where they must), and vanishes otherwise. What a killed process left goes with the next."""
    work = path.with_name(f".{path.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        replace_directory(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(file: IO[bytes]) -> None:
    """Bring what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Bring a directory's entries, or a file, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
