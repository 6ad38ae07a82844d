"""``megameta evaluate``."""

import argparse

from megameta.commands.common import POLICY_HELP, Commands
from megameta.errors import UserError


def add_parser(commands: Commands) -> None:
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
    evaluate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print losses on held-out sets, or metrics of lm-eval's tasks."""
    if arguments.tasks is not None:
        from megameta.cluster.launch import pick_device
        from megameta.hf.lm_eval import evaluate_harness

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
            device=pick_device("auto"),
        )
    from megameta.train.offline import evaluate

    return evaluate(arguments.source, arguments.overrides, json_path=arguments.json, buckets=arguments.by_position)
