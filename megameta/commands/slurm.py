"""``megameta slurm``: submit a run, check its nodes, and what batch scripts ask."""

import argparse

from megameta.commands.common import Commands, add_config_arguments

#: Options of sbatch that have one of their own here; --sbatch takes the rest.
COMMON = ("partition", "account", "qos", "constraint", "reservation", "exclude", "nodelist", "mail-user", "mail-type")


def add_parser(commands: Commands) -> None:
    slurm = commands.add_parser("slurm", help="run on a SLURM cluster (docs/slurm.md)")
    parts = slurm.add_subparsers(dest="part", required=True, metavar="PART")
    _add_submit(parts)
    _add_check(parts)
    _add_fit(parts)
    run = parts.add_parser(
        "run",
        help="for batch scripts: start the ranks, pass the warning on, requeue or end the job",
        description="Start COMMAND (srun …), send it the SIGUSR1 that comes before the time limit, and decide what"
        " becomes of the job: done, requeued after a checkpoint or a failure (three in a row without a new checkpoint"
        " at most), or left as it is (scancel).",
    )
    run.add_argument("--chain", action="store_true", help="the job is a link of a chain: it ends at the time limit")
    run.add_argument("run_dir", metavar="RUN")
    run.add_argument("ranks", metavar="COMMAND", nargs=argparse.REMAINDER)
    run.set_defaults(run=_run)


def _add_submit(parts: Commands) -> None:
    submit = parts.add_parser(
        "submit",
        help="show the layout, write the batch script, submit it",
        description="Show what the run would be on these nodes, write its batch script into the run directory, and"
        " hand it to sbatch. The job requeues itself at its time limit until the run is done.",
    )
    add_config_arguments(submit)
    add = submit.add_argument
    add("--nodes", type=int, required=True, metavar="N")
    add("--min-nodes", type=int, default=None, metavar="N", help="start with as few, where there are no more")
    add("--time", default="24:00:00", metavar="LIMIT", help="of the job: 24:00:00, 1-12:00:00 (24:00:00)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="also the ranks a node (8)")
    add("--cpus-per-task", type=int, default=12, metavar="N", help="(12)")
    add("--warning", type=int, default=300, metavar="SECONDS", help="before the limit the run is told to save (300)")
    add(
        "--chain",
        type=int,
        default=1,
        metavar="K",
        help="K jobs that follow one another, in place of one that requeues",
    )
    add("--name", default=None, help="of the job (default: from the run directory; a chain's holds that, too)")
    add("--shared", action="store_true", help="without --exclusive")
    add("--env", default=None, metavar="FILE", help="sourced by the script (MEGAMETA_ENV, or else slurm/env.sh)")
    add("--finetune", action="store_true", help="megameta finetune in place of train")
    for option in COMMON:
        add(f"--{option}", default=None, help=f"sbatch's --{option}")
    add(
        "--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch; may be repeated"
    )
    add("--dry-run", action="store_true", help="print the script, write and submit nothing")
    submit.set_defaults(run=_submit)


def _add_check(parts: Commands) -> None:
    check = parts.add_parser(
        "check",
        help="under srun: check every node of a job",
        description="On every rank: GPU visible and its memory free, disk space for checkpoints, run.dir shared, the"
        " same source and packages, an all-reduce with a time limit and its bandwidth; a table, and exit code 1 with"
        " the name of the node. srun … megameta slurm check CONFIG; a training run does the same by itself.",
    )
    add_config_arguments(check)
    check.set_defaults(run=_check)


def _add_fit(parts: Commands) -> None:
    fit = parts.add_parser(
        "fit",
        help="for batch scripts: nodes to use, run directory, overrides; a line each",
        description="The most nodes of a job on which the global batch can be shared, with the largest micro-batch up"
        " to the configured one.",
    )
    add_config_arguments(fit)
    fit.add_argument("--nodes", type=int, default=None, metavar="N", help="(default: the job's)")
    fit.add_argument("--per-node", type=int, default=None, metavar="N", help="ranks a node (default: the job's)")
    fit.set_defaults(run=_fit)


def _submit(arguments: argparse.Namespace) -> int:
    from megameta.cluster.slurm.script import Options
    from megameta.cluster.slurm.submit import further_options, submit
    from megameta.train.run_config import load_run_config

    more = {option: getattr(arguments, option.replace("-", "_")) for option in COMMON}
    options = Options(
        command="finetune" if arguments.finetune else "train",
        nodes=arguments.nodes,
        min_nodes=arguments.min_nodes,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_task=arguments.cpus_per_task,
        time=arguments.time,
        warning=arguments.warning,
        name=arguments.name,
        exclusive=not arguments.shared,
        env=arguments.env,
        more={**{k: v for k, v in more.items() if v is not None}, **further_options(arguments.sbatch)},
    )
    config = load_run_config(arguments.config, arguments.overrides, need_files=False)
    how = {"chain": arguments.chain, "dry_run": arguments.dry_run}
    return submit(config, arguments.config, arguments.overrides, options, **how)


def _check(arguments: argparse.Namespace) -> int:
    from megameta.train.run import preflight

    return preflight(arguments.config, arguments.overrides)


def _fit(arguments: argparse.Namespace) -> None:
    from megameta.cluster.slurm.fit import fit, granted
    from megameta.config import device_of
    from megameta.train.run_config import load_run_config

    config = load_run_config(arguments.config, arguments.overrides)
    nodes, per_node = arguments.nodes, arguments.per_node
    if nodes is None or per_node is None:
        nodes, per_node = granted()
    found = fit(config, nodes, per_node, device_of(config))
    print("\n".join([str(found.nodes), config.run.dir, *found.overrides(config)]))


def _run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from megameta.cluster.slurm.supervise import run_job

    return run_job(Path(arguments.run_dir), arguments.ranks, chain=arguments.chain)
