"""Step time with the meta branch over without it, on the same work ("twin for speed": same slots, same meta-tokens).

    python benchmarks/step_time.py                      # CPU: D 256, L 4, T 1024
    python benchmarks/step_time.py --preset 152m --device cuda --precision bf16

Prints an A/A row (the baseline against itself), the branch, the same without the optimiser, the optimiser by itself,
the paper's dense form, and the memory that a micro-batch keeps for its backward pass.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from dense import make_dense
from memory import kept_for_backward
from paired import HEADER, measure, ratio, seconds

from megameta.data.counter_random import choose, make_key
from megameta.model import GPT, ModelConfig, cross_entropy_sum, initialize_weights
from megameta.model.flops import forward_flops

PRESETS = {
    "cpu": {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "vocab_size": 8192, "length": 1024, "batch": 2},
    "tiny": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "length": 128, "batch": 2},
    "152m": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "vocab_size": 50258, "length": 1024, "batch": 64},
}
#: Most sequences of a micro-batch: the logits of 64 would need 33 GB.
MICRO_BATCH = 16
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_batch(config: ModelConfig, batch: int, length: int, fraction: float, device: str) -> torch.Tensor:
    """Random text with M = floor(k · T) meta-tokens a sequence: int64 (B, T)."""
    tokens = torch.randint(0, config.meta_token_id, (batch, length), generator=torch.Generator().manual_seed(0))
    count = int(fraction * length)
    for row in range(batch):
        tokens[row, torch.from_numpy(choose(make_key("benchmark", row), length, count))] = config.meta_token_id
    return tokens.to(device)


def make_step(
    config: ModelConfig, tokens: torch.Tensor, columns: int, arguments: argparse.Namespace, *, dense: bool = False
) -> Callable[..., float]:
    """A function that makes one training step and returns its seconds."""
    model = GPT(config)
    initialize_weights(model, config, seed=0)
    model = model.to(arguments.device)
    if dense:
        make_dense(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    dtype = PRECISIONS[arguments.precision]
    is_cuda = arguments.device.startswith("cuda")

    def forward(token_BT: torch.Tensor) -> torch.Tensor:
        with torch.autocast(arguments.device, dtype) if dtype != torch.float32 else nullcontext():
            logits = model(token_BT, num_meta_columns=columns)
        return cross_entropy_sum(logits, token_BT.roll(-1, dims=1)) / tokens.numel()

    def now() -> float:
        if is_cuda:
            torch.cuda.synchronize()
        return seconds()

    def step(*, update: bool = True, only_update: bool = False) -> float:
        start = now()
        for token_BT in tokens.split(MICRO_BATCH):
            forward(token_BT).backward()
        if only_update:
            start = now()
        if update:
            optimizer.step()
        optimizer.zero_grad()
        return now() - start

    step.kept_bytes = kept_for_backward(lambda: forward(tokens[:MICRO_BATCH]), model.parameters())
    return step


def main() -> None:
    """Measure, print the table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--batch", type=int, default=None, help="sequences a step (default: the preset's)")
    parser.add_argument("--fraction", type=float, default=0.1, help="k, meta-tokens a slot")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--no-dense", action="store_true", help="leave the dense form out (it is slow)")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    shape = dict(PRESETS[arguments.preset])
    length, batch = shape.pop("length"), shape.pop("batch")
    batch = arguments.batch or batch
    branch = ModelConfig(**shape, max_position_embeddings=length)
    plain = ModelConfig(**shape, max_position_embeddings=length, meta_attention=False)
    tokens = make_batch(branch, batch, length, arguments.fraction, arguments.device)
    columns = int(arguments.fraction * length)
    baseline = make_step(plain, tokens, columns, arguments)
    with_branch = make_step(branch, tokens, columns, arguments)
    candidates: dict[str, Callable[[], float]] = {"A/A: no branch, again": make_step(plain, tokens, columns, arguments)}
    candidates["branch (compact)"] = with_branch
    if not arguments.no_dense:
        candidates["branch (dense, the paper's form)"] = make_step(branch, tokens, columns, arguments, dense=True)
    series = measure(baseline, candidates, arguments.pairs)
    without_update = measure(
        lambda: baseline(update=False),
        {"branch, optimiser left out": lambda: with_branch(update=False)},
        arguments.pairs,
    )
    update_alone = measure(
        lambda: baseline(only_update=True),
        {"the optimiser alone": lambda: with_branch(only_update=True)},
        max(3, arguments.pairs // 3),
    )
    rows = [ratio(name, *values) for name, values in {**series, **without_update, **update_alone}.items()]
    arithmetic = forward_flops(branch, length, columns) / forward_flops(plain, length, columns)
    machine = (
        torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {arguments.device} ({machine})")
    print(f"{arguments.preset}: {shape}, T {length}, B {batch}, M {columns}, {arguments.precision}")
    print(HEADER)
    for row in rows:
        print(row.row())
    print(f"{'arithmetic (model flops)':<34} {arithmetic:6.3f}")
    kept, micro = [baseline.kept_bytes, with_branch.kept_bytes], min(batch, MICRO_BATCH)
    plain_mib, more_mib = kept[0] / 2**20, (kept[1] - kept[0]) / 2**20
    print(
        f"{'memory kept for backward':<34} {kept[1] / kept[0]:6.3f}  {plain_mib:,.1f} MiB, {more_mib:+,.1f} (B {micro})"
    )
    if arguments.json:
        record = {"command": sys.argv, "torch": torch.__version__, "machine": machine, "arithmetic": arithmetic}
        record["rows"] = [vars(row) for row in rows]
        record["kept_bytes"] = {"no branch": kept[0], "branch": kept[1], "micro_batch": micro}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
