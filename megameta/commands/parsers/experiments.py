"""Commands of the experiments: tasks, reproduce."""

import argparse

from megameta.commands.parsers.common import Commands
from megameta.errors import UserError


def add_experiments(commands: Commands) -> None:
    """tasks, reproduce."""
    _add_tasks(commands)
    _add_reproduce(commands)


def _add_tasks(commands: Commands) -> None:
    tasks = commands.add_parser("tasks", help="make the paper's four tasks, or show examples of them")
    parts = tasks.add_subparsers(dest="part", required=True, metavar="PART")
    generate = parts.add_parser(
        "generate",
        help="make datasets of the tasks",
        description="Write DIR/TASK/train.jsonl and test.jsonl, a dataset card (datasets.load_dataset(DIR, TASK)) and"
        " lm-eval task files. The same seed and tokenizer give the same bytes.",
    )
    add = generate.add_argument
    add("--tokenizer", required=True, metavar="PATH", help="lengths are in its tokens")
    add("--output", required=True, metavar="DIR")
    add("--tasks", nargs="+", default=None, metavar="TASK", help="(all: list_recall segment_counting parity copying)")
    add("--bins", nargs="+", type=int, default=None, metavar="N", help="length bins (128 256 512 1024 2048)")
    add("--difficulties", nargs="+", default=None, metavar="LEVEL", help="(easy medium hard extra-hard long)")
    add("--train", type=int, default=None, metavar="N", help="examples of each task (90000)")
    add("--test", type=int, default=None, metavar="N", help="examples of each task (10000)")
    add("--seed", type=int, default=None)
    add("--overwrite", action="store_true", help="replace a directory that is there")
    generate.set_defaults(run=_tasks_generate)
    evaluate = parts.add_parser(
        "evaluate",
        help="accuracy of a fine-tuned model by task, bin and difficulty",
        description="Score a run, checkpoint or export on test examples: exact match of the whole answer, as greedy"
        " decoding gives it, with 95 % intervals (Wilson). A run brings its configuration; overrides may name other"
        " examples (finetune.directory=DIR finetune.eval_examples=0 finetune.eval_bins=[512]) or switches of the model"
        " (model.zero_meta_positions=true).",
    )
    evaluate.add_argument("source", metavar="RUN_OR_CHECKPOINT_OR_EXPORT")
    evaluate.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the run")
    evaluate.add_argument("--json", metavar="FILE", default=None, help="also write the numbers there")
    evaluate.set_defaults(run=_tasks_evaluate)
    show = parts.add_parser("show", help="print examples, as models with and without meta-tokens read them")
    show.add_argument("file", metavar="FILE", help="a .jsonl of tasks generate")
    show.add_argument("--count", type=int, default=3, metavar="N")
    show.set_defaults(run=_tasks_show)


def _add_reproduce(commands: Commands) -> None:
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
    reproduce.set_defaults(run=_reproduce)


def _tasks_generate(arguments: argparse.Namespace) -> int:
    from megameta.commands.tasks import generate_tasks

    given = {key: value for key, value in vars(arguments).items() if value is not None}
    return generate_tasks({key: value for key, value in given.items() if key not in ("command", "part", "run")})


def _tasks_evaluate(arguments: argparse.Namespace) -> int:
    from megameta.commands.evaluate_tasks import evaluate_tasks

    return evaluate_tasks(arguments.source, arguments.overrides, json_path=arguments.json)


def _tasks_show(arguments: argparse.Namespace) -> int:
    from megameta.commands.tasks import show_tasks

    return show_tasks(arguments.file, arguments.count)


def _reproduce(arguments: argparse.Namespace) -> int:
    from megameta.commands.reproduce import reproduce

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
