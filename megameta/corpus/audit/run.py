"""An audit from start to end: read, examine in several processes, compare, filter, report, publish."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megameta.corpus.audit.audited import Audited
from megameta.corpus.audit.clean import write_clean
from megameta.corpus.audit.contamination import index_file, read_examples
from megameta.corpus.audit.decide import Decision, decide
from megameta.corpus.audit.duplicates import SketchStore, find_duplicates
from megameta.corpus.audit.examine import Examiner, Findings, start_worker
from megameta.corpus.audit.html import render
from megameta.corpus.audit.inputs import InputFile, read_source_blocks, resolve
from megameta.corpus.audit.manifest import manifest
from megameta.corpus.audit.options import AuditOptions
from megameta.corpus.audit.records import BIT, RECORD, GrowingArray
from megameta.corpus.audit.report import contamination_lines, report
from megameta.corpus.partial import Counts
from megameta.corpus.worker_pool import WorkerPool
from megameta.errors import UserError

#: Bad documents that the report names one by one.
NAMED_BAD_DOCUMENTS = 20


@dataclass(frozen=True)
class Outcome:
    """``report``: what report.json holds; ``seconds`` by stage; ``clean``: files of the cleaned corpus."""

    report: dict[str, Any]
    counts: Counts
    seconds: dict[str, float]
    clean: list[str]


def audit(
    options: AuditOptions,
    on_progress: Callable[[Counts], None] = lambda counts: None,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Audit ``options.inputs`` and ``sources`` and write ``options.output``, whole or not at all.

    Raises UserError for what the command cannot do: unknown inputs, existing output (without ``overwrite``), a bad
    document (unless ``on_error`` is "skip"), a file that changes meanwhile, a worker that dies.
    """
    files = _checked(options)
    stamps = [file.stamp() for file in files]
    with _output(options) as directory:
        work = directory / "work"
        work.mkdir()
        started = time.monotonic()
        audited, examiner, ngram_file = _prepare(options, files, work)
        seconds: dict[str, float] = {}
        sketches = SketchStore(str(work))
        _examine(options, examiner, ngram_file, audited, work, sketches, on_progress)
        seconds["examine"] = time.monotonic() - started
        say("comparing documents")
        audited.duplicates = find_duplicates(audited.records, sketches, options.rules.near_jaccard)
        sketches.close()
        seconds["duplicates"] = time.monotonic() - started - sum(seconds.values())
        decision = decide(audited.records, audited.duplicates, options.drop) if options.filter else None
        clean: list[dict[str, Any]] = []
        if decision is not None:
            say("writing the cleaned corpus")
            clean = write_clean(audited, decision, options, directory)
            seconds["filter"] = time.monotonic() - started - sum(seconds.values())
        found = _write(options, audited, decision, clean, directory)
        _require_unchanged(files, stamps)
        seconds["report"] = time.monotonic() - started - sum(seconds.values())
        audited.records = None
        shutil.rmtree(work)
    return Outcome(found, audited.counts, seconds, [os.path.join(options.output, entry["path"]) for entry in clean])


def _checked(options: AuditOptions) -> list[InputFile]:
    """The input files, where the options make sense together."""
    if not options.inputs and not options.sources:
        raise UserError("name the text: --input FILE... or --source NAME=GLOB")
    files = resolve(options.inputs, options.sources)
    tokenised = next((file for file in files if file.tokenised), None)
    if tokenised and not options.tokenizer:
        raise UserError(f"{tokenised.path} is tokenised: give the tokenizer it was made with, --tokenizer DIR")
    if tokenised and options.filter:
        raise UserError(
            f"--filter writes text, and {tokenised.path} is tokenised: filter the text it was made from and run "
            "tools/preprocess_data.py on the result"
        )
    if len({file.source for file in files}) > 65535:
        raise UserError("more than 65,535 sources: group files with --source NAME=GLOB")
    return files


def _prepare(options: AuditOptions, files: list[InputFile], work: Path) -> tuple[Audited, Examiner, str | None]:
    """Read the evaluation sets and set up an examiner, which finds what is wrong before any process starts."""
    examples, index, ngram_file = None, None, None
    if options.against:
        examples, index = read_examples(options.against, options.against_keys or [options.json_key])
        ngram_file = index_file(str(work))
        index.save(ngram_file)
    examiner = Examiner(options, ngram_file)
    digest = examiner.tokenizer.digest() if examiner.tokenizer else None
    sources = list(dict.fromkeys(file.source for file in files))
    audited = Audited(files, sources, examiner.language_names, digest, examples, index, work / "notes.jsonl")
    return audited, examiner, ngram_file


def _require_unchanged(files: list[InputFile], stamps: list[Any]) -> None:
    for file, stamp in zip(files, stamps):
        try:
            same = file.stamp() == stamp
        except OSError:
            same = False
        if not same:
            raise UserError(f"{file.path} changed while it was read; let nothing write to it and start again")


