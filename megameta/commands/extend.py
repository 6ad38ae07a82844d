"""``megameta extend``."""

import argparse

from megameta.commands.common import Commands


def add_parser(commands: Commands) -> None:
    extend = commands.add_parser(
        "extend",
        help="write the configuration of going on at a longer window",
        description="From a run or checkpoint with rotary positions, write the YAML file of continued pre-training (or"
        " of fine-tuning, where the run did that) at a multiple of its window: sequences, scaled positions, batch,"
        " steps and schedule. docs/extension.md says what the methods do. Nothing is trained here.",
    )
    add = extend.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT")
    add("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the new configuration")
    add("--factor", type=float, required=True, help="of the window")
    add("--method", choices=("yarn", "ntk", "linear", "none"), default="yarn", help="of scaling (default: yarn)")
    add("--total", action="store_true", help="of an extended model: the factor is of the window before any extension")
    add("--output", metavar="FILE", default=None, help="(default: RUN-METHODFACTOR.yaml in this directory)")
    add("--steps", type=int, default=None, metavar="N", help="(default: a hundredth of the run's, at least 100)")
    add("--lr", type=float, default=None, help="peak learning rate (default: that at the end of the run)")
    extend.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the configuration."""
    from megameta.train.extension import extend

    options = {key: getattr(arguments, key) for key in ("factor", "method", "total", "output", "steps", "lr")}
    return extend(arguments.source, arguments.overrides, **options)
