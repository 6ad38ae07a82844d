"""``megameta …``: the commands for people. Every command also runs as ``python -m megameta …``."""

import argparse
from collections.abc import Callable, Sequence

from megameta import __version__
from megameta.commands.parsers.cluster import add_cluster
from megameta.commands.parsers.configuration import add_config
from megameta.commands.parsers.experiments import add_experiments
from megameta.commands.parsers.models import add_models
from megameta.commands.parsers.runs import add_runs
from megameta.commands.parsers.texts import add_tokenizer
from megameta.errors import run_tool


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="megameta", description="Pre-train language models with learned meta-tokens.")
    parser.add_argument("--version", action="version", version=f"megameta {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_runs, add_models, add_tokenizer, add_experiments, add_cluster, add_config):
        add(commands)
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
