"""Commands on trained models: evaluate, generate, analyze."""

import argparse
import shlex
import sys

from megameta.commands.parsers.common import Commands
from megameta.errors import UserError

POLICY_HELP = (
    "where meta-tokens stand: none; those given as <|meta|> in the text (default); every N-th slot; at the ends of"
    " segments (after newlines)"
)


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
    harness = evaluate.add_argument_group("lm-eval's tasks", "on an export; pip install 'megameta[eval]'")
    add = harness.add_argument
    add("--tasks", default=None, metavar="TASK,…", help="run these in place of held-out sets")
    add("--include-path", default=None, metavar="DIR", help="of task files beside lm-eval's own")
    add("--meta-policy", default="given", choices=("none", "given", "every", "segments"), help=POLICY_HELP)
    add("--meta-every", type=int, default=10, metavar="N", help="of policy every: every N-th slot (10)")
    add("--num-fewshot", type=int, default=None, metavar="N")
    add("--limit", type=float, default=None, metavar="N", help="examples of each task; below 1 a share of them")
    add("--batch-size", type=int, default=8, metavar="N")
    evaluate.set_defaults(run=_evaluate)


def _add_generate(commands: Commands) -> None:
    generate = commands.add_parser("generate", help="continue prompts with a HuggingFace export")
    add = generate.add_argument
    add("source", metavar="EXPORT")
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="<|meta|> in it is the meta-token; may be repeated",
    )
    add("--prompts-file", default=None, metavar="FILE", help="a prompt a line")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="slots to write, meta-tokens among them (100)")
    add("--temperature", type=float, default=0.0, help="0: greedy (default)")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0, metavar="K", help="0: all tokens (default)")
    add("--repetition-penalty", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt, when sampling")
    add("--meta-policy", default="given", choices=("none", "given", "every", "segments"), help=POLICY_HELP)
    add("--meta-every", type=int, default=10, metavar="N", help="of policy every: every N-th slot (10)")
    add("--show-meta", action="store_true", help="print meta-tokens too")
    add("--speed", action="store_true", help="print slots and text tokens a second")
    generate.set_defaults(run=_generate)


def _add_analyze(commands: Commands) -> None:
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
    analyze.set_defaults(run=_analyze)


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.tasks is not None:
        from megameta.commands.evaluate_harness import evaluate_harness

        if arguments.overrides or arguments.by_position:
            raise UserError("--tasks takes no overrides of a run and no --by-position")
        return evaluate_harness(
            arguments.source,
            arguments.tasks.split(","),
            policy=arguments.meta_policy,
            every=arguments.meta_every,
            include_path=arguments.include_path,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            json_path=arguments.json,
        )
    from megameta.commands.evaluate import evaluate

    return evaluate(arguments.source, arguments.overrides, json_path=arguments.json, buckets=arguments.by_position)


def _generate(arguments: argparse.Namespace) -> int:
    from megameta.commands.generate import Sampling, generate, read_prompts

    names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "num_samples")
    return generate(
        arguments.source,
        read_prompts(arguments.prompt, arguments.prompts_file),
        max_new_tokens=arguments.max_new_tokens,
        sampling=Sampling(**{name: getattr(arguments, name) for name in names}),
        policy=arguments.meta_policy,
        every=arguments.meta_every,
        show_meta=arguments.show_meta,
        speed=arguments.speed,
    )


def _analyze(arguments: argparse.Namespace) -> int:
    from megameta.commands.analyze import analyze
    from megameta.errors import UserError
    from megameta.paper.analysis.registry import Options

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
