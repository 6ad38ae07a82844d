"""A corpus without a network: the standard library's documentation topics, docstrings and sources.

One document a topic or module, in the order of their names. A document is held out by a hash of its name, so the split
is the same wherever the same Python is installed.
"""

import hashlib
import importlib
import json
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from megameta.errors import UserError
from megameta.files import write_text_atomically

#: Directories of the standard library that are not of it, or repeat what other modules say.
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "_bundled"}
#: The topics are documents of their own; as a source they would be in the corpus twice.
SKIPPED_FILES = {"pydoc_data/topics.py"}
#: Modules written in C: only their docstrings are text. Some exist on some systems only.
C_MODULES = (
    *("_collections", "_csv", "_datetime", "_decimal", "_functools", "_io", "_operator", "_random", "_socket"),
    *("_sqlite3", "_struct", "_thread", "_weakref", "array", "atexit", "binascii", "builtins", "cmath", "errno"),
    *("faulthandler", "fcntl", "gc", "itertools", "marshal", "math", "mmap", "posix", "pyexpat", "resource"),
    *("select", "sys", "termios", "time", "unicodedata", "zlib"),
)
HELD_OUT_PERCENT = 5
#: The codecs' tables are eighty times nearly the same text: one in so many is kept.
TABLES_KEPT_ONE_IN = 3


@dataclass(frozen=True)
class Document:
    """A topic, the docstrings of a C module, or the source of a module."""

    name: str
    text: str


@dataclass(frozen=True)
class CorpusSize:
    """What ``write_corpus`` wrote, by split."""

    documents: dict[str, int]
    bytes: dict[str, int]


def standard_library_documents(root: Path | None = None) -> Iterator[Document]:
    """All documents: topics, docstrings, then sources, each in the order of their names.

    Args:
        root: directory of the sources; default: this Python's standard library.
    """
    yield from topic_documents()
    yield from docstring_documents()
    yield from source_documents(root or Path(sysconfig.get_path("stdlib")))


def topic_documents() -> Iterator[Document]:
    """What ``help("topics")`` can show."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"topic/{name}", topics[name])


def docstring_documents() -> Iterator[Document]:
    """Docstrings of the modules that have no source in Python."""
    for name in C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # not on this system
        yield Document(f"docstrings/{name}", module_docstrings(module))


def module_docstrings(module: ModuleType) -> str:
    """A module's own docstring and those of its functions, classes and their methods, under their names."""
    parts = [f"{module.__name__}\n\n{module.__doc__ or ''}"]
    for name, value in sorted(vars(module).items()):
        if not callable(value) or not isinstance(value.__doc__, str):
            continue
        parts.append(f"{module.__name__}.{name}\n\n{value.__doc__}")
        if isinstance(value, type):
            parts += [
                f"{name}.{member}\n\n{entry.__doc__}"
                for member, entry in sorted(vars(value).items())
                if not member.startswith("_") and isinstance(entry.__doc__, str) and callable(entry)
            ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def source_documents(root: Path) -> Iterator[Document]:
    """Python sources below ``root``; files that do not decode (there are test data like that) are left out."""
    names = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(names):
        if name in SKIPPED_FILES or SKIPPED_DIRECTORIES & set(name.split("/")):
            continue
        try:
            with tokenize.open(names[name]) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        repeated = name.startswith("encodings/") and "charmap_decode" in text and _hash(name) % TABLES_KEPT_ONE_IN
        if text.strip() and not repeated:
            yield Document(f"source/{name}", text)


def is_held_out(name: str) -> bool:
    """Whether a document is for evaluation: a hash of its name, the same on every machine."""
    return _hash(name) % 100 < HELD_OUT_PERCENT


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def write_corpus(directory: Path, documents: Iterator[Document], max_bytes: int | None = None) -> CorpusSize:
    """Write train.jsonl and valid.jsonl, a document a line.

    Args:
        max_bytes: of training text; then stop. Held-out documents met until then are kept (for tests; None: all).

    Raises:
        UserError: one of the two would be empty.
    """
    lines: dict[str, list[str]] = {"train": [], "valid": []}
    size = {"train": 0, "valid": 0}
    for document in documents:
        split = "valid" if is_held_out(document.name) else "train"
        lines[split].append(json.dumps({"name": document.name, "text": document.text}, ensure_ascii=True))
        size[split] += len(document.text.encode())
        if max_bytes is not None and size["train"] >= max_bytes and size["valid"]:
            break
    directory.mkdir(parents=True, exist_ok=True)
    for split, content in lines.items():
        if not content:
            raise UserError(f"{directory}: no {split} documents; does this Python come with its standard library?")
        write_text_atomically(directory / f"{split}.jsonl", "\n".join(content) + "\n")
    return CorpusSize({split: len(content) for split, content in lines.items()}, size)
