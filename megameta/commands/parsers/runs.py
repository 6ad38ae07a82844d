"""Commands that make runs: train, finetune, extend, plan."""

import argparse
import os
from typing import TYPE_CHECKING

from megameta.commands.parsers.common import Commands, add_config_arguments
from megameta.errors import UserError

if TYPE_CHECKING:
    from megameta.cluster.stop import StopRequest


def add_runs(commands: Commands) -> None:
    """train, finetune, extend, plan."""
    _add_train(commands)
    _add_finetune(commands)
    _add_extend(commands)
    _add_plan(commands)


def _add_train(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a model, or go on with a run",
        description="Train the model of a configuration. A run that was stopped goes on by itself when started again."
        " Exit codes: 0 done, 1 failed, 75 stopped by SIGTERM or SIGUSR1 after saving a checkpoint.",
    )
    add_config_arguments(train)
    train.add_argument(
        "--nproc-per-node",
        metavar="N",
        default=None,
        help="start N processes on this machine; auto: one a GPU (torchrun, deepspeed and srun work too)",
    )
    train.set_defaults(run=_train)


def _add_finetune(commands: Commands) -> None:
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune on the four tasks, in phases of growing length",
        description="Fine-tune a model on tasks (finetune.directory, from megameta tasks generate); weights come from"
        " init.from_checkpoint. Stops and goes on like train.",
    )
    add_config_arguments(finetune)
    finetune.add_argument("--nproc-per-node", metavar="N", default=None, help="as of train")
    finetune.set_defaults(run=_finetune)


def _add_extend(commands: Commands) -> None:
    extend = commands.add_parser(
        "extend",
        help="write the configuration of going on at a longer window",
        description="From a run or checkpoint with rotary positions, write the YAML file of continued pre-training (or"
        " of fine-tuning, where the run did that) at a multiple of its window: sequences, scaled positions, batch,"
        " steps and schedule. docs/extension.md says what the methods do. Nothing is trained here.",
    )
    add = extend.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT")
    add("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the new configuration")
    add("--factor", type=float, required=True, help="of the window")
    add("--method", choices=("yarn", "ntk", "linear", "none"), default="yarn", help="of scaling (default: yarn)")
    add("--total", action="store_true", help="of an extended model: the factor is of the window before any extension")
    add("--output", metavar="FILE", default=None, help="(default: RUN-METHODFACTOR.yaml in this directory)")
    add("--steps", type=int, default=None, metavar="N", help="(default: a hundredth of the run's, at least 100)")
    add("--lr", type=float, default=None, help="peak learning rate (default: that at the end of the run)")
    extend.set_defaults(run=_extend)


def _add_plan(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="propose parallel layouts that fit a number of GPUs",
        description="List layouts (tensor, pipeline and data parallel, ZeRO stage, micro-batch, recomputation) that"
        " fit, the fastest first by a cost model; docs/planning.md states it. Defaults are for H100 SXM nodes.",
    )
    add_config_arguments(plan)
    plan.add_argument("--gpus", type=int, required=True, metavar="N")
    plan.add_argument("--gpu-memory", default="80GB", metavar="SIZE", help="of one GPU (default: 80GB)")
    plan.add_argument("--gpus-per-node", type=int, default=None, metavar="N", help="(default: 8)")
    plan.add_argument("--peak-tflops", type=float, default=None, help="of a GPU (default: 989; in fp32 67)")
    plan.add_argument("--efficiency", type=float, default=None, help="of matrix products (default: 0.6)")
    plan.add_argument("--memory-bandwidth", type=float, default=None, metavar="GB/S", help="(default: 3000)")
    plan.add_argument("--intra-bandwidth", type=float, default=None, metavar="GB/S", help="in a node (default: 300)")
    plan.add_argument("--inter-bandwidth", type=float, default=None, metavar="GB/S", help="between nodes (default: 40)")
    plan.add_argument("--limit", type=int, default=10, metavar="N", help="layouts to show (default: 10)")
    plan.add_argument("--json", metavar="FILE", default=None, help="also write them there")
    plan.set_defaults(run=_plan)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.nproc_per_node is not None and "RANK" not in os.environ:
        return _launch("train", arguments)
    stop = _listen()
    from megameta.paper.analysis.training import AttentionProbe
    from megameta.train.run import train

    return train(arguments.config, arguments.overrides, make_probe=AttentionProbe, stop=stop)


def _finetune(arguments: argparse.Namespace) -> int:
    if arguments.nproc_per_node is not None and "RANK" not in os.environ:
        return _launch("finetune", arguments)
    stop = _listen()
    from megameta.finetune.data import TaskData
    from megameta.train.run import train

    return train(arguments.config, arguments.overrides, TaskData, stop=stop)


def _launch(command: str, arguments: argparse.Namespace) -> int:
    from megameta.cluster.launch import launch_local, pick_device

    count = _process_count(arguments.nproc_per_node, pick_device("auto"))
    return launch_local([command, arguments.config, *arguments.overrides], count)


def _listen() -> "StopRequest":
    """Before torch is imported, which may take a minute from a busy file system: a signal would kill the rank."""
    from megameta.cluster.stop import StopRequest

    stop = StopRequest()
    stop.listen()
    return stop


def _extend(arguments: argparse.Namespace) -> int:
    from megameta.commands.extend import extend

    options = {key: getattr(arguments, key) for key in ("factor", "method", "total", "output", "steps", "lr")}
    return extend(arguments.source, arguments.overrides, **options)


def _plan(arguments: argparse.Namespace) -> int:
    from megameta.plan.report import make_plan
    from megameta.train.run_config import load_run_config

    def scaled(value: float | None, unit: float) -> float | None:
        return None if value is None else value * unit

    return make_plan(
        load_run_config(arguments.config, arguments.overrides, need_files=False),
        [arguments.config, *arguments.overrides],
        gpus=arguments.gpus,
        gpu_memory=arguments.gpu_memory,
        hardware={
            "gpus_per_node": arguments.gpus_per_node,
            "peak_flops": scaled(arguments.peak_tflops, 1e12),
            "efficiency": arguments.efficiency,
            "memory_bandwidth": scaled(arguments.memory_bandwidth, 1e9),
            "intra_bandwidth": scaled(arguments.intra_bandwidth, 1e9),
            "inter_bandwidth": scaled(arguments.inter_bandwidth, 1e9),
        },
        limit=arguments.limit,
        json_path=arguments.json,
    )


def _process_count(wanted: str, device: str) -> int:
    if wanted == "auto":
        import torch

        return torch.cuda.device_count() if device == "cuda" else 1
    if not wanted.isdigit() or int(wanted) < 1:
        raise UserError(f"--nproc-per-node {wanted}: a number of at least 1, or auto")
    return int(wanted)
