"""Table 1: models of a short window, extended by YaRN, fine-tuned on list recall, evaluated far beyond (spec §5)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megameta.errors import UserError
from megameta.paper.reproduce import paper
from megameta.paper.reproduce.arms import ARMS, Arm, find_arms
from megameta.paper.reproduce.jobs import Job
from megameta.paper.reproduce.report import intervals_note, percent
from megameta.paper.reproduce.results import Score, Scores, read_cells
from megameta.paper.reproduce.runs import Experiment, merge, whole_phases
from megameta.paper.reproduce.scale import Table1Part
from megameta.quickstart.report import table

TASK = "list_recall"
#: (window extended to, fine-tuned at), in windows: the paper's rows.
ROWS = tuple(paper.TABLE1)


@dataclass(frozen=True)
class Row:
    """One fine-tuned model: extended to ``factor`` windows, fine-tuned at up to ``reach`` of them."""

    arm: Arm
    factor: int
    reach: int
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.arm.name, f"x{self.factor}-at-{self.reach}", str(self.seed))


def settings_of(experiment: Experiment) -> Table1Part:
    """Raises UserError where the scale has none."""
    if experiment.scale.table1 is None:
        raise UserError("this scale has no table1 section; docs/reproduce.md says what it holds")
    return experiment.scale.table1


def rows_of(experiment: Experiment) -> Iterator[Row]:
    part = settings_of(experiment)
    for seed in experiment.scale.seeds:
        for arm in find_arms(part.arms):
            for factor, reach in ROWS:
                yield Row(arm, factor, reach, seed)


def table1_jobs(experiment: Experiment) -> list[Job]:
    """Data, then for each model pre-training, extension, fine-tuning, evaluation."""
    part = settings_of(experiment)
    found = {"data": experiment.data_job()}
    tasks = experiment.tasks_job(part.tasks, "table1/tasks")
    found[tasks.name] = tasks
    for row in rows_of(experiment):
        first = _pretrain(experiment, row.arm, row.seed)
        second = _extend(experiment, row.arm, row.factor, row.seed, first.name)
        third = _finetune(experiment, row, second.name)
        for job in (first, second, third, _evaluate(experiment, row, third.name)):
            found.setdefault(job.name, job)
    return list(found.values())


def _directory(experiment: Experiment, *names: str) -> str:
    return str(experiment.run_dir("table1", *names))


def _text(experiment: Experiment, arm: Arm, raw: dict[str, Any], slots: int) -> dict[str, Any]:
    return experiment.text_keys(arm, merge(raw["data"], {"sequence_length": slots}))


def _pretrain(experiment: Experiment, arm: Arm, seed: int) -> Job:
    part = settings_of(experiment)
    names = ("table1", "pretrain", arm.name, str(seed))
    raw = merge(experiment.pretraining_keys(arm), part.pretrain)
    run = {"dir": str(experiment.run_dir(*names)), "seed": seed}
    raw = merge(raw, {"run": run, "data": _text(experiment, arm, raw, part.window)})
    return experiment.run_job("train", names, raw, ("data",))


def _scaling(part: Table1Part, factor: int) -> dict[str, Any]:
    return {
        "position_scaling": "yarn",
        "position_scaling_factor": float(factor),
        "original_max_position_embeddings": part.window,
    }


def _extend(experiment: Experiment, arm: Arm, factor: int, seed: int, before: str) -> Job:
    part = settings_of(experiment)
    names = ("table1", "extend", arm.name, f"x{factor}", str(seed))
    raw = merge(experiment.pretraining_keys(arm), part.extend)
    raw = merge(
        raw,
        {
            "run": {"dir": str(experiment.run_dir(*names)), "seed": seed},
            "model": _scaling(part, factor),
            "data": _text(experiment, arm, raw, factor * part.window),
            "init": {"from_checkpoint": _directory(experiment, "pretrain", arm.name, str(seed))},
        },
    )
    return experiment.run_job("train", names, raw, (before,))


def _finetuning(experiment: Experiment, row: Row) -> dict[str, Any]:
    part = settings_of(experiment)
    raw = merge(experiment.finetuning_keys(row.arm), part.finetune)
    bins = [bound for bound in part.tasks.bins if bound <= row.reach * part.window]
    extended = _directory(experiment, "extend", row.arm.name, f"x{row.factor}", str(row.seed))
    raw = merge(
        raw,
        {
            "run": {"dir": _directory(experiment, "finetune", *row.names), "seed": row.seed},
            "model": _scaling(part, row.factor),
            "data": {"tokenizer": str(experiment.tokenizer), "sequence_length": row.factor * part.window},
            "finetune": {
                "directory": str(experiment.output / "table1" / "tasks"),
                "tasks": [TASK],
                "phases": bins,
                "markers": row.arm.meta_tokens,
                "eval_bins": bins,
            },
            "init": {"from_checkpoint": extended},
        },
    )
    return whole_phases(raw)


def _finetune(experiment: Experiment, row: Row, before: str) -> Job:
    names = ("table1", "finetune", *row.names)
    return experiment.run_job("finetune", names, _finetuning(experiment, row), (before, "table1/tasks"))


def _evaluate(experiment: Experiment, row: Row, before: str) -> Job:
    bins = [length * settings_of(experiment).window for length in paper.TABLE1_LENGTHS]
    name, path = "/".join(("table1", "evaluate", *row.names)), experiment.scores("table1", *row.names)
    return experiment.score_job(name, before, _finetuning(experiment, row), path, bins)


def table1_parts(experiment: Experiment, _directory: Path) -> list[str]:
    """Ours and the paper's rows."""
    part = settings_of(experiment)
    scores = []
    for row in rows_of(experiment):
        if not experiment.has("/".join(("table1", "evaluate", *row.names))):
            continue
        for cell in read_cells(experiment.scores("table1", *row.names)):
            name, numbers = f"{row.factor},{row.reach}", (cell["accuracy"], cell["examples"], cell["difficulty"])
            scores.append(Score(row.arm.name, TASK, row.seed, name, cell["bin"], 0, None, *numbers))
    found = Scores(scores)
    lines = []
    for factor, reach in ROWS:
        for arm in part.arms:
            shown = [
                percent(found.estimate(arm=arm, condition=f"{factor},{reach}", bin=length * part.window))
                for length in paper.TABLE1_LENGTHS
            ]
            lines.append([f"{ARMS[arm].title}: extended ×{factor}, fine-tuned at ×{reach}", *shown])
        lines.append([f"*the paper: {factor}k, at {reach}k*", *map(str, paper.TABLE1[factor, reach])])
    head = ["accuracy (%) at", *[f"×{length} ({length * part.window} tokens)" for length in paper.TABLE1_LENGTHS]]
    return [
        f"Windows of {part.window} slots (the paper's: 1024), extended by YaRN with continued pre-training, then"
        " fine-tuned on list recall in phases up to the length named.",
        intervals_note(found.count_seeds()),
        table(head, lines),
    ]
