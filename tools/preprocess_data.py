"""Tokenise text files into Megatron's .bin/.idx; takes the flags of Megatron-LM's tool of this name."""

import argparse
import os
import signal
import sys
from types import FrameType

from megameta.corpus.hub_reader import HubDataset
from megameta.corpus.preprocess import PreprocessOptions, TokenizerChoice, preprocess
from megameta.corpus.preprocess_report import ProgressDisplay, summary
from megameta.corpus.readers import expand_inputs, total_bytes
from megameta.errors import UserError, run_tool

TYPES = ("GPT2BPETokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "HuggingFaceTokenizer")
EXAMPLE = """\
examples:
  python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus --tokenizer gpt2/ --append-eod

  python tools/preprocess_data.py --input 'shards/*.jsonl.zst' --output-prefix corpus --json-keys text \\
      --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --append-eod --workers 8

Both write corpus_text_document.bin and corpus_text_document.idx.
"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument_group("text").add_argument
    add(
        "--input",
        nargs="+",
        default=[],
        metavar="FILE",
        help=".jsonl, .json, .txt (also .gz, .zst), .parquet, .arrow, a saved HuggingFace dataset, a directory of "
        "such files; several, and globs",
    )
    add("--input-list", metavar="FILE", help="a file that names inputs, one a line, after those of --input")
    add("--hf-dataset", metavar="NAME", help="in place of --input: a dataset of the HuggingFace hub, streamed")
    add("--hf-split", default="train", metavar="SPLIT", help="its split (train)")
    add("--hf-config", metavar="NAME", help="its configuration, where it has several")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys to tokenise, a dataset each (text)")
    add(
        "--on-error", choices=("stop", "skip"), default="stop", help="at a bad document: stop, or skip and count (stop)"
    )
    add = result.add_argument_group("tokenizer").add_argument
    add("--tokenizer", metavar="PATH", help="a tokenizer directory, tokenizer.json or sentencepiece .model")
    add("--tokenizer-type", choices=TYPES, help="Megatron's name of the tokenizer, with the flags below")
    add("--vocab-file", metavar="FILE", help="GPT2BPETokenizer: vocab.json or encoder.json")
    add("--merge-file", metavar="FILE", help="GPT2BPETokenizer: merges.txt or vocab.bpe")
    add("--tokenizer-model", metavar="PATH", help="SentencePiece: the .model; HuggingFace: directory or hub name")
    add("--tokenizer-hf-no-include-special-tokens", action="store_true", help="HuggingFace: add no BOS or EOS")
    add("--append-eod", action="store_true", help="end every document that has tokens with the document-end token")
    add = result.add_argument_group("output").add_argument
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_KEY_document.bin and .idx")
    add("--overwrite", action="store_true", help="replace output that is already there")
    add("--restart", action="store_true", help="throw unfinished work in PREFIX.partial away instead of going on")
    add = result.add_argument_group("running").add_argument
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that tokenise (one a core)")
    add("--log-interval", type=int, default=1000, metavar="N", help="documents between log lines (1000)")
    add(
        "--commit-interval",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="how often work is made safe, so that the same command goes on from there after a kill (5)",
    )
    ignored = "accepted as Megatron's; the output is in input order in any case"
    add("--partitions", type=int, default=1, metavar="N", help=ignored)
    add("--keep-sequential-samples", action="store_true", help=ignored)
    add("--dataset-impl", choices=("mmap",), default="mmap", help="accepted as Megatron's; mmap is all there is")
    add("--split-sentences", action="store_true", help=argparse.SUPPRESS)
    return result


def options_from(args: argparse.Namespace) -> PreprocessOptions:
    if args.split_sentences:
        raise UserError("--split-sentences is not supported: split before, with a list of strings under the key")
    if args.workers < 1 or args.log_interval < 1:
        raise UserError("--workers and --log-interval are 1 or more")
    choice = TokenizerChoice(
        path=args.tokenizer,
        type=args.tokenizer_type,
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
        model=args.tokenizer_model,
        add_special_tokens=not args.tokenizer_hf_no_include_special_tokens,
    )
    return PreprocessOptions(
        inputs=args.input + (_listed(args.input_list) if args.input_list else []),
        hub=HubDataset(args.hf_dataset, args.hf_split, args.hf_config) if args.hf_dataset else None,
        output_prefix=args.output_prefix,
        tokenizer=choice,
        json_keys=args.json_keys,
        append_eod=args.append_eod,
        workers=args.workers,
        on_error=args.on_error,
        overwrite=args.overwrite,
        restart=args.restart,
        commit_interval=args.commit_interval,
    )


def _listed(name: str) -> list[str]:
    """The inputs that a file names, one a line; blank lines are skipped."""
    try:
        with open(name, encoding="utf-8-sig") as file:
            listed = [line.rstrip("\r\n") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input-list {name} cannot be read: {error}") from error
    if not listed:
        raise UserError(f"--input-list {name} names no inputs")
    return listed


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # an exception, so that workers end and the work is left in order


def main() -> None:
    args = parser().parse_args()
    signal.signal(signal.SIGTERM, _terminate)
    options = options_from(args)
    with ProgressDisplay(total_bytes(expand_inputs(options.inputs)), args.log_interval) as display:
        counts = preprocess(options, display.update, display.say)
    print(summary(options, counts))


if __name__ == "__main__":
    run_tool(main)
