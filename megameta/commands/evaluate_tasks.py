"""``megameta tasks evaluate``: accuracy on the four tasks, in one process without DeepSpeed."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megameta.cluster.launch import pick_device
from megameta.commands.evaluate import load_source
from megameta.engine.build import build_model
from megameta.engine.loss_module import LossModule
from megameta.files import write_text_atomically
from megameta.finetune.score import Cell, score_cells


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
