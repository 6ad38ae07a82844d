#!/usr/bin/env python
"""The whole line on a small corpus: data, two trained models, evaluation, export, report. `make quickstart` runs this.

Everything is made under quickstart/. Interrupted and started again, it goes on where it was.
"""

import argparse
import os
import shutil
from pathlib import Path

from megameta.errors import UserError, run_tool

DEFAULT_OUTPUT = "quickstart"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("overrides", nargs="*", metavar="a.b=c", help="values for both runs, as for megameta train")
    add("--fresh", action="store_true", help="remove what an earlier start has made, and begin anew")
    add("--data-only", action="store_true", help="stop after corpus, tokenizer and datasets (1 minute)")
    add("--output", default=DEFAULT_OUTPUT, metavar="DIR", help="where everything goes (quickstart)")
    add("--vocab-size", type=int, default=4096, metavar="N", help="of the tokenizer (4096)")
    add("--corpus-bytes", type=int, metavar="N", help="stop at N bytes of training text (all, over 10 MB)")
    add("--margin", type=float, default=1.0, metavar="NATS", help="by which both models must beat the unigram entropy")
    return result


def main() -> int:
    """Run the command."""
    arguments = parser().parse_intermixed_args()
    default = arguments.output == DEFAULT_OUTPUT
    output = Path(DEFAULT_OUTPUT) if default else Path(arguments.output).absolute()
    os.chdir(Path(__file__).resolve().parents[1])
    # After the command line is parsed: these take seconds to import.
    from megameta.quickstart.line import Options, Quickstart

    if arguments.fresh and output.exists():
        if not default and any(output.iterdir()) and not (output / "stages").is_dir():
            raise UserError(f"{output} was not made by this program, so --fresh does not remove it")
        shutil.rmtree(output)
    options = Options(
        output=output,
        data_only=arguments.data_only,
        vocab_size=arguments.vocab_size,
        corpus_bytes=arguments.corpus_bytes,
        margin=arguments.margin,
        overrides=tuple(arguments.overrides),
    )
    return Quickstart(options).run()


if __name__ == "__main__":
    run_tool(main)
