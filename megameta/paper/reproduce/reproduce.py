"""``megameta reproduce``: a figure or table of the paper at a scale, from nothing to the report."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megameta.errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from megameta.files import write_text_atomically

if TYPE_CHECKING:
    from megameta.paper.reproduce.jobs import JobRunner
    from megameta.paper.reproduce.runs import Experiment


def reproduce(
    target: str,
    scale_name: str,
    overrides: list[str],
    *,
    output: str | None,
    jobs: int | None,
    time_limit: float | None,
    dry_run: bool,
    partial: bool,
) -> int:
    """Run what is not done yet and write OUTPUT/TARGET/report.md.

    Args:
        output: directory of all targets of a scale, which share their runs. Default: reproduce/SCALE.
        jobs: runs at a time.
        time_limit: minutes after which to stop; the next start goes on.
        dry_run: only list the jobs.
        partial: run nothing; report what is done.
    """
    from megameta.paper.reproduce.jobs import JobRunner, Stopped
    from megameta.paper.reproduce.runs import Experiment
    from megameta.paper.reproduce.scale import load_scale
    from megameta.paper.reproduce.targets import TARGETS

    scale = load_scale(scale_name, overrides)
    root = Path(output) if output is not None else Path("reproduce") / Path(scale_name).stem
    experiment = Experiment(scale, root)
    found = TARGETS[target]
    slots, environments = job_slots(jobs or scale.jobs, scale.processes)
    runner = JobRunner(root, found.jobs(experiment), slots, environments=environments)
    left = [job for job in runner.jobs if not runner.is_done(job)]
    print(f"{found.title}: {scale.description}; in {root}, {slots} at a time", flush=True)
    print(f"{len(runner.jobs)} jobs, {len(runner.jobs) - len(left)} of them done", flush=True)
    if dry_run:
        for job in runner.jobs:
            print(f"  {'to do' if job in left else 'done '} {job.name}")
        return EXIT_OK
    done = frozenset(job.name for job in runner.jobs if job not in left)
    if partial:
        return _report(Experiment(scale, root, done), target, runner, [_not_whole(runner, len(left))] if left else [])
    try:
        runner.run(None if time_limit is None else 60 * time_limit)
    except Stopped:
        print("stopped; what is done is kept: the same command goes on; --partial reports what is done", flush=True)
        return EXIT_INTERRUPTED
    return _report(experiment, target, runner, [])


def _report(experiment: "Experiment", target: str, runner: "JobRunner", notes: list[str]) -> int:
    """Write and print OUTPUT/TARGET/report.md of what the experiment has."""
    from megameta.paper.reproduce.report import document
    from megameta.paper.reproduce.targets import TARGETS

    found = TARGETS[target]
    directory = experiment.output / target
    directory.mkdir(parents=True, exist_ok=True)
    parts = [*notes, *found.report(experiment, directory)]
    command = shlex.join(["megameta", *sys.argv[1:]])
    text = document(found.title, command, experiment, sum(runner.seconds().values()), parts)
    write_text_atomically(directory / "report.md", text)
    print(text)
    print(f"report: {directory / 'report.md'}")
    return EXIT_OK


def _not_whole(runner: "JobRunner", left: int) -> str:
    """The note of a report on a part of the work."""
    count = len(runner.jobs)
    if left == count:
        raise UserError(f"nothing is done yet of what the report needs ({count} jobs): start it without --partial")
    return (
        f"**Not whole: {count - left} of {count} jobs have run.** Cells are over the seeds that have; what has not run"
        " is left out or a dash."
    )


def job_slots(jobs: int, processes: int) -> tuple[int, list[dict[str, str]]]:
    """How many runs at a time, and the environment of each slot: GPUs of its own, or one thread on a CPU."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus:
        count = jobs or max(1, gpus // processes)
        groups = [range(first, first + processes) for first in range(0, gpus - processes + 1, processes)] or [
            range(gpus)
        ]
        return count, [{"CUDA_VISIBLE_DEVICES": ",".join(map(str, group))} for group in groups]
    cores = len(os.sched_getaffinity(0))
    return jobs or max(1, cores // processes), [{"OMP_NUM_THREADS": "1"}]
