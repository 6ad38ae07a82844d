"""Scores of a model in one process: accuracy of every test example, summed up by cell, with intervals."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megameta.config import RunConfig
from megameta.engine.loss_module import LossModule, make_scores, sum_scores
from megameta.finetune.data import TaskEvaluator, TaskResult
from megameta.finetune.examples import DIFFICULTIES
from megameta.parallel.topology import Topology
from megameta.statistics import wilson


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
        for level, difficulty in enumerate(DIFFICULTIES):
            members = chosen[source.difficulty_N[chosen] == level]
            if not len(members):
                continue
            evaluator.sets[name] = (source, members)
            total, counts = sum_scores(
                lambda batch: module(batch, score=True), evaluator.batches(name), None, str(device)
            )
            sums += [*total.tolist(), *counts]
            parts.append(Cell(task, int(bound), difficulty, TaskResult.of(make_scores(total.tolist(), counts))))
        whole = make_scores(sums[:3].tolist(), [int(count) for count in sums[3:]])
        yield Cell(task, int(bound), "all", TaskResult.of(whole))
        yield from parts
