"""What an experiment found, read from the files of its runs."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megameta.errors import UserError
from megameta.paper.reproduce.runs import Cell, Experiment
from megameta.statistics import Estimate, accuracy_estimate, difference_estimate
from megameta.train.metrics import read_metrics

#: Condition of the evaluations during training.
DURING = "during training"
#: Difficulty of a score over all of them together.
ALL = "all"


@dataclass(frozen=True)
class Score:
    """One accuracy.

    Attributes:
        step: of the fine-tuning, 0 for its end.
        phase: bound of the phase that had ended there; None in the middle of one.
        difficulty: of the examples; "all" for all together.
    """

    arm: str
    task: str
    seed: int
    condition: str
    bin: int
    step: int
    phase: int | None
    accuracy: float
    examples: int
    difficulty: str = ALL


class Scores:
    """All scores of an experiment."""

    def __init__(self, scores: Iterable[Score]) -> None:
        self.all = list(scores)

    def pick(self, **wanted: Any) -> list[Score]:
        """Those whose attributes have these values; over all difficulties together where none is named."""
        wanted = {"difficulty": ALL, **wanted}
        return [score for score in self.all if all(getattr(score, key) == value for key, value in wanted.items())]

    def estimate(self, **wanted: Any) -> Estimate | None:
        """Mean over seeds of what ``pick`` finds; None where nothing is found."""
        found = self.pick(**wanted)
        return accuracy_estimate([s.accuracy for s in found], found[0].examples) if found else None

    def difference(self, first: str, second: str, **wanted: Any) -> Estimate | None:
        """Of two arms over the seeds that both have."""
        a = {score.seed: score for score in self.pick(arm=first, **wanted)}
        b = {score.seed: score for score in self.pick(arm=second, **wanted)}
        seeds = sorted(a.keys() & b.keys())
        if not seeds:
            return None
        ours, theirs = ([side[seed].accuracy for seed in seeds] for side in (a, b))
        return difference_estimate(ours, theirs, a[seeds[0]].examples)

    def count_seeds(self) -> int:
        """Seeds with which anything has run."""
        return len({score.seed for score in self.all})


def training_scores(experiment: Experiment, cell: Cell) -> list[Score]:
    """The evaluations during a fine-tuning; none where it is not done."""
    if not experiment.has(cell.finetune_name):
        return []
    path = experiment.run_dir("finetune", cell.arm.name, cell.task, cell.seed) / "metrics.jsonl"
    raw = experiment.finetuning(cell.arm, cell.task, cell.seed)
    phases = experiment.scale.phases
    per_phase = raw["train"]["num_steps"] // len(phases)
    found = []
    for record in read_metrics(path):
        for name, result in record.get("eval", {}).items():
            step, bound = record["step"], int(name.partition("/")[2])
            phase = phases[step // per_phase - 1] if step % per_phase == 0 else None
            numbers = (result["accuracy"], result["examples"])
            found.append(Score(cell.arm.name, cell.task, cell.seed, DURING, bound, step, phase, *numbers))
    return found


def final_scores(experiment: Experiment, cell: Cell, condition: str) -> list[Score]:
    """An evaluation of a fine-tuned model; none where it is not done."""
    if not experiment.has(cell.evaluate_name(condition)):
        return []
    path = experiment.scores("tasks", *cell.names, condition)
    last = experiment.scale.phases[-1]
    return [
        Score(cell.arm.name, cell.task, cell.seed, condition, c["bin"], 0, last, c["accuracy"], c["examples"], level)
        for c in read_cells(path)
        for level in [c["difficulty"]]
    ]


def read_cells(path: Path) -> list[dict[str, Any]]:
    """Accuracies by bin and difficulty ("all": together), as ``megameta tasks evaluate`` wrote them."""
    return read_json(path)["cells"]


def read_json(path: Path) -> Any:
    """Raises UserError for what is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it and start again") from error
