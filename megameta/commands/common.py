"""What several commands share."""

import argparse
import os
from typing import TYPE_CHECKING, TypeAlias

from megameta.errors import UserError

if TYPE_CHECKING:
    from megameta.cluster.stop import StopRequest

#: What ``add_subparsers`` returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

#: Of --meta-policy.
POLICY_HELP = (
    "where meta-tokens stand: none; those given as <|meta|> in the text (default); every N-th slot; at the ends of"
    " segments (after newlines)"
)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and overrides."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the file")


def add_launch_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """--nproc-per-node."""
    parser.add_argument("--nproc-per-node", metavar="N", default=None, help=text)


def launches(arguments: argparse.Namespace) -> bool:
    """Whether this process is to start the ranks, and is none itself."""
    return arguments.nproc_per_node is not None and "RANK" not in os.environ


def launch(command: str, arguments: argparse.Namespace) -> int:
    """Start ranks of ``command`` on this machine; the exit code."""
    from megameta.cluster.launch import launch_local, pick_device

    count = _process_count(arguments.nproc_per_node, pick_device("auto"))
    return launch_local([command, arguments.config, *arguments.overrides], count)


def listen() -> "StopRequest":
    """Before torch is imported, which may take a minute from a busy file system: a signal would kill the rank."""
    from megameta.cluster.stop import StopRequest

    stop = StopRequest()
    stop.listen()
    return stop


def _process_count(wanted: str, device: str) -> int:
    if wanted == "auto":
        import torch

        return torch.cuda.device_count() if device == "cuda" else 1
    if not wanted.isdigit() or int(wanted) < 1:
        raise UserError(f"--nproc-per-node {wanted}: a number of at least 1, or auto")
    return int(wanted)
