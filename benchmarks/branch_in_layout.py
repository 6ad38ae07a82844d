"""Step time with the meta branch over without it, in any layout of ranks, by the engine.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/branch_in_layout.py parallel.tensor_parallel_size=2
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/branch_in_layout.py \\
        parallel.tensor_parallel_size=2 parallel.sequence_parallel=true

The baseline is the twin for speed: the same slots with the same meta-tokens, the branch off. All ranks take the same
turns, with a barrier before each; the seconds of rank 0 count, on the wall, as most of what is new in a layout is
waiting. Arguments like a.b=c go to the configuration.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from engine_overhead import random_batch
from paired import HEADER, ON_THE_WALL, measure, ratio
from step_time import PRESETS

from megameta.cluster.launch import initialize_process_group, make_topology, pick_device
from megameta.config import RunConfig, build_config
from megameta.config.loading import apply_overrides
from megameta.engine.pipeline_engine import make_engine
from megameta.model.flops import forward_flops
from megameta.train.loop import describe_layout


def make_config(arguments: argparse.Namespace, *, branch: bool) -> RunConfig:
    """The run of a side."""
    shape = {key: value for key, value in PRESETS[arguments.shape].items() if key not in ("length", "batch")}
    length = PRESETS[arguments.shape]["length"]
    model = {**shape, "meta_token_id": shape["vocab_size"] - 1, "max_position_embeddings": length}
    train = {"micro_batch_size": arguments.batch, "precision": arguments.precision}
    values = {
        "model": {**model, "meta_attention": branch},
        "data": {"sequence_length": length},
        "train": {**train, "global_batch_size": arguments.batch * arguments.accumulation * arguments.replicas},
    }
    return build_config(apply_overrides(values, arguments.overrides))


def make_turn(config: RunConfig, arguments: argparse.Namespace) -> Callable[[], float]:
    """A step of an engine of its own, on the same batch again and again; its seconds."""
    parallel = config.parallel
    sizes = {name: getattr(parallel, name) for name in ("tensor_parallel_size", "pipeline_parallel_size")}
    engine = make_engine(config, make_topology(arguments.device, **sizes))
    batches = [random_batch(config)] * arguments.accumulation

    def turn() -> float:
        dist.barrier()
        start = time.perf_counter()
        engine.train_step(batches, config.optimizer.lr)
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return turn


def main() -> None:
    """Print a table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=PRESETS, default="cpu")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="of the configuration")
    arguments = parser.parse_args()
    if not ON_THE_WALL:
        parser.error("unset BENCHMARK_CLOCK: a rank's processor seconds leave out what it waits for")
    arguments.device, arguments.replicas = pick_device("auto"), 1
    parallel = make_config(arguments, branch=True).parallel
    topology = make_topology(
        arguments.device,
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
    )
    initialize_process_group(topology)
    arguments.replicas = topology.data_parallel_size
    with_branch, without = (make_config(arguments, branch=branch) for branch in (True, False))
    baseline = make_turn(without, arguments)
    others = {"A/A: no branch, again": make_turn(without, arguments), "branch": make_turn(with_branch, arguments)}
    series = measure(baseline, others, arguments.pairs)
    if topology.is_main:
        slots, columns = with_branch.data.sequence_length, with_branch.data.num_meta_tokens
        print(
            f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} thread(s) a"
            f" rank, load {os.getloadavg()[0]:.1f}; {describe_layout(with_branch, topology)};"
            f" {PRESETS[arguments.shape] | {'batch': with_branch.train.global_batch_size}},"
            f" {columns} meta-tokens each"
        )
        print(HEADER)
        for name, values in series.items():
            print(ratio(name, *values).row())
        flops = [forward_flops(config.model, slots, columns) for config in (with_branch, without)]
        print(f"{'arithmetic (model flops)':<34} {flops[0] / flops[1]:6.3f}", flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that tears them down


if __name__ == "__main__":
    main()
