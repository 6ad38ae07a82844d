"""``megameta slurm submit``: show the layout, write the batch script into the run directory, hand it to sbatch."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from megameta.cluster.slurm.fit import fit_exactly
from megameta.cluster.slurm.script import Options, render
from megameta.config import RunConfig, assume, device_of
from megameta.config.validate import problems
from megameta.errors import EXIT_OK, UserError
from megameta.files import write_text_atomically
from megameta.plan.describe import describe, describe_layout, missing_files
from megameta.plan.layout import Layout

#: Options of sbatch that follow from others of submit.
OWN = {
    **{"job-name": "--name", "nodes": "--nodes and --min-nodes", "time": "--time", "signal": "--warning"},
    **{"ntasks-per-node": "--gpus-per-node", "gpus-per-node": "--gpus-per-node", "cpus-per-task": "--cpus-per-task"},
    "output": "run.dir (the output goes into its logs)",
}


def submit(
    config: RunConfig, path: str, overrides: list[str], options: Options, *, chain: int = 1, dry_run: bool = False
) -> int:
    """Submit a run as a job, or as a chain of jobs that follow one another; the exit code.

    Args:
        path, overrides: what ``config`` was read from, for the script.

    Raises:
        UserError: the run does not fit the nodes, sbatch refuses, or SLURM is not there.
    """
    _check_options(options, chain)
    _show(assume(config, device_of(config)), options, device_of(config))
    run_dir = Path(config.run.dir)
    if "%" in config.run.dir:
        raise UserError(f"run.dir {config.run.dir}: SLURM would replace what follows % in the names of logs; rename it")
    arguments = tuple(shlex.quote(word) for word in (str(Path(path).resolve()), *overrides))
    log = str(run_dir / "logs" / "%j.out")
    env = Path(options.env or os.environ.get("MEGAMETA_ENV", "slurm/env.sh")).resolve()
    options = replace(options, env=str(env), arguments=arguments, chain=chain > 1, log=log)
    options = _as_links(options, run_dir) if chain > 1 else replace(options, name=options.name or job_name(run_dir))
    script = render(options)
    lacking = f"{env}: no such file; copy slurm/env.sh of megameta's repository, edit it, and name it with --env"
    if dry_run:
        print(*([] if env.is_file() else [f"not there yet: {lacking}"]), f"\n{script}", sep="\n")
        return EXIT_OK
    if not env.is_file():
        raise UserError(lacking)
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on this machine: submit from a login node of the cluster, or see --dry-run")
    file = run_dir / "logs" / f"submitted-{time.strftime('%Y%m%d-%H%M%S')}.sbatch"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(file, script)
    print(f"script     {file}")
    for link in range(1, chain + 1):
        job = _sbatch(file)
        print(f"job        {job}" + (f" (link {link} of {chain})" if chain > 1 else ""))
    print(f"output     {log.replace('%j', job)}; a log a node beside it")
    print(f"next: megameta status {shlex.quote(str(run_dir))}")
    return EXIT_OK


def _as_links(options: Options, run_dir: Path) -> Options:
    """The name holds a chain together: each link waits until no job of its name runs any more, and the last word about
    a run cancels those of its name that wait. So the run's directory is in it, whatever the user calls it."""
    more = dict(options.more)
    more["dependency"] = ",".join(filter(None, [more.get("dependency"), "singleton"]))
    return replace(options, name=job_name(run_dir, options.name), more=more)


def job_name(run_dir: Path, called: str | None = None) -> str:
    """Of all jobs of a run directory, and of no other's."""
    digest = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", called or run_dir.name)[:40]
    return f"megameta-{readable}-{digest}"


def further_options(given: list[str]) -> dict[str, str | None]:
    """``--sbatch KEY=VALUE`` or ``KEY``, with or without dashes before."""
    found: dict[str, str | None] = {}
    for word in given:
        key, equals, value = word.lstrip("-").partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or "\n" in value:
            raise UserError(f"--sbatch {word!r}: write it as --sbatch mail-type=END")
        if key in OWN:
            raise UserError(f"--sbatch {key}: use {OWN[key]} of megameta slurm submit")
        found[key] = value if equals else None
    return found


def _check_options(options: Options, chain: int) -> None:
    if options.nodes < 1 or options.gpus_per_node < 1 or chain < 1:
        raise UserError("--nodes, --gpus-per-node and --chain are numbers of at least 1")
    if options.min_nodes is not None and not 1 <= options.min_nodes <= options.nodes:
        raise UserError(f"--min-nodes {options.min_nodes}: between 1 and --nodes {options.nodes}")
    limit = seconds_of(options.time)
    if limit is None:
        raise UserError(f"--time {options.time}: write it as SLURM does: 24:00:00, 1-12:00:00, or minutes")
    # SLURM may warn a minute early; a job that is warned as soon as it begins would go round and round.
    if not 1 <= options.warning <= limit - 120:
        raise UserError(
            f"--warning {options.warning}: the run is told to save so many seconds before the limit of {limit} s; leave"
            " it at least two minutes before that, and one second after"
        )


def seconds_of(limit: str) -> int | None:
    """Seconds of a time limit as SLURM writes it; None of anything else."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", limit):
        return None
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((24 * int(days or 0) + hours) * 60 + minutes) * 60 + seconds


def _show(config: RunConfig, options: Options, device: str) -> None:
    world, per_node = options.nodes * options.gpus_per_node, options.gpus_per_node
    shown, fitted = config, fit_exactly(config, options.nodes, per_node, device)
    if fitted is not None and fitted.micro_batch_size != config.train.micro_batch_size:
        print(
            f"note       train.micro_batch_size {fitted.micro_batch_size} in place of {config.train.micro_batch_size},"
            f" so that {world} ranks share {config.train.global_batch_size} sequences"
        )
        shown = fitted.apply(config)
    print("\n".join(describe(shown, world)))
    found = problems(shown, world_size=world, device=device)
    if found:
        raise UserError("\n  ".join([f"{world} ranks on {options.nodes} node(s): {len(found)} problem(s):", *found]))
    print("\n".join(describe_layout(shown, Layout.of(shown, world))))
    for missing in missing_files(config):
        print(f"not there yet: {missing}")
    for nodes in range(options.nodes - 1, (options.min_nodes or options.nodes) - 1, -1):
        fewer = fit_exactly(config, nodes, per_node, device)
        how = f"micro-batch {fewer.micro_batch_size}, the same global batch" if fewer else "not used: fewer are"
        print(f"on {nodes} node(s), should there be no more: {how}")


def _sbatch(file: Path) -> str:
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refuses {file}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]
