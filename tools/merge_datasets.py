"""Join indexed datasets (PREFIX.bin, PREFIX.idx) into one, or export one in another token type.

Takes the flags of Megatron-LM's tool of this name, and writes the bytes that it writes.
"""

import argparse
import os

from megameta.corpus.indexed_writer import merge_datasets
from megameta.data.indexed import IndexedDataset, dataset_exists, dataset_prefix
from megameta.errors import UserError, run_tool
from megameta.log import ProgressLine

EXAMPLE = """\
examples:
  python tools/merge_datasets.py --input a_text_document b_text_document --output-prefix ab_text_document
  python tools/merge_datasets.py --input shards/ --output-prefix all_text_document          # every pair in it, by name
  python tools/merge_datasets.py --input a_text_document --output-prefix wide --dtype int32  # an export
"""
TYPES = ("uint8", "int8", "int16", "uint16", "int32", "int64")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--input", nargs="+", required=True, metavar="PREFIX", help="datasets in order, or directories of them")
    add("--output-prefix", required=True, metavar="PREFIX")
    add("--dtype", choices=TYPES, help="type of the new dataset's tokens; every id must fit (that of the input)")
    add("--overwrite", action="store_true", help="replace output that is already there")
    return result


def expand(inputs: list[str]) -> list[str]:
    """Prefixes; a directory stands for the pairs in it, sorted by name."""
    prefixes: list[str] = []
    for name in inputs:
        if os.path.isdir(name):
            found = sorted(os.path.join(name, entry[:-4]) for entry in os.listdir(name) if entry.endswith(".idx"))
            if not found:
                raise UserError(f"{name} holds no dataset (no .idx file)")
            prefixes += found
        else:
            prefixes.append(dataset_prefix(name))
    return prefixes


def main() -> None:
    args = parser().parse_args()
    prefixes, output = expand(args.input), dataset_prefix(args.output_prefix)
    if any(os.path.realpath(prefix) == os.path.realpath(output) for prefix in prefixes):
        raise UserError(f"{output} is both input and output: give another --output-prefix")
    if not args.overwrite and (os.path.exists(output + ".bin") or os.path.exists(output + ".idx")):
        what = "is already there" if dataset_exists(output) else "is there in part"
        raise UserError(f"{output}.bin/.idx {what}: give another --output-prefix, or --overwrite to replace it")
    total = sum(IndexedDataset(prefix).num_tokens for prefix in prefixes)
    progress, done = ProgressLine(total, "tokens"), 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done)

    merge_datasets(prefixes, output, args.dtype, count)
    made = IndexedDataset(output)
    print(
        f"{output}.bin, .idx: {made.num_documents:,} documents, {made.num_tokens:,} tokens ({made.dtype}) "
        f"of {len(prefixes)} dataset{'s' if len(prefixes) > 1 else ''}"
    )
    print(f"Next: python tools/inspect_dataset.py {output} --verify")


if __name__ == "__main__":
    run_tool(main)
