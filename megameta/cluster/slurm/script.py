"""The batch scripts of ``slurm/`` for training and fine-tuning, as text: ``submit`` writes them with other values."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Options:
    """What a job asks for."""

    command: str = "train"
    nodes: int = 1
    min_nodes: int | None = None
    """Go on with as few as these, where there are no more."""
    gpus_per_node: int = 8
    """Also the tasks a node."""
    cpus_per_task: int = 12
    time: str = "24:00:00"
    warning: int = 300
    """Seconds before the time limit at which the run is told to save."""
    name: str | None = None
    chain: bool = False
    exclusive: bool = True
    env: str | None = None
    """A file that bash sources; none: MEGAMETA_ENV's, or else that of slurm/."""
    log: str = "slurm-%x-%j.out"
    arguments: tuple[str, ...] = ()
    """CONFIG and overrides, quoted for bash; none: those of sbatch's own command line."""
    more: Mapping[str, str | None] = field(default_factory=dict)
    """Further options of sbatch, without dashes."""


def render(options: Options) -> str:
    """The script."""
    nodes = f"{options.min_nodes}-{options.nodes}" if options.min_nodes else str(options.nodes)
    # With one task a node SLURM takes the least number of nodes, whatever is free (22.05); without it the most.
    single = options.min_nodes is not None and options.gpus_per_node == 1
    tasks = {} if single else {"ntasks-per-node": str(options.gpus_per_node)}
    directives: dict[str, str | None] = {
        "job-name": options.name or "megameta",
        "nodes": nodes,
        **tasks,
        "gpus-per-node": str(options.gpus_per_node),
        "cpus-per-task": str(options.cpus_per_task),
        "mem": "0",
        **({"exclusive": None} if options.exclusive else {}),
        "time": options.time,
        "signal": f"B:USR1@{options.warning}",
        "requeue": None,
        "open-mode": "append",
        "output": options.log,
        **options.more,
    }
    lines = [
        f"#SBATCH --{key}" + (f"={shlex.quote(value)}" if value is not None else "")
        for key, value in directives.items()
    ]
    usage = (
        "" if options.arguments else f"# sbatch --nodes 4 slurm/{FILES[options.command]} CONFIG [section.key=value …]\n"
    )
    own = f"set -- {' '.join(options.arguments)}\n" if options.arguments else ""
    return _SCRIPT.format(
        usage=usage,
        directives="\n".join(lines),
        env='"${MEGAMETA_ENV:-slurm/env.sh}"' if options.env is None else shlex.quote(options.env),
        own=own,
        chain=" --chain" if options.chain else "",
        command=options.command,
    )


FILES = {"train": "pretrain.sbatch", "finetune": "finetune.sbatch"}

_SCRIPT = """\
#!/bin/bash
{usage}{directives}
#
# docs/slurm.md explains each line. USR1 comes to this script alone, as many seconds before the time limit as it says.
set -euo pipefail
# A warning or a preemption this early: nothing is there to save, and a script that dies of it is not requeued.
trap '' USR1 TERM
{own}source {env}

# A line each: nodes to use (the job may have got fewer than it asked for), the run directory, overrides that keep the
# global batch. A mistake in the configuration ends the job here.
fit=$(python -m megameta slurm fit "$@")
mapfile -t fit <<<"$fit"
mkdir -p "${{fit[1]}}/logs"

# From here on megameta stands where this script was: it passes the warning on to srun, and requeues the job or ends it.
exec python -m megameta slurm run{chain} "${{fit[1]}}" \\
    srun --nodes="${{fit[0]}}" --ntasks-per-node="${{SLURM_NTASKS_PER_NODE:-1}}" \\
        --cpus-per-task="$SLURM_CPUS_PER_TASK" --distribution=block:block --cpu-bind=cores --gpu-bind=none \\
        --kill-on-bad-exit=1 --unbuffered --open-mode=append --output="${{fit[1]}}/logs/%j-%N.log" \\
        python -m megameta {command} "$@" "${{fit[@]:2}}"
"""
