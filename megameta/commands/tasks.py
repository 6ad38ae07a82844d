"""``megameta tasks``: make the four tasks' datasets, and look at them."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megameta.finetune.examples import read_examples, render
from megameta.log import ProgressLine
from megameta.paper.tasks.generate import Summary, TaskOptions, generate


def _progress() -> Callable[[str, int, int], None]:
    """A line every few seconds with what is left of a task."""
    lines: dict[str, ProgressLine] = {}

    def show(task: str, made: int, total: int) -> None:
        lines.setdefault(task, ProgressLine(total, "examples", f"{task}: "))(made)

    return show


def generate_tasks(given: dict[str, Any]) -> int:
    """Make the datasets that the command line asks for, and print what they hold."""
    options = TaskOptions(**given)
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


def _row(summary: Summary) -> tuple[str, ...]:
    counts = (f"{summary.train:,}", f"{summary.test:,}", str(len(summary.cells)))
    return summary.task, *counts, ", ".join(summary.impossible) or "–", f"{summary.redrawn:,}"


def show_tasks(file: str, count: int) -> int:
    """Print the first examples of a file."""
    for example in itertools.islice(read_examples(Path(file)), count):
        print(f"--- {example.task}, {example.difficulty}, at most {example.bin} tokens")
        print(render(example, markers=True), example.answer)
        print("--- without meta-tokens")
        print(render(example, markers=False), example.answer)
    return 0
