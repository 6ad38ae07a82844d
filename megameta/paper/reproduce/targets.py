"""What ``megameta reproduce`` makes: for each target its jobs, and its report from what they left."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megameta.errors import UserError
from megameta.paper.reproduce.arms import find_arms
from megameta.paper.reproduce.figures import draw_figure1
from megameta.paper.reproduce.jobs import Job
from megameta.paper.reproduce.perplexity import perplexity_parts, perplexity_values
from megameta.paper.reproduce.report import figure1_parts, table2_parts
from megameta.paper.reproduce.results import Scores, final_scores, training_scores
from megameta.paper.reproduce.runs import CONDITIONS, Cell, Experiment
from megameta.paper.reproduce.speed import speed_job, speed_parts
from megameta.paper.reproduce.yarn import table1_jobs, table1_parts


@dataclass(frozen=True)
class Target:
    """One figure or table of the paper.

    Attributes:
        jobs: all that it takes, each after those that it needs.
        report: parts of the report in Markdown; pictures go to the directory.
    """

    title: str
    jobs: Callable[[Experiment], list[Job]]
    report: Callable[[Experiment, Path], list[str]]


# --- figure 1 and table 2 ---------------------------------------------------------------------------------------------


def cells(experiment: Experiment) -> list[Cell]:
    """The fine-tuned models. Tasks are outermost, then seeds: an interrupted experiment has whole seeds of a task,
    and the first task gets all of them, without which nothing can be claimed."""
    scale = experiment.scale
    return [
        Cell(arm, task, seed) for task in scale.tasks.names for seed in scale.seeds for arm in find_arms(scale.arms)
    ]


def figure1_evaluations(experiment: Experiment, cell: Cell) -> dict[str, list[int]]:
    """Bins by condition: all as trained and, where there are lengths beyond those, with positions zeroed (the very
    job that table 2 has); those beyond by YaRN as well."""
    scale, last = experiment.scale, experiment.scale.phases[-1]
    beyond = [bound for bound in scale.tasks.bins if bound > last]
    if cell.arm.position == "ape":
        return {"as trained": [bound for bound in scale.tasks.bins if bound <= last]}
    found = {"as trained": scale.tasks.bins}
    if beyond and cell.arm.meta_tokens:
        found["positions zeroed"] = scale.tasks.bins
    if beyond and cell.arm.position == "rope":
        found[f"yarn {beyond[-1] / last:g}"] = beyond
    return found


def table2_evaluations(experiment: Experiment, cell: Cell) -> dict[str, list[int]]:
    """All bins under every condition."""
    scale, last = experiment.scale, experiment.scale.phases[-1]
    if not cell.arm.meta_tokens:
        return {}
    bins = [bound for bound in scale.tasks.bins if cell.arm.position != "ape" or bound <= last]
    return dict.fromkeys(CONDITIONS, bins)


def _task_jobs(experiment: Experiment, evaluations: Callable[[Experiment, Cell], dict[str, list[int]]]) -> list[Job]:
    found = {"data": experiment.data_job(), "tasks": experiment.tasks_job()}
    for cell in cells(experiment):
        wanted = evaluations(experiment, cell)
        if not wanted:
            continue
        if experiment.scale.pretrain:
            job = experiment.pretrain_job(cell.arm, cell.seed)
            found.setdefault(job.name, job)
        jobs = [experiment.finetune_job(cell)]
        jobs += [experiment.evaluate_job(cell, condition, bins) for condition, bins in wanted.items()]
        found |= {job.name: job for job in jobs}
    return list(found.values())


def figure1_report(experiment: Experiment, directory: Path) -> list[str]:
    scores = []
    for cell in cells(experiment):
        scores += training_scores(experiment, cell)
        for condition in figure1_evaluations(experiment, cell):
            scores += final_scores(experiment, cell, condition)
    found = Scores(scores)
    draw_figure1(found, experiment.scale, directory / "figure1.png")
    return figure1_parts(found, experiment)


def table2_report(experiment: Experiment, _directory: Path) -> list[str]:
    found = [
        score
        for cell in cells(experiment)
        for condition in table2_evaluations(experiment, cell)
        for score in final_scores(experiment, cell, condition)
    ]
    if not found:
        raise UserError(f"table2 needs an arm with meta-tokens; the scale has {', '.join(experiment.scale.arms)}")
    return table2_parts(Scores(found), experiment, list(CONDITIONS))


# --- perplexity -------------------------------------------------------------------------------------------------------


def perplexity_jobs(experiment: Experiment) -> list[Job]:
    if not experiment.scale.pretrain:
        raise UserError("ppl needs a scale with pre-training; this one has none")
    jobs = [experiment.data_job()]
    for seed in experiment.scale.seeds:
        for arm in find_arms(experiment.scale.arms):
            jobs += [experiment.pretrain_job(arm, seed), experiment.perplexity_job(arm, seed)]
    return jobs


def perplexity_report(experiment: Experiment, directory: Path) -> list[str]:
    return perplexity_parts(perplexity_values(experiment), experiment, directory)


TARGETS = {
    "figure1": Target(
        "Figure 1: accuracy on the four tasks",
        lambda experiment: _task_jobs(experiment, figure1_evaluations),
        figure1_report,
    ),
    "table1": Target("Table 1: list recall beyond the window, by YaRN", table1_jobs, table1_parts),
    "table2": Target(
        "Table 2: positions of meta-tokens zeroed",
        lambda experiment: _task_jobs(experiment, table2_evaluations),
        table2_report,
    ),
    "ppl": Target("Perplexity of the twins on held-out text", perplexity_jobs, perplexity_report),
    "inference": Target("Speed of decoding", lambda experiment: [speed_job(experiment)], speed_parts),
}
