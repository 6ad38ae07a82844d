"""Time and memory of a training step by sequence length, with document masks, with the branch and without.

    python benchmarks/long_sequences.py                                     # CPU: D 64, L 2
    python benchmarks/long_sequences.py --device cuda --lengths 1024,4096,8192,32768

A step is forward and backward of as many slots at every length; the optimiser, whose cost does not depend on it, is
left out. The baseline is the twin for speed: the same slots, meta-tokens and documents, the branch off. Kept memory is
what the backward pass needs, counted exactly; the peak is beyond what was there before the step. One thread on the CPU.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import kept_for_backward, peak_of
from paired import HEADER, measure, ratio, seconds
from step_time import make_batch

from megameta.model import (
    GPT,
    Attention,
    ModelConfig,
    cross_entropy_sum,
    find_document_runs,
    initialize_weights,
)

SHAPES = {
    "cpu": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512},
    "cuda": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "vocab_size": 50258},
}
FRACTION = 0.1


def documents_batch(config: ModelConfig, batch: int, length: int, device: str) -> dict[str, Any]:
    """What a loader gives to the model: random tokens with M meta-tokens a sequence, documents of 100 to 1500 slots."""
    draws = np.random.default_rng(0)
    document_BT = torch.empty(batch, length, dtype=torch.int64)
    for row in range(batch):
        sizes = draws.integers(100, 1500, length // 100 + 1)
        document_BT[row] = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)[:length])
    token_BT, columns = make_batch(config, batch, length, FRACTION, "cpu"), int(FRACTION * length)
    runs = find_document_runs(token_BT, document_BT, config.meta_token_id, columns)
    return {
        "token_BT": token_BT.to(device),
        "document_BT": document_BT.to(device),
        "num_meta_columns": columns,
        "document_runs": runs.with_each(lambda x: x.to(device)),
    }


def make_step(config: ModelConfig, slots: int, length: int, device: str) -> tuple[Callable[[], float], int, str]:
    """(a step that returns its seconds, bytes that one micro-batch keeps, the attention kernel)."""
    model = GPT(config)
    initialize_weights(model, config, seed=0)
    model = model.to(device)
    micro = max(1, min(slots, 16384) // length)
    given = documents_batch(config, micro, length, device)
    token_BT, is_cuda = given.pop("token_BT"), device == "cuda"

    def forward() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16) if is_cuda else nullcontext():
            logits = model(token_BT, **given)
        return cross_entropy_sum(logits, token_BT.roll(-1, dims=1)) / slots

    def step() -> float:
        start = seconds()
        for _ in range(max(1, slots // (micro * length))):
            forward().backward()
        model.zero_grad()
        if is_cuda:
            torch.cuda.synchronize()
        return seconds() - start

    kernel = next(module.name for module in model.modules() if isinstance(module, Attention))
    return step, kept_for_backward(forward, model.parameters()), kernel


def measure_length(arguments: argparse.Namespace, length: int) -> dict[str, Any]:
    """Ratios and memory at one length."""
    shape, device = SHAPES[arguments.device], arguments.device
    slots = max(arguments.slots, length)
    record: dict[str, Any] = {"length": length, "slots": slots}
    steps = {}
    for name, branch in (("no branch", False), ("A/A: no branch, again", False), ("branch", True)):
        config = ModelConfig(**shape, max_position_embeddings=length, meta_attention=branch)
        steps[name], kept, record["attention"] = make_step(config, slots, length, device)
        if not name.startswith("A/A"):
            record[name] = {"kept_bytes": kept, "peak_bytes": peak_of(steps[name], device)}
    baseline = steps.pop("no branch")
    series = measure(baseline, steps, arguments.pairs, warmup=1)
    rows = [ratio(f"T {length}: {name}", *values) for name, values in series.items()]
    record["rows"] = [vars(row) for row in rows]
    for row in rows:
        print(row.row(), flush=True)
    for name in ("no branch", "branch"):
        own, base = series["branch"]
        median = statistics.median(own if name == "branch" else base)
        record[name]["tokens_per_second"] = slots / median
        kept, peak = (record[name][key] / 2**20 for key in ("kept_bytes", "peak_bytes"))
        print(f"  {name:<12} {slots / median:12,.0f} tokens/s, {kept:,.1f} MiB kept, {peak:,.1f} MiB peak", flush=True)
    return record


def main() -> None:
    """Print a table a length; a length that does not fit is named, and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lengths", default="1024,4096,8192")
    parser.add_argument("--slots", type=int, default=None, help="of a step (default: 8192 on the CPU, 32768 on cuda)")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    arguments.slots = arguments.slots or (8192 if arguments.device == "cpu" else 32768)
    if arguments.device == "cpu":
        torch.set_num_threads(1)  # peaks are measured in forks, where OpenMP's threads would be missing
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else "one thread"
    print(f"{arguments.device} ({machine}), torch {torch.__version__}, {SHAPES[arguments.device]}, k {FRACTION}")
    print(HEADER)
    records = []
    for length in map(int, arguments.lengths.split(",")):
        try:
            records.append(measure_length(arguments, length))
        except torch.OutOfMemoryError as error:
            print(f"T {length}: does not fit ({str(error).splitlines()[0]})", flush=True)
            records.append({"length": length, "error": str(error).splitlines()[0]})
    if arguments.json:
        record = {"command": sys.argv, "torch": torch.__version__, "machine": machine, "lengths": records}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
