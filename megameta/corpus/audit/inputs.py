"""Which files an audit reads, to which source each belongs, and their blocks.

A source is a part of the corpus with a name. ``--source NAME=GLOB`` gives it; a file of ``--input`` belongs to the
source of its own name, without its directory, its extensions and the number of a shard: novels-00.jsonl.gz to
"novels". Where files of one such name lie in two directories, the last directory comes before it: en.part, de.part.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megameta.corpus.readers import Block, Position, expand_inputs, read_blocks
from megameta.data.indexed import IndexedDataset, dataset_exists, dataset_prefix
from megameta.errors import UserError

_EXTENSIONS = re.compile(r"(\.(jsonl|json|txt|parquet|arrow|gz|zst|bin|idx))+$")
_SHARD = re.compile(r"(?<=.)[-_.]?\d+([-_]of[-_]\d+)?$")
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}")
#: Tokens in a block of a tokenised dataset.
_BLOCK_TOKENS = 1 << 18


@dataclass(frozen=True)
class InputFile:
    """A file, a saved dataset's directory, or the prefix of a tokenised dataset; and the source it belongs to."""

    path: str
    source: str
    tokenised: bool = False

    def parts(self) -> list[str]:
        """The files on disk, sorted."""
        if self.tokenised:
            return [self.path + ".bin", self.path + ".idx"]
        if os.path.isdir(self.path):
            found = (os.path.join(at, name) for at, _, names in os.walk(self.path) for name in names)
            return sorted(found)
        return [self.path]

    def stamp(self) -> list[tuple[int, int]]:
        """Bytes and time of the last change of each part, to notice a change while it is read."""
        return [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, self.parts())]


def resolve(inputs: Sequence[str], sources: Sequence[str]) -> list[InputFile]:
    """All input files, those of one source together, sources in the order of their first file.

    Raises UserError for names that match nothing, files named twice, sources named twice or by an unfit name.
    """
    files = _named_by_file([entry for pattern in inputs for entry in _expand(pattern)])
    automatic = {file.source for file in files}
    named: set[str] = set()
    for name, pattern in split_named(sources, "--source"):
        if name in named or name in automatic:
            raise UserError(
                f"the source {name} is there twice; give each --source a name of its own, or one glob for both"
            )
        named.add(name)
        files += [InputFile(path, name, tokenised) for path, tokenised in _expand(pattern)]
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file.path)
        if real in seen:
            raise UserError(f"{file.path} is named twice: by --input or --source; all of it would be a duplicate")
        seen.add(real)
    order = list(dict.fromkeys(file.source for file in files))
    return sorted(files, key=lambda file: order.index(file.source))


def split_named(values: Sequence[str], flag: str) -> list[tuple[str, str]]:
    """(NAME, GLOB) of each "NAME=GLOB"."""
    result = []
    for value in values:
        name, equals, pattern = value.partition("=")
        if not equals or not pattern or not _NAME.fullmatch(name):
            raise UserError(
                f"{flag} {value}: expected NAME=GLOB, the name of letters, digits, '.', '_', '+' and '-', "
                f"as in {flag} web='web/*.jsonl.gz'"
            )
        result.append((name, pattern))
    return result


def _expand(pattern: str) -> list[tuple[str, bool]]:
    """(path, whether it is a tokenised dataset) of what a path or glob names."""
    if dataset_exists(pattern):
        return [(dataset_prefix(pattern), True)]
    if os.path.exists(pattern) and not pattern.endswith((".bin", ".idx")):
        return [(path, False) for path in expand_inputs([pattern])]
    matches = sorted(glob.glob(pattern, recursive=True)) or ([pattern] if os.path.exists(pattern) else [])
    datasets = list(dict.fromkeys(dataset_prefix(name) for name in matches if name.endswith((".bin", ".idx"))))
    others = [name for name in matches if not name.endswith((".bin", ".idx"))]
    if not matches:
        raise UserError(f"no input matches {pattern}")
    for prefix in datasets:
        if not dataset_exists(prefix):
            raise UserError(f"{prefix}: a tokenised dataset is a pair of .bin and .idx, and one of them is missing")
    return [*((path, False) for path in expand_inputs(others)), *((prefix, True) for prefix in datasets)]


def _named_by_file(entries: list[tuple[str, bool]]) -> list[InputFile]:
    """Sources after the files' names; see the head of this file."""
    plain = [_plain_name(path) for path, _ in entries]
    folders: dict[str, set[str]] = {}
    for name, (path, _) in zip(plain, entries):
        folders.setdefault(name, set()).add(os.path.dirname(os.path.abspath(path)))
    result: list[InputFile] = []
    folder_of: dict[str, str] = {}
    for name, (path, tokenised) in zip(plain, entries):
        folder = os.path.dirname(os.path.abspath(path))
        if len(folders[name]) > 1:
            name = _clean(os.path.basename(folder) or "root") + "." + name
        if folder_of.setdefault(name, folder) != folder:
            raise UserError(
                f"{path} and files of {folder_of[name]} would both be the source {name}: use --source NAME=GLOB"
            )
        result.append(InputFile(path, name, tokenised))
    return result


def _plain_name(path: str) -> str:
    base = _EXTENSIONS.sub("", os.path.basename(os.path.normpath(path)))
    return _clean(_SHARD.sub("", base) or base)


def _clean(name: str) -> str:
    """A name that _NAME takes, and that is safe as the name of a file."""
    return (re.sub(r"[^A-Za-z0-9_.+-]", "_", name).lstrip("._+-") or "source")[:80]


def read_source_blocks(files: Sequence[InputFile], columns: Sequence[str] | None) -> Iterator[Block]:
    """Blocks of all files, in order; ``block.end.file`` is the number of the file in ``files``."""
    for number, file in enumerate(files):
        blocks = _token_blocks(file.path) if file.tokenised else read_blocks([file.path], columns)
        for block in blocks:
            yield replace(block, end=Position(number, block.end.items, block.end.offset))


def _token_blocks(prefix: str) -> Iterator[Block]:
    """Blocks of kind "tokens": each item is a document's ids, int64[tokens]."""
    dataset = IndexedDataset(prefix)
    lengths = dataset.document_lengths
    items: list[object] = []
    size, first = 0, 0
    for number in range(dataset.num_documents):
        items.append(dataset.document(number))
        size += int(lengths[number])
        if size >= _BLOCK_TOKENS or len(items) >= 4096 or number == dataset.num_documents - 1:
            yield Block(prefix, first + 1, items, size * dataset.dtype.itemsize, "tokens", Position(0, number + 1))
            items, size, first = [], 0, number + 1
