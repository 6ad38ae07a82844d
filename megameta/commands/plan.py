"""``megameta plan``."""

import argparse

from megameta.commands.common import Commands, add_config_arguments


def add_parser(commands: Commands) -> None:
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
    plan.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the layouts."""
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
