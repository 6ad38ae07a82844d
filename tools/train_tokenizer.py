"""Train a tokenizer on a corpus: byte-level BPE or sentencepiece, with the meta-token as its last id."""

import argparse
import sys

from megameta.corpus.preprocess_report import MB
from megameta.corpus.train_tokenizer import train_tokenizer
from megameta.errors import UserError, run_tool

EXAMPLE = """\
example:
  python tools/train_tokenizer.py --input corpus.jsonl --output tokenizer --type bpe --vocab-size 16384
"""


class Progress:
    """Text read so far: a live line on a terminal, else a line every 100 MB."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._step = 1 if self._live else 100
        self._next = 0.0 if self._live else float(self._step)

    def __call__(self, documents: int, size: int) -> None:
        if size / MB >= self._next:
            self._next = size / MB + self._step
            start, end = ("\r", "") if self._live else ("", "\n")
            print(f"{start}read {documents:,} documents, {size / MB:,.1f} MB", end=end, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="what tools/preprocess_data.py reads")
    add("--output", required=True, metavar="DIR", help="directory for the tokenizer")
    add("--type", required=True, choices=("bpe", "sentencepiece"), help="byte-level BPE as GPT-2's, or sentencepiece")
    add("--vocab-size", type=int, required=True, metavar="N", help="ids in all, special tokens included")
    add("--json-key", default="text", metavar="KEY", help="key of the text (text)")
    add("--sample-bytes", type=int, metavar="N", help="train on N bytes of text, drawn from all inputs alike (all)")
    add("--seed", type=int, default=0, metavar="N", help="of the draw (0)")
    add("--model-type", choices=("bpe", "unigram"), default="bpe", help="for sentencepiece (bpe)")
    add("--overwrite", action="store_true", help="replace a directory that is not empty")
    return result


def main() -> None:
    args = parser().parse_args()
    if args.vocab_size < 1 or (args.sample_bytes is not None and args.sample_bytes < 1):
        raise UserError("--vocab-size and --sample-bytes are 1 or more")
    tokenizer, checked = train_tokenizer(
        args.input,
        args.output,
        args.type,
        args.vocab_size,
        key=args.json_key,
        sample_bytes=args.sample_bytes,
        seed=args.seed,
        model_type=args.model_type,
        overwrite=args.overwrite,
        on_progress=Progress(),
    )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(
        f"{args.output}: {tokenizer.vocab_size:,} ids, document end {tokenizer.eod_id}, meta {tokenizer.meta_token_id}"
    )
    print(
        f"round trip: {checked['exact']:,} of {checked['documents']:,} pieces of the corpus exact, "
        f"{checked['bytes'] / max(1, checked['tokens']):.3f} bytes of text per token"
    )
    if checked["first_changed"] is not None:
        print(f"the first that is not: {checked['first_changed'][:60]!r} …")
    command = f"python tools/preprocess_data.py --input {' '.join(args.input)} --output-prefix PREFIX"
    print(f"Next:\n  {command} --tokenizer {args.output} --append-eod")


if __name__ == "__main__":
    run_tool(main)
