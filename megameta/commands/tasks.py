"""``megameta tasks``: make the paper's four tasks, score a model on them, look at them."""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megameta.commands.common import Commands

if TYPE_CHECKING:
    from megameta.paper.tasks.cards import Summary


def add_parser(commands: Commands) -> None:
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
    generate.set_defaults(run=_generate)
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
    evaluate.set_defaults(run=_evaluate)
    show = parts.add_parser("show", help="print examples, as models with and without meta-tokens read them")
    show.add_argument("file", metavar="FILE", help="a .jsonl of tasks generate")
    show.add_argument("--count", type=int, default=3, metavar="N")
    show.set_defaults(run=_show)


def _generate(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from megameta.paper.tasks.generate import TaskOptions, generate

    given = {key: value for key, value in vars(arguments).items() if value is not None}
    options = TaskOptions(**{key: value for key, value in given.items() if key not in ("command", "part", "run")})
    summaries = generate(options, _progress())
    console = Console()
    table = Table(title=options.output)
    for column in ("task", "train", "test", "cells (bin × difficulty)", "cells that nothing fits", "drawn again"):
        table.add_column(column, justify="left" if column in ("task", "cells that nothing fits") else "right")
    for summary in summaries:
        table.add_row(*_row(summary))
    console.print(table)
    first = summaries[0].task
    print(f"Next: megameta tasks show {Path(options.output) / first / 'test.jsonl'}")
    return 0


def _progress() -> Callable[[str, int, int], None]:
    """A line every few seconds with what is left of a task."""
    from megameta.log import ProgressLine

    lines: dict[str, ProgressLine] = {}

    def show(task: str, made: int, total: int) -> None:
        lines.setdefault(task, ProgressLine(total, "examples", f"{task}: "))(made)

    return show


def _row(summary: "Summary") -> tuple[str, ...]:
    counts = (f"{summary.train:,}", f"{summary.test:,}", str(len(summary.cells)))
    return summary.task, *counts, ", ".join(summary.impossible) or "–", f"{summary.redrawn:,}"


def _evaluate(arguments: argparse.Namespace) -> int:
    from megameta.finetune.score import evaluate_tasks

    return evaluate_tasks(arguments.source, arguments.overrides, json_path=arguments.json)


def _show(arguments: argparse.Namespace) -> int:
    from megameta.finetune.examples import read_examples, render

    for example in itertools.islice(read_examples(Path(arguments.file)), arguments.count):
        print(f"--- {example.task}, {example.difficulty}, at most {example.bin} tokens")
        print(render(example, markers=True), example.answer)
        print("--- without meta-tokens")
        print(render(example, markers=False), example.answer)
    return 0
