"""Scores of a model in one process: accuracy of every test example, summed up by cell, with intervals."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from megameta.cluster.launch import pick_device
from megameta.config import RunConfig
from megameta.engine.build import build_model
from megameta.engine.loss_module import LossModule, make_scores, sum_scores
from megameta.files import write_text_atomically
from megameta.finetune.data import TaskEvaluator, TaskResult
from megameta.finetune.encoded import OTHER_DIFFICULTY
from megameta.finetune.examples import DIFFICULTIES
from megameta.parallel.topology import Topology
from megameta.statistics import wilson
from megameta.train.offline import load_source


@dataclass(frozen=True)
class Cell:
    """Examples of one task and bin, of one difficulty or ("all") of any."""

    task: str
    bin: int
    difficulty: str
    result: TaskResult

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return wilson(round(self.result.accuracy * self.result.examples), self.result.examples)


@torch.no_grad()
def score_cells(module: LossModule, config: RunConfig) -> Iterator[Cell]:
    """Score a model on the configured test examples: each task and bin, then its difficulties."""
    device = next(module.parameters()).device
    evaluator = TaskEvaluator(config, Topology(device=str(device)))
    for name, (source, chosen) in list(evaluator.sets.items()):
        task, _, bound = name.partition("/")
        sums = np.zeros(6)
        parts = []
        # Examples of another difficulty count in the whole, and have no cell of their own.
        for level, difficulty in [*enumerate(DIFFICULTIES), (OTHER_DIFFICULTY, None)]:
            members = chosen[source.difficulty_N[chosen] == level]
            if not len(members):
                continue
            evaluator.sets[name] = (source, members)
            total, counts = sum_scores(
                lambda batch: module(batch, score=True), evaluator.batches(name), None, str(device)
            )
            sums += [*total.tolist(), *counts]
            if difficulty is not None:
                parts.append(Cell(task, int(bound), difficulty, TaskResult.of(make_scores(total.tolist(), counts))))
        whole = make_scores(sums[:3].tolist(), [int(count) for count in sums[3:]])
        yield Cell(task, int(bound), "all", TaskResult.of(whole))
        yield from parts


def evaluate_tasks(source: str, overrides: list[str], *, json_path: str | None = None) -> int:
    """Print accuracy by task, bin and difficulty with 95 % intervals; ``json_path``: also write the numbers there."""
    config, weights = load_source(source, overrides)
    device = pick_device(config.run.device)
    module = LossModule(build_model(config, weights)).to(device).eval()
    console = Console()
    cells = []
    with console.status("scoring"):
        for cell in score_cells(module, config):
            cells.append(cell)
            if cell.difficulty == "all":
                console.print(f"{cell.task}/{cell.bin}: {cell.result}", highlight=False, soft_wrap=True)
    console.print(_table(source, cells))
    if json_path is not None:
        record = {"source": source, "cells": [_record(cell) for cell in cells]}
        write_text_atomically(Path(json_path), json.dumps(record, indent=1) + "\n")
    return 0


def _record(cell: Cell) -> dict[str, Any]:
    names = {"task": cell.task, "bin": cell.bin, "difficulty": cell.difficulty}
    return {**names, **vars(cell.result), "interval": list(cell.interval)}


def _table(source: str, cells: list[Cell]) -> Table:
    table = Table(title=f"{source}: exact match of whole answers", caption="95 % intervals by Wilson's score")
    for column in ("task", "tokens at most", "difficulty", "accuracy", "95 % interval", "of answer tokens", "examples"):
        table.add_column(column, justify="left" if column in ("task", "difficulty") else "right")
    for cell in cells:
        low, high = cell.interval
        numbers = (f"{cell.result.accuracy:.1%}", f"{low:.1%} – {high:.1%}", f"{cell.result.token_accuracy:.1%}")
        first = (cell.task, str(cell.bin)) if cell.difficulty == "all" else ("", "")
        table.add_row(*first, cell.difficulty, *numbers, f"{cell.result.examples:,}")
    return table
