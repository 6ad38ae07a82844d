"""``megameta analyze``."""

import argparse
import shlex
import sys

from megameta.commands.common import Commands
from megameta.errors import UserError


def add_parser(commands: Commands) -> None:
    from megameta.paper.analysis.registry import ANALYSES, Options

    families = "\n".join(f"  {name:<16} {analysis.help}" for name, analysis in ANALYSES.items())
    analyze = commands.add_parser(
        "analyze",
        help="what meta-tokens do inside a model: a report with figures",
        usage="megameta analyze [FIGURES] MODEL [a.b=c ...] --output DIR [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Look inside a checkpoint, the latest one of a run, or a HuggingFace export, on held-out text,\n"
        "and write a report: one HTML page with the figures in it, and every figure as PNG, JSON and CSV beside it.\n"
        "Without FIGURES all of them; docs/analysis.md says how to read them. FIGURES is one of\n\n" + families,
    )
    analyze.add_argument("overrides", nargs="*", metavar="[FIGURES] MODEL [a.b=c ...]", help="as of evaluate")
    add = analyze.add_argument
    add("--output", required=True, metavar="DIR", help="of the report; an earlier report there is replaced")
    add("--data", nargs="+", metavar="PREFIX", default=None, help="tokenised held-out text (default: the run's)")
    add("--twin", metavar="MODEL", default=None, help="a model to stand beside, on the same text")
    default = Options()
    add("--samples", type=int, default=default.num_samples, metavar="N", help="held-out sequences (%(default)s)")
    add("--seed", type=int, default=default.seed, help="of what is drawn (%(default)s)")
    add("--layers", default="", metavar="N,N,…", help="whose attention maps are drawn by head (some, spread)")
    analyze.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the report."""
    from megameta.paper.analysis.registry import Options
    from megameta.paper.analysis.run import analyze

    try:
        layers = tuple(int(word) for word in arguments.layers.split(",") if word)
    except ValueError as error:
        raise UserError(f"--layers {arguments.layers}: numbers with commas between them, like 0,5,11") from error
    return analyze(
        arguments.overrides,
        output=arguments.output,
        options=Options(num_samples=arguments.samples, seed=arguments.seed, layers=layers),
        data=arguments.data,
        twin=arguments.twin,
        command=shlex.join(["megameta", *sys.argv[1:]]),
    )
