"""Say what is in a corpus: sizes, quality, duplicates, contamination, secrets; --filter writes a cleaned one."""

import argparse
import json
import os
import resource
import signal
import sys
from pathlib import Path
from types import FrameType

from megameta.corpus.audit.inputs import resolve
from megameta.corpus.audit.manifest import verify_manifest
from megameta.corpus.audit.options import CLEAN_FORMATS, DEFAULT_DROPS, DROPS, AuditOptions, load_rules
from megameta.corpus.audit.run import Outcome, audit
from megameta.corpus.preprocess_report import ProgressDisplay, rates
from megameta.corpus.readers import total_bytes
from megameta.errors import UserError, run_tool
from megameta.log import duration

EXAMPLE = """\
examples:
  python tools/audit_corpus.py --input corpus.jsonl --tokenizer gpt2/ --output audit

  python tools/audit_corpus.py --source web='web/*.jsonl.zst' --source books='books/*.parquet' --tokenizer gpt2/ \\
      --against lambada=lambada.jsonl --output audit --filter --clean-format jsonl.zst --workers 8

  python tools/audit_corpus.py --verify audit/manifest.json

Writes report.html, report.json, manifest.json and timing.json into the output directory; with --against
contamination.jsonl, with --filter clean/ and ledger.jsonl. See docs/audit.md.
"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument_group("text").add_argument
    kinds = ".jsonl, .json, .txt (also .gz, .zst), .parquet, .arrow, a saved HuggingFace dataset, a .bin/.idx prefix"
    add("--input", nargs="+", default=[], metavar="FILE", help=f"{kinds}; globs; each file's name names its source")
    add("--source", action="append", default=[], metavar="NAME=GLOB", help="the same, all of one source; repeatable")
    add("--json-key", default="text", metavar="KEY", help="the key with the text (text)")
    add("--tokenizer", metavar="PATH", help="count tokens with it; needed for .bin/.idx")
    add(
        "--on-error", choices=("stop", "skip"), default="stop", help="at a bad document: stop, or skip and count (stop)"
    )
    add = result.add_argument_group("checks").add_argument
    add("--against", action="append", default=[], metavar="NAME=GLOB", help="an evaluation set to look for; repeatable")
    add("--against-keys", nargs="+", default=[], metavar="KEY", help="keys of its text, joined (that of --json-key)")
    add(
        "--blocklist",
        nargs="+",
        default=[],
        metavar="FILE",
        help="words, phrases, domains that are forbidden, one a line",
    )
    add("--hook", metavar="MODULE:FUNCTION", help="called with (text, document); returns None or a reason to drop it")
    add("--config", metavar="FILE", help="a YAML file of thresholds, RULE: VALUE; null switches a rule off")
    add("--rule", action="append", default=[], metavar="NAME=VALUE", help="one threshold, as min_words=20; repeatable")
    add("--no-languages", action="store_true", help="do not tell languages")
    add("--seed", type=int, default=1, metavar="N", help="of the MinHash permutations (1)")
    add = result.add_argument_group("output").add_argument
    add("--output", metavar="DIR", help="a new directory")
    add("--overwrite", action="store_true", help="replace an earlier audit in DIR")
    add("--filter", action="store_true", help="write DIR/clean/ and DIR/ledger.jsonl")
    default = ",".join(DEFAULT_DROPS)
    add("--drop", default=default, metavar="NAMES", help=f"what --filter drops ({default}); also: personal")
    add("--clean-format", choices=CLEAN_FORMATS, default="jsonl", help="of the cleaned corpus (jsonl)")
    add("--shard-mb", type=int, default=0, metavar="N", help="megabytes of text in one of its files (0: no limit)")
    add = result.add_argument_group("running").add_argument
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that examine (one a core)")
    add("--log-interval", type=int, default=10_000, metavar="N", help="documents between log lines (10000)")
    add("--verify", metavar="MANIFEST", help="only check that the files of a manifest.json are still the same")
    return result


def options_from(args: argparse.Namespace) -> AuditOptions:
    if not args.output:
        raise UserError("name a directory for the report: --output DIR")
    if args.workers < 1 or args.log_interval < 1:
        raise UserError("--workers and --log-interval are 1 or more")
    if args.shard_mb < 0 or not 0 <= args.seed < 1 << 63:
        raise UserError("--shard-mb and --seed are 0 or more")
    drop = tuple(name for name in args.drop.split(",") if name)
    unknown = [name for name in drop if name not in DROPS]
    if unknown:
        raise UserError(f"--drop {args.drop}: {unknown[0]} is none of {', '.join(DROPS)}")
    return AuditOptions(
        output=args.output.rstrip("/") or args.output,
        inputs=args.input,
        sources=args.source,
        against=args.against,
        against_keys=args.against_keys,
        json_key=args.json_key,
        tokenizer=args.tokenizer,
        rules=load_rules(args.config, args.rule),
        blocklists=args.blocklist,
        hook=args.hook,
        find_languages=not args.no_languages,
        filter=args.filter,
        drop=drop,
        clean_format=args.clean_format,
        shard_mb=args.shard_mb,
        workers=args.workers,
        on_error=args.on_error,
        overwrite=args.overwrite,
        seed=args.seed,
    )


def verify(name: str) -> None:
    wrong = verify_manifest(name)
    for line in wrong:
        print(line)
    if wrong:
        raise UserError(f"{len(wrong)} files are not what {name} says")
    print(f"every file is as {name} says")


def summary(options: AuditOptions, outcome: Outcome) -> str:
    """The last words: what was found, where it is, what to do next."""
    found, counts = outcome.report, outcome.counts
    copies = found["duplicates"]["near"]["copies"]
    lines = [
        f"{counts.documents:,} documents in {duration(sum(outcome.seconds.values()))} ({rates(counts)})",
        f"{copies:,} copies, {found['documents_with']['secrets']:,} documents with secrets, {counts.bad:,} unreadable, "
        f"{counts.empty:,} empty",
    ]
    if found["contamination"]:
        for name, entry in found["contamination"]["sets"].items():
            lines.append(f"{name}: {entry['contaminated']:,} of {entry['examples']:,} examples are contaminated")
    if found["filter"]:
        lines.append(f"{found['filter']['kept']:,} documents kept, {found['filter']['dropped']:,} dropped")
    lines.append(f"read {options.output}/report.html")
    if outcome.clean:
        inputs = f"'{options.output}/clean/*.{options.clean_format}'"
        tokenizer = options.tokenizer or "TOKENIZER"
        key = "" if options.json_key == "text" else f" --json-keys {options.json_key}"
        lines.append(
            f"next: python tools/preprocess_data.py --input {inputs} --output-prefix PREFIX --tokenizer {tokenizer}"
            f"{key} --append-eod"
        )
    elif not options.filter and not any(name.endswith((".bin", ".idx")) for name in options.inputs):
        lines.append("next: the same command with --filter and another --output writes a cleaned corpus")
    return "\n".join(lines)


def write_timing(options: AuditOptions, outcome: Outcome) -> None:
    """timing.json, apart from the report, which is the same every time."""
    memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    total = sum(outcome.seconds.values())
    value = {
        "workers": options.workers,
        "seconds": {name: round(seconds, 3) for name, seconds in outcome.seconds.items()},
        "megabytes_per_second": round(outcome.counts.text_bytes / 1e6 / total, 3),
        "largest_process_megabytes": round(memory / 1024, 1),
    }
    name = Path(options.output) / "timing.json"
    temporary = name.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, name)


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # an exception, so that workers end and nothing is left behind


def main() -> None:
    args = parser().parse_args()
    if args.verify:
        verify(args.verify)
        return
    signal.signal(signal.SIGTERM, _terminate)
    options = options_from(args)
    files = [part for file in resolve(options.inputs, options.sources) for part in file.parts()]
    with ProgressDisplay(total_bytes(files), args.log_interval, "auditing") as display:
        outcome = audit(options, display.update, display.say)
    write_timing(options, outcome)
    print(summary(options, outcome))


if __name__ == "__main__":
    run_tool(main)
