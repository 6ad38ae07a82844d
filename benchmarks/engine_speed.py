"""Tokens/s and mfu of the engine under DeepSpeed, and what the branch costs there, in turns of separate processes.

    python benchmarks/engine_speed.py                                            # CPU, a small model
    python benchmarks/engine_speed.py --device cuda --shape 152m
    python benchmarks/engine_speed.py --device cuda --shape 1.3b --no-baseline train.activation_checkpointing=true

The baseline is the twin for speed: the same slots with the same meta-tokens, the branch off. mfu is model flops (a
recomputed forward pass does not count) over the rate of a matrix product measured on the same device.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from paired import HEADER, ON_THE_WALL, measure, ratio
from sides import Side, write_random_dataset, write_run

from megameta.cluster.machine import measure_peak_flops
from megameta.config.derived import step_flops
from megameta.model import ModelConfig
from megameta.train.run_config import load_run_config

#: Model, micro-batch size, accumulation steps.
SHAPES: dict[str, tuple[dict[str, int], int, int]] = {
    "smoke": ({"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "length": 64}, 4, 2),
    "tiny": ({"hidden_size": 256, "num_layers": 4, "num_heads": 4, "vocab_size": 8192, "length": 512}, 4, 1),
    "152m": ({"hidden_size": 768, "num_layers": 12, "num_heads": 12, "vocab_size": 50258, "length": 1024}, 16, 4),
    "1.3b": ({"hidden_size": 2048, "num_layers": 24, "num_heads": 16, "vocab_size": 50258, "length": 1024}, 8, 8),
}


def measure_sides(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rows, seconds a step by side, peak bytes by side, and flops of a step with the branch and without."""
    shape, micro, accumulation = SHAPES[arguments.shape]
    model = {key: value for key, value in shape.items() if key != "length"}
    config = ModelConfig(**model, max_position_embeddings=shape["length"])
    write_random_dataset(folder / "train", config.vocab_size - 1, 2_000_000)
    train = {"micro_batch_size": micro, "global_batch_size": micro * accumulation, "precision": arguments.precision}
    write_run(folder / "run.yaml", config, {"train": train, "parallel": {"zero_stage": arguments.zero_stage}})
    off = ["model.meta_attention=false"]
    wanted: dict[str, list[str]] = {"branch": []}
    if not arguments.no_baseline:
        wanted = {"no branch": off, "A/A: no branch, again": off, "branch": []}
    sides, flops = [], {}
    try:
        for name, own in wanted.items():
            overrides = [*own, *arguments.overrides]
            settings = {"config": str(folder / "run.yaml"), "overrides": overrides, "device": arguments.device}
            sides.append(Side("ours", name, arguments.steps, settings, folder))
            flops[name] = step_flops(load_run_config(folder / "run.yaml", overrides))
        for side in sides:
            side.wait()
        base, *others = sides
        if others:
            series = measure(base.run, {side.name: side.run for side in others}, arguments.pairs)
        else:
            series = {base.name: ([base.run() for _ in range(arguments.pairs + 1)][1:], [1.0] * arguments.pairs)}
        peaks = {side.name: side.last["peak_bytes"] for side in sides}
    finally:
        for side in sides:
            side.close()
    rows = [ratio(name, *values) for name, values in series.items()] if others else []
    seconds = {name: statistics.median(own) / arguments.steps for name, (own, _) in series.items()}
    if others:
        seconds[base.name] = statistics.median(series[others[0].name][1]) / arguments.steps
    slots = micro * accumulation * shape["length"]
    return {"rows": rows, "seconds": seconds, "peak_bytes": peaks, "flops": flops, "slots_a_step": slots}


def main() -> None:
    """Take turns; print ratios, tokens/s and mfu."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps of a turn")
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--no-baseline", action="store_true", help="the branch alone: tokens/s and mfu")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parser.parse_args()
    arguments.precision = "bf16" if arguments.device == "cuda" else "fp32"
    peak = measure_peak_flops(arguments.device, arguments.precision)
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        found = measure_sides(arguments, Path(folder))
    where = f"{arguments.device}, {arguments.precision}, torch {torch.__version__}, overrides {arguments.overrides}"
    print(f"{arguments.shape}: {SHAPES[arguments.shape]}, {found['slots_a_step']} slots a step, {where}")
    if found["rows"]:
        print(HEADER.replace("step", "turn"))
    for row in found["rows"]:
        print(row.row())
    for name, seconds in found["seconds"].items():
        rate, memory = found["slots_a_step"] / seconds, found["peak_bytes"][name] / 2**20
        said = "mfu not stated (processor seconds)"
        if ON_THE_WALL:
            mfu = found.setdefault("mfu", {})[name] = found["flops"][name] / seconds / peak
            said = f"mfu {mfu:.3f} of {peak / 1e12:.2f} TFLOP/s"
        print(f"{name:<34} {rate:12,.0f} tokens/s, {said}, peak {memory:,.0f} MiB")
        found.setdefault("tokens_per_second", {})[name] = rate
    if arguments.json:
        record = {
            "command": sys.argv,
            "torch": torch.__version__,
            "peak_flops": peak,
            **found,
            "rows": [vars(row) for row in found["rows"]],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
