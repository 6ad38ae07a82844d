"""Commands on trained models: evaluate, generate, analyze."""

import argparse
import shlex
import sys

from megameta.commands.parsers.common import Commands


def add_models(commands: Commands) -> None:
    """evaluate, generate, analyze."""
    _add_evaluate(commands)
    _add_generate(commands)
    _add_analyze(commands)


def _add_evaluate(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="held-out loss, perplexity and bits per byte",
        description="Evaluate a checkpoint, the latest one of a run, or a HuggingFace export on held-out datasets."
        " A run brings its configuration; overrides may name other sets (data.valid=PREFIX), more samples"
        " (eval.num_samples=0: all) or switches of the model (model.zero_meta_positions=true).",
    )
    evaluate.add_argument("source", metavar="RUN_OR_CHECKPOINT_OR_EXPORT")
    evaluate.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the run")
    evaluate.add_argument("--json", metavar="FILE", default=None, help="also write the numbers there")
    evaluate.add_argument(
        "--by-position",
        type=int,
        default=0,
        metavar="BUCKETS",
        help="also by position in the sequence, in as many parts",
    )
    evaluate.set_defaults(run=_evaluate)


def _add_generate(commands: Commands) -> None:
    generate = commands.add_parser("generate", help="continue a prompt with a HuggingFace export")
    generate.add_argument("source", metavar="EXPORT")
    generate.add_argument("--prompt", required=True, help="text; <|meta|> in it is the meta-token")
    generate.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--num-samples", type=int, default=1, metavar="N", help="continuations, when sampling")
    generate.set_defaults(run=_generate)


def _add_analyze(commands: Commands) -> None:
    from megameta.analysis.registry import ANALYSES, Options

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
    analyze.set_defaults(run=_analyze)


def _evaluate(arguments: argparse.Namespace) -> int:
    from megameta.commands.evaluate import evaluate

    return evaluate(arguments.source, arguments.overrides, json_path=arguments.json, buckets=arguments.by_position)


def _generate(arguments: argparse.Namespace) -> int:
    from megameta.commands.generate import generate

    return generate(
        arguments.source,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        num_samples=arguments.num_samples,
    )


def _analyze(arguments: argparse.Namespace) -> int:
    from megameta.analysis.registry import Options
    from megameta.commands.analyze import analyze
    from megameta.errors import UserError

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
