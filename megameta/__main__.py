"""``megameta …``: the commands for people; ``python -m megameta …`` is what torchrun, deepspeed and srun start."""

import argparse
from collections.abc import Callable, Sequence

from megameta import __version__
from megameta.commands import (
    analyze,
    config,
    evaluate,
    extend,
    finetune,
    generate,
    plan,
    reproduce,
    slurm,
    status,
    tasks,
    tokenizer,
    train,
)
from megameta.errors import run_tool

#: In the order of --help.
COMMANDS = (
    train,
    finetune,
    extend,
    plan,
    evaluate,
    generate,
    analyze,
    tokenizer,
    tasks,
    reproduce,
    status,
    slurm,
    config,
)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="megameta", description="Pre-train language models with learned meta-tokens.")
    parser.add_argument("--version", action="version", version=f"megameta {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the ``megameta`` command; exits."""
    parser = build_parser()
    # Overrides may stand after options, which argparse's own positional list does not allow under subcommands.
    arguments, rest = parser.parse_known_args(argv)
    if "overrides" not in arguments or any(word.startswith("-") or "=" not in word for word in rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        arguments.overrides += rest
    command: Callable[[argparse.Namespace], int | None] = arguments.run
    run_tool(lambda: command(arguments))


if __name__ == "__main__":
    main()
