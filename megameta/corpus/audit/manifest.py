"""What exactly was audited: files with their hashes, the whole corpus, and a check that they are still the same."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megameta import __version__
from megameta.corpus.audit.audited import Audited
from megameta.corpus.audit.options import AuditOptions
from megameta.corpus.audit.records import BIT, CHUNK
from megameta.errors import UserError

SCHEMA = "megameta.audit.manifest/1"
#: Options that say how the work is done or where its result goes, not what it is.
_NOT_THE_WORK = ("workers", "output", "overwrite")


def sha256(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def manifest(options: AuditOptions, audited: Audited, clean: list[dict[str, Any]], directory: Path) -> dict[str, Any]:
    """The manifest of an audit. ``corpus_hash`` is the sha256 of all documents' text hashes in order: it depends on
    the texts alone, not on files or compression. Paths are as given, relative to ``directory``."""
    documents, bad, corpus = _count(audited)
    values = {name: getattr(options, name) for name in options.__dataclass_fields__ if name not in _NOT_THE_WORK}
    values["rules"] = {name: getattr(options.rules, name) for name in options.rules.__dataclass_fields__}
    inputs = [
        {
            "path": file.path,
            "source": file.source,
            "tokenised": file.tokenised,
            "documents": documents[number],
            "bad_documents": bad[number],
            "files": [{"path": part, "bytes": os.path.getsize(part), "sha256": sha256(part)} for part in file.parts()],
        }
        for number, file in enumerate(audited.files)
    ]
    return {
        "schema": SCHEMA,
        "megameta": __version__,
        "directory": os.getcwd(),
        "corpus_hash": corpus,
        "tokenizer_hash": audited.tokenizer_digest,
        "options": values,
        "inputs": inputs,
        "clean": clean,
        "report_sha256": sha256(str(directory / "report.json")),
    }


def _count(audited: Audited) -> tuple[list[int], list[int], str]:
    documents, bad = [0] * len(audited.files), [0] * len(audited.files)
    corpus = hashlib.sha256()
    for start in range(0, len(audited.records), CHUNK):
        part = audited.records[start : start + CHUNK]
        readable = (part["reasons"] & BIT["bad"]) == 0
        corpus.update(part["exact"][readable].astype("<u8").tobytes())
        for counts, chosen in ((documents, readable), (bad, ~readable)):
            files = part["file"][chosen]
            for number in set(files.tolist()):
                counts[number] += int((files == number).sum())
    return documents, bad, corpus.hexdigest()


def verify_manifest(path: str) -> list[str]:
    """What is no longer as the manifest says, a line each; none where every file has its hash.

    Input files are looked for where the command was run, then from the current directory; the cleaned corpus beside
    the manifest. Raises UserError for what is no manifest.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            raise UserError(f"{path}: made by another version ({value['schema']}; this one reads {SCHEMA})")
        inputs = [(entry, value["directory"]) for source in value["inputs"] for entry in source["files"]]
        clean = [(entry, os.path.dirname(os.path.abspath(path))) for entry in value["clean"]]
        checks = [(str(entry["path"]), int(entry["bytes"]), str(entry["sha256"]), at) for entry, at in inputs + clean]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no manifest of tools/audit_corpus.py: {error!r}") from error
    wrong = []
    for name, size, expected, at in checks:
        file = os.path.join(at, name)
        file = file if os.path.exists(file) else name
        if not os.path.isfile(file):
            wrong.append(f"{name} is gone")
        elif os.path.getsize(file) != size:
            wrong.append(f"{name} changed: {os.path.getsize(file):,} bytes, was {size:,}")
        elif sha256(file) != expected:
            wrong.append(f"{name} changed: its sha256 is another")
    return wrong
