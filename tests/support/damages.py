"""Random damage to the files of a checkpoint, each of which must be noticed and named. For ``torture.py``."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from megameta.checkpoint import open_checkpoint, write_checkpoint
from megameta.checkpoint.store import point_latest
from megameta.errors import UserError

#: Kinds and how often each is drawn.
KINDS = {"bit flip": 0.45, "truncation": 0.45, "deletion": 0.05, "appended bytes": 0.05}
#: What is appended, apart from random bytes: what editors and half-filled blocks leave.
APPENDED = (b"\n", b" ", b"\0", b"\0" * 512)


def damaged(data: bytes, kind: str, draw: random.Random) -> bytes | None:
    """The content of a file after damage; None where it is gone."""
    if kind == "deletion":
        return None
    if kind == "appended bytes":
        return data + draw.choice([*APPENDED, draw.randbytes(draw.randint(1, 64))])
    place = draw.randrange(len(data))
    if kind == "truncation":
        return data[:place]
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def rewritten_by_one_process(checkpoint: Path, path: Path) -> Path:
    """The same checkpoint as one process writes it, with one file a kind."""
    source = open_checkpoint(checkpoint)
    write_checkpoint(path, source.config, source.weights(), source.moments(), source.trainer())
    return path


def damage_many(
    checkpoint: Path, folder: Path, count: int, draw: random.Random, progress: Callable[[], None] = lambda: None
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Damage a copy ``count`` times, one file at a time; (how often by file and kind, what was not noticed or named).

    Half of the files are drawn evenly, half by size. The checkpoint is opened by its own name and by that of its run in
    turn. After each time the copy is whole again.
    """
    copy = folder / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, copy)
    point_latest(copy)
    contents = {path: path.read_bytes() for path in sorted(copy.iterdir())}
    sizes = [len(data) for data in contents.values()]
    done: Counter[tuple[str, str]] = Counter()
    problems = []
    open_checkpoint(folder)
    for number in range(count):
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        path = draw.choices(list(contents), sizes)[0] if draw.random() < 0.5 else draw.choice(list(contents))
        data = damaged(contents[path], kind, draw)
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        said = _opened(folder if number % 2 else copy)
        if not isinstance(said, UserError) or path.name not in str(said):
            problems.append(f"{kind} of {path.name} (number {number}): {type(said).__name__}: {said}")
        done[path.name, kind] += 1
        path.write_bytes(contents[path])
        progress()
    open_checkpoint(folder)
    return done, problems


def _opened(path: Path) -> object:
    """The error of opening, whichever it is; a checkpoint where there is none."""
    try:
        return open_checkpoint(path)
    except Exception as error:
        return error
