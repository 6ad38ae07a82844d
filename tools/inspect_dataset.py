"""Show what is in an indexed dataset (PREFIX.bin, PREFIX.idx); --verify reads all of it."""

import argparse

from megameta.corpus.inspect_dataset import describe, first_documents, location_of, verify
from megameta.data.indexed import IndexedDataset
from megameta.errors import UserError, run_tool
from megameta.log import ProgressLine
from megameta.tokenizers import load_tokenizer

EXAMPLE = """\
example:
  python tools/inspect_dataset.py corpus_text_document --tokenizer tokenizer --verify
"""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("prefix", metavar="PREFIX", help="the dataset, with or without .bin or .idx")
    add("--tokenizer", metavar="PATH", help="decode with it, and check ids against its vocabulary")
    add("--vocab-size", type=int, metavar="N", help="check ids against this many, where there is no --tokenizer")
    add("--documents", type=int, default=3, metavar="N", help="documents to show (3)")
    add("--verify", action="store_true", help="read every token; ids beyond the vocabulary are an error")
    return result


def main() -> None:
    args = parser().parse_args()
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    dataset = IndexedDataset(args.prefix)
    print("\n".join(describe(dataset)))
    for line in first_documents(dataset, args.documents, tokenizer):
        print(line)
    if not args.verify:
        return
    vocab_size, eod = (args.vocab_size, None) if tokenizer is None else (tokenizer.vocab_size, tokenizer.eod_id)
    found = verify(dataset, vocab_size, eod, ProgressLine(dataset.num_tokens, "tokens"))
    print(f"read {found.num_tokens:,} tokens: ids {found.smallest} to {found.largest}")
    if vocab_size is None:
        print("neither --tokenizer nor --vocab-size, so ids are checked to be 0 or more only")
    elif tokenizer is not None:
        print(f"{found.document_ends:,} document-end tokens in {dataset.num_documents:,} documents")
    if found.first_bad is not None:
        limit = "0 or more" if vocab_size is None else f"from 0 to {vocab_size - 1}"
        where = location_of(dataset, found.first_bad)
        raise UserError(f"{found.bad:,} ids are not {limit}; the first at {where}. Is it the right tokenizer?")


if __name__ == "__main__":
    run_tool(main)
