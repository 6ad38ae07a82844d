#!/usr/bin/env python
"""Convert a checkpoint to a HuggingFace model directory, and back.

python tools/convert_checkpoint.py to-hf RUN_OR_CHECKPOINT --output DIR
python tools/convert_checkpoint.py from-hf DIR --output CHECKPOINT
"""

import argparse

from megameta.errors import run_tool


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Convert a checkpoint to a HuggingFace model directory, and back.")
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="write a HuggingFace model directory, verified against the checkpoint")
    to_hf.add_argument("source", metavar="CHECKPOINT_OR_RUN", help="checkpoint, or run directory (its newest one)")
    to_hf.add_argument("--output", required=True, metavar="DIR")
    to_hf.add_argument("--tokenizer", metavar="PATH", help="default: the one in the run's configuration")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    to_hf.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights (default: 5GB)")
    to_hf.add_argument(
        "--audit", metavar="DIR", help="of the training data, by tools/audit_corpus.py; goes into the model card"
    )
    to_hf.add_argument("--overwrite", action="store_true", help="replace an existing model directory")
    from_hf = commands.add_parser("from-hf", help="write a checkpoint for init.from_checkpoint")
    from_hf.add_argument(
        "source", metavar="DIR", help="what to-hf wrote, or what was saved again since; or a GPT-2 or GPT-NeoX"
    )
    from_hf.add_argument("--output", required=True, metavar="CHECKPOINT_DIR")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    arguments = parse_arguments()
    # After the command line is parsed: these take seconds to import.
    from megameta.hf.convert import checkpoint_to_hf, hf_to_checkpoint, next_step

    if arguments.command == "to-hf":
        print(f"reading {arguments.source}", flush=True)
        output = checkpoint_to_hf(
            arguments.source,
            arguments.output,
            tokenizer=arguments.tokenizer,
            dtype=arguments.dtype,
            overwrite=arguments.overwrite,
            max_shard_size=arguments.max_shard_size,
            audit=arguments.audit,
        )
        print(f"wrote {output}; its reloaded logits equal the training model's. Try it:\n  {next_step(output)}")
    else:
        print(f"reading {arguments.source}", flush=True)
        output = hf_to_checkpoint(arguments.source, arguments.output)
        print(f"wrote {output}. Start a run from it:\n  megameta train CONFIG init.from_checkpoint={output}")


if __name__ == "__main__":
    run_tool(main)
