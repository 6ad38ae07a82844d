"""``megameta reproduce``."""

import argparse

from megameta.commands.common import Commands
from megameta.errors import UserError


def add_parser(commands: Commands) -> None:
    reproduce = commands.add_parser(
        "reproduce",
        help="a figure or table of the paper, from nothing to the report",
        description="Pre-train the models that are compared, fine-tune and evaluate them, and write a report with the"
        " paper's numbers beside ours: OUTPUT/TARGET/report.md. Interrupted and started again, it goes on.",
    )
    reproduce.add_argument("target", choices=("figure1", "table1", "table2", "ppl", "inference"))
    reproduce.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the scale")
    reproduce.add_argument(
        "--scale",
        default="cpu",
        metavar="SCALE",
        help="cpu (default), cpu-control, cpu-full, gpu-8min, gpu-30min, paper, or a YAML file",
    )
    reproduce.add_argument("--output", default=None, metavar="DIR", help="for all targets (default: reproduce/SCALE)")
    reproduce.add_argument("--jobs", type=int, default=None, metavar="N", help="runs at a time (one a GPU or core)")
    reproduce.add_argument(
        "--time-limit", type=float, default=None, metavar="MINUTES", help="stop then, to go on later"
    )
    reproduce.add_argument("--dry-run", action="store_true", help="only list what is to be done")
    reproduce.add_argument("--partial", action="store_true", help="run nothing; report what is done so far")
    reproduce.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run what is not done yet, and report."""
    from megameta.paper.reproduce.reproduce import reproduce

    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError("--jobs is at least 1")
    return reproduce(
        arguments.target,
        arguments.scale,
        arguments.overrides,
        output=arguments.output,
        jobs=arguments.jobs,
        time_limit=arguments.time_limit,
        dry_run=arguments.dry_run,
        partial=arguments.partial,
    )
