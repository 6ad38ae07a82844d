"""manifest.json: which files a checkpoint consists of, how large they are, what is in them.

    {"format": "megameta-checkpoint", "version": 2,
     "files": {NAME: {"bytes": N, "sha256": HEX}},     every file but this one
     "tensors": {"model": N, "optimizer": N},          how many tensors the files of each kind hold
     "sha256": HEX}                                    of this object without this field, as canonical JSON

Version 1 has neither ``tensors`` nor ``sha256``.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megameta.errors import UserError

FORMAT = "megameta-checkpoint"
VERSION = 2
TRAINER, CONFIG, MANIFEST = "trainer.json", "config.yaml", "manifest.json"
#: What tensor files begin with: weights, AdamW's moments.
KINDS = ("model", "optimizer")
SUFFIX = ".safetensors"
REMEDY = "use an older checkpoint of the run (write its name into checkpoints/latest) or copy this one again"


def tensor_file_name(kind: str, number: int, count: int) -> str:
    """Name of the ``number``-th (from 0) of ``count`` files of a kind."""
    return f"{kind}-{number + 1:05d}-of-{count:05d}{SUFFIX}"


@dataclass(frozen=True)
class Manifest:
    """The contents of a manifest.json."""

    files: dict[str, tuple[int, str]]
    """Bytes and SHA-256 by name."""
    tensors: dict[str, int] | None
    """Number of tensors by kind; None in version 1, which did not say."""

    def tensor_files(self, kind: str) -> list[str]:
        """The files of one kind, in order."""
        return sorted(name for name in self.files if kind_of(name) == kind)

    def render(self) -> str:
        """The text of the file."""
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        content["files"] = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()}
        content["tensors"] = self.tensors
        # no newline at the end: then every cut is one into the JSON
        return json.dumps({**content, "sha256": _digest(content)}, indent=1)


def kind_of(name: str) -> str | None:
    """Kind of a tensor file, None for other files."""
    kind = name.removesuffix(SUFFIX).partition("-")[0]
    return kind if name.endswith(SUFFIX) and kind in KINDS else None


def read_manifest(directory: Path) -> Manifest:
    """Read a manifest and check what it says against itself; the files it names are not touched.

    Raises:
        UserError: it is missing, damaged, of another version, or names no complete set of files.
    """
    path = directory / MANIFEST
    try:
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text)
        kind, version = content["format"], content["version"]
        if kind != FORMAT or version not in (1, VERSION):
            raise UserError(
                f"{path}: format {kind!r} version {version!r}; this program reads {FORMAT} versions 1 and {VERSION}:"
                f" install the version of megameta that wrote it, or {REMEDY}"
            )
        if version == VERSION and not text.endswith("}"):
            raise UserError(f"{path}: there are bytes after its end; {REMEDY}")
        if (version == VERSION or "sha256" in content) and content.pop("sha256") != _digest(content):
            raise UserError(f"{path}: its content is not what was written (SHA-256 differs); {REMEDY}")
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        tensors = {kind: int(content["tensors"][kind]) for kind in KINDS} if version == VERSION else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: missing or not readable ({type(error).__name__}: {error}); {REMEDY}") from error
    manifest = Manifest(files, tensors)
    if problem := _incomplete(manifest):
        raise UserError(f"{path}: {problem}; {REMEDY}")
    return manifest


def _incomplete(manifest: Manifest) -> str | None:
    for name in manifest.files:
        if Path(name).name != name:
            return f"names {name!r}, which is no plain file name"
    if CONFIG not in manifest.files:
        return f"does not list {CONFIG}"
    for kind in KINDS:
        names = manifest.tensor_files(kind)
        numbered = [tensor_file_name(kind, number, len(names)) for number in range(len(names))]
        if names != numbered and names != [kind + SUFFIX]:
            return f"lists {', '.join(names)}, which is not all of the {kind} files"
    if not manifest.tensor_files("model"):
        return f"lists no model*{SUFFIX}"
    return None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
