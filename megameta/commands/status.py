"""``megameta status``."""

import argparse

from megameta.commands.common import Commands


def add_parser(commands: Commands) -> None:
    status = commands.add_parser(
        "status",
        help="where a run stands",
        description="Step, loss, tokens/s, time left, last checkpoint and slowest rank of a run that is under way, has"
        " ended, was killed or has not begun; from files alone.",
    )
    status.add_argument("run_dir", metavar="RUN")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print where the run stands."""
    from megameta.cluster.status import show_status

    return show_status(arguments.run_dir, as_json=arguments.json)