def _write(
    options: AuditOptions, audited: Audited, decision: Decision | None, clean: list[dict[str, Any]], directory: Path
) -> dict[str, Any]:
    found = report(options, audited, decision)
    _write_json(directory / "report.json", found)
    (directory / "report.html").write_text(render(found), encoding="utf-8")
    if audited.examples is not None:
        with open(directory / "contamination.jsonl", "w", encoding="utf-8") as file:
            file.writelines(
                json.dumps(line, ensure_ascii=True) + "\n" for line in contamination_lines(options, audited)
            )
    _write_json(directory / "manifest.json", manifest(options, audited, clean, directory))
    return found


def _write_json(name: Path, value: Any) -> None:
    name.write_text(json.dumps(value, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


def _examine(
    options: AuditOptions,
    examiner: Examiner,
    ngram_file: str | None,
    audited: Audited,
    work: Path,
    sketches: SketchStore,
    on_progress: Callable[[Counts], None],
) -> None:
    """Examine all blocks and keep what they hold: records and sketches on disk, the rest in ``audited``."""
    columns = None if options.hook else [options.json_key]  # a hook is given the whole document
    blocks = read_source_blocks(audited.files, columns)
    sets = len(audited.examples.names) if audited.examples else 0
    audited.touched = np.zeros((sets, len(audited.sources)), dtype=np.int64)
    audited.seen_G = np.zeros(audited.index.num_ngrams if audited.index else 0, dtype=np.bool_)
    records = GrowingArray(str(work / "records"), RECORD)
    started = time.monotonic()
    results: Any = map(examiner.examine, blocks)
    if options.workers > 1:
        results = WorkerPool(options.workers, start_worker, (options, ngram_file)).map(blocks)
    with open(audited.notes, "w", encoding="utf-8") as notes:
        try:
            for findings in results:
                _take(options, audited, findings, records, notes)
                sketches.add(findings.signatures_S)
                audited.counts.seconds = time.monotonic() - started
                on_progress(audited.counts)
        finally:
            if options.workers > 1:
                results.close()
    audited.records = records.array()
    if not audited.counts.documents:
        raise UserError("no documents in the input: nothing is written")


def _take(options: AuditOptions, audited: Audited, findings: Findings, records: GrowingArray, notes: Any) -> None:
    found, counts = findings.records_D, audited.counts
    source = audited.sources.index(audited.files[findings.file].source)
    if not audited.labels or audited.labels[-1] != findings.label:
        audited.labels.append(findings.label)
    found["file"], found["source"], found["label"] = findings.file, source, len(audited.labels) - 1
    for bad in findings.bad:
        text = f"{bad.location}: {bad.reason}"
        if options.on_error != "skip":
            raise UserError(f"{text}. Mend it, or skip such documents with --on-error skip")
        if len(audited.bad_named) < NAMED_BAD_DOCUMENTS:
            audited.bad_named.append(text)
    for place, note in findings.notes:
        notes.write(json.dumps([records.rows + place, note]) + "\n")
    if audited.index is not None and audited.examples is not None:
        for _, numbers in findings.shared:
            audited.seen_G[numbers] = True  # type: ignore[index]
            touched = np.unique(audited.examples.set_of[audited.index.examples_of(numbers)])
            audited.touched[touched, source] += 1  # type: ignore[index]
    records.add(found)
    counts.bad += len(findings.bad)
    counts.documents += len(found) - len(findings.bad)
    counts.empty += int(np.count_nonzero((found["bytes"] == 0) & (found["reasons"] & BIT["bad"] == 0)))
    counts.text_bytes += int(found["bytes"].sum())
    counts.tokens += int(found["tokens"].sum())
    counts.input_bytes += findings.input_bytes


@contextmanager
def _output(options: AuditOptions) -> Iterator[Path]:
    """A directory beside the output that takes its name when the block ends well and vanishes when it does not."""
    final = Path(options.output)
    _refuse_existing(final, options.overwrite)
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(final)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {temporary}: {error.strerror}") from error
    try:
        yield temporary
        _refuse_existing(final, options.overwrite)
        old = final.with_name(f"{final.name}.old-{os.getpid()}")
        if final.exists():
            os.replace(final, old)
        os.replace(temporary, final)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write {final}: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _refuse_existing(final: Path, overwrite: bool) -> None:
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{final} is already there: give another --output, or --overwrite to replace it")
    if not (final / "report.json").is_file():
        raise UserError(f"{final} holds no report.json, so --overwrite leaves it alone: give another --output")


def _remove_abandoned(final: Path) -> None:
    """Directories of commands that were killed."""
    for entry in final.parent.glob(f"{final.name}.tmp-*"):
        number = entry.name.rpartition("-")[2]
        if number.isdigit():
            try:
                os.kill(int(number), 0)  # only asks whether there is such a process
            except ProcessLookupError:
                shutil.rmtree(entry, ignore_errors=True)
            except PermissionError:
                continue
