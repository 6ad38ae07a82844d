"""What a device does in a training step: kernels by time, how long it is idle, where the host waits for it.

    python benchmarks/trace_step.py --shape tiny
    python benchmarks/trace_step.py --device cuda --shape 152m --trace trace.json.gz

torch's profiler over some steps of the engine with the defaults, after steps that compile. Trace files open in
https://ui.perfetto.dev.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from engine_speed import SHAPES
from sides import ALONE, write_random_dataset, write_run

from megameta.cluster.launch import free_port
from megameta.model import ModelConfig

WARMUP, STEPS, ROWS = 3, 2, 25
#: What a host that waits for a device calls.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")


def profile(arguments: argparse.Namespace, folder: Path) -> tuple[Any, float]:
    """(the profiler's record, seconds of its steps on the wall)."""
    from megameta.cluster.launch import initialize_process_group, make_topology
    from megameta.engine.engine import Engine
    from megameta.train.data import PretrainingData
    from megameta.train.run_config import load_run_config

    shape, micro, accumulation = SHAPES[arguments.shape]
    model = ModelConfig(**{k: v for k, v in shape.items() if k != "length"}, max_position_embeddings=shape["length"])
    write_random_dataset(folder / "train", model.vocab_size - 1, 400_000)
    train = {"micro_batch_size": micro, "global_batch_size": micro * accumulation, "precision": "auto"}
    write_run(folder / "run.yaml", model, {"train": train, "run": {"device": arguments.device}})
    os.environ |= ALONE | {"MASTER_PORT": str(free_port())}
    topology = make_topology(arguments.device)
    initialize_process_group(topology)
    config = load_run_config(folder / "run.yaml", arguments.overrides)
    loader, engine = PretrainingData(config, topology).loader(), Engine(config, topology)
    for number in range(WARMUP):
        engine.train_step(loader.read(number, number + 1), 1e-4)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if arguments.device == "cuda" else []
    with torch.profiler.profile(activities=kinds) as record:
        start = time.perf_counter()
        for number in range(WARMUP, WARMUP + STEPS):
            engine.train_step(loader.read(number, number + 1), 1e-4)
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    if arguments.trace:
        record.export_chrome_trace(str(arguments.trace))
    return record, seconds


def summarise(record: Any, seconds: float, device: str) -> dict[str, Any]:
    """Of a step: kernels with their seconds and numbers, the share of time without one, waits by kind."""
    on_device = device == "cuda"
    kind = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
    rows = []
    for event in record.key_averages():
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        if event.device_type == kind and own:
            rows.append({"name": event.key, "seconds": own / 1e6 / STEPS, "calls": event.count / STEPS})
    rows.sort(key=lambda row: -row["seconds"])
    busy = sum(row["seconds"] for row in rows)
    waits = {event.key: event.count / STEPS for event in record.key_averages() if event.key in WAITS}
    return {
        "seconds": seconds / STEPS,
        "busy_seconds": busy,
        "kernels": sum(row["calls"] for row in rows),
        "waits": waits,
        "rows": rows[:ROWS],
    }


def main() -> None:
    """Print the longest kernels and what the rest comes to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--trace", type=Path, default=None, help="for a viewer: FILE.json.gz")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = summarise(*profile(arguments, Path(folder)), arguments.device)
    print(f"{arguments.shape}: {SHAPES[arguments.shape]}, {arguments.device}, torch {torch.__version__}")
    for row in found["rows"]:
        print(f"{1e3 * row['seconds']:10.3f} ms {row['calls']:8.0f} ×  {row['name'][:90]}")
    print(
        f"a step: {1e3 * found['seconds']:.1f} ms under the profiler, {found['kernels']:.0f} kernels that take"
        f" {1e3 * found['busy_seconds']:.1f} ms; waits of the host: {found['waits'] or 'none seen'}"
    )
    if arguments.json:
        record = {"command": sys.argv, "torch": torch.__version__, **found}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # threads of the process group may abort a normal exit


if __name__ == "__main__":
    main()
