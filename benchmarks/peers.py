"""Tokens/s of our engine over nanoGPT's and over HuggingFace's Trainer with DeepSpeed, one device, no meta-tokens.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/peers.py --nanogpt nanoGPT                                # CPU, a small model
    python benchmarks/peers.py --nanogpt nanoGPT --device cuda --preset 124m

All sides train GPT-2's shape (learned positions, biases, exact GELU, tied embeddings) with AdamW and clipping, on the
same random tokens, in the same micro-batches, each in its own loop, reading its own batches (``peer_sides.py``). They
take turns of a few steps; the first turns (compilation) are left out. Before that, losses and gradient norms of one
batch are compared on the same weights. Ratios above 1: ours is faster. Arguments like a.b=c go to our configuration.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from paired import HEADER, measure, ratio
from peer_sides import gpt2_config
from sides import Side, write_random_dataset, write_run

from megameta.hf.gpt2 import to_gpt2
from megameta.model import GPT, ModelConfig, cross_entropy_sum, initialize_weights

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "length": 64},
    "tiny": {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "vocab_size": 8192, "length": 256},
    "124m": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "vocab_size": 50304, "length": 1024},
}
#: (micro-batch size, accumulation steps): 2 k tokens a step, and 64 k.
BATCHES = {"smoke": (4, 1), "tiny": (8, 1), "124m": (16, 4)}
BARS = {"cpu": 1.0, "cuda": 1.15}


def model_config(shape: dict[str, int]) -> ModelConfig:
    """The shape as our model."""
    own = {key: value for key, value in shape.items() if key != "length"}
    window = shape["length"]
    return ModelConfig(**own, max_position_embeddings=window, position="ape", bias=True, meta_attention=False)


def first_losses(shape: dict[str, int], nanogpt: Path | None) -> dict[str, tuple[float, float]]:
    """(loss, gradient norm) of one batch on the same weights, by side; float32, on the CPU."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model_config(shape)
    model = GPT(config)
    initialize_weights(model, config, seed=0)
    tokens = torch.randint(0, shape["vocab_size"], (2, 65), generator=torch.Generator().manual_seed(0))
    tokens, labels = tokens[:, :-1], tokens[:, 1:]
    found = {"ours": _loss_and_norm(model, cross_entropy_sum(model(tokens), labels) / labels.numel())}
    weights = dict(to_gpt2(config, dict(model.named_parameters())))
    other = GPT2LMHeadModel(gpt2_config(GPT2Config, shape))
    other.load_state_dict(weights, strict=False)
    logits = other(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    found["HF Trainer"] = _loss_and_norm(other, loss)
    if nanogpt is not None:
        sys.path.insert(0, str(nanogpt))
        from model import GPT as NanoGPT
        from model import GPTConfig

        peer = NanoGPT(GPTConfig(shape["length"], shape["vocab_size"], shape["num_layers"], shape["num_heads"],
                                 shape["hidden_size"], 0.0, True))  # fmt: skip
        turned = {name: tensor.T if is_matrix(name) else tensor for name, tensor in weights.items()}
        peer.load_state_dict(turned, strict=False)
        found["nanoGPT"] = _loss_and_norm(peer, peer(tokens, labels.contiguous())[1])
    return found


def is_matrix(name: str) -> bool:
    """Matrices of GPT2LMHeadModel's blocks are stored as inputs × outputs."""
    return name.endswith(".weight") and ".h." in name and ".ln_" not in name


def _loss_and_norm(model: torch.nn.Module, loss: torch.Tensor) -> tuple[float, float]:
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--nanogpt", type=Path, default=None, help="a clone of it; left out: no such row")
    parser.add_argument("--no-hf", action="store_true", help="no row of HuggingFace's Trainer")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps of a turn")
    parser.add_argument("--zero-stage", type=int, default=0, help="of ours and of HF's DeepSpeed")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default=None, help="default: bf16 on cuda, fp32 on cpu"
    )
    parser.add_argument("--micro-batch", type=int, default=None)
    parser.add_argument("--accumulation", type=int, default=None, help="micro-batches of a step")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="of our configuration")
    arguments = parser.parse_args()
    arguments.precision = arguments.precision or ("bf16" if arguments.device == "cuda" else "fp32")
    arguments.nanogpt = arguments.nanogpt and arguments.nanogpt.resolve()
    return arguments


def measure_sides(arguments: argparse.Namespace, folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """(rows, peak bytes by side)."""
    shape, (micro, accumulation) = PRESETS[arguments.preset], BATCHES[arguments.preset]
    micro, accumulation = arguments.micro_batch or micro, arguments.accumulation or accumulation
    write_random_dataset(folder / "train", shape["vocab_size"], 4_000_000)
    (folder / "data").mkdir()
    for name in ("train", "val"):
        (folder / "data" / f"{name}.bin").symlink_to(folder / "train.bin")  # the formats are the same
    # nanoGPT reads {"vocab_size": …} from a pickle: written out, so that this repository imports no pickling module.
    (folder / "data" / "meta.pkl").write_bytes(f"(dVvocab_size\nI{shape['vocab_size']}\ns.".encode())
    train = {"micro_batch_size": micro, "global_batch_size": micro * accumulation, "precision": arguments.precision}
    sections = {"train": train, "parallel": {"zero_stage": arguments.zero_stage}, "data": {"meta_token_fraction": 0.0}}
    write_run(folder / "config.yaml", model_config(shape), sections)
    common = {"device": arguments.device, "precision": arguments.precision, "zero_stage": arguments.zero_stage}
    common |= {"shape": shape, "micro_batch_size": micro, "accumulation_steps": accumulation}
    common |= {"config": str(folder / "config.yaml"), "overrides": arguments.overrides, "data": str(folder / "data")}
    wanted: list[tuple[str, str, dict[str, Any]]] = [("ours", "ours", {}), ("ours", "A/A: ours, again", {})]
    if arguments.nanogpt:
        common["nanogpt"] = str(arguments.nanogpt)
        wanted += [("nanogpt", "nanoGPT, torch.compile", {"compile": True})]
        if arguments.device == "cpu":  # compiled or not: whichever is its best
            wanted += [("nanogpt", "nanoGPT, eager", {"compile": False})]
    if not arguments.no_hf:
        wanted += [("hf", "HF Trainer + DeepSpeed", {})]
    sides: list[Side] = []
    try:
        for kind, name, own in wanted:
            sides.append(Side(kind, name, arguments.steps, common | own, folder))
        for side in sides:
            side.wait()
        base, *others = sides
        series = measure(base.run, {side.name: side.run for side in others}, arguments.pairs)
        peaks = {side.name: side.last["peak_bytes"] for side in sides}
    finally:
        for side in sides:
            side.close()
    tokens = micro * accumulation * shape["length"] * arguments.steps
    rows = [ratio(name, *values) for name, values in series.items()]
    seconds = {name: row.seconds for name, row in zip(series, rows, strict=True)}
    rates = {name: tokens / value for name, value in seconds.items()}
    rates["ours"] = tokens / statistics.median(series[others[0].name][1])
    return rows, {"tokens_per_second": rates, "peak_bytes": peaks, "tokens_per_turn": tokens}


def main() -> None:
    """Compare first losses, take turns, print ratios."""
    arguments = parse()
    losses = first_losses(PRESETS["tiny"], arguments.nanogpt)
    for name, (loss, norm) in losses.items():
        print(f"one batch, same weights · {name:<12} loss {loss:.6f}, gradient norm {norm:.6f}")
    reference = losses["ours"]
    if any(abs(a - b) > 1e-4 * abs(b) for pair in losses.values() for a, b in zip(pair, reference, strict=True)):
        raise SystemExit("the sides do not compute the same model")
    with tempfile.TemporaryDirectory() as folder:
        rows, facts = measure_sides(arguments, Path(folder))
    versions = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    threads = torch.get_num_threads()
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()}, {threads} threads"
    print(f"{arguments.device} ({machine}), {versions}, Python {platform.python_version()}")
    print(f"{arguments.preset}: {PRESETS[arguments.preset]}, {facts['tokens_per_turn']} tokens a turn, "
          f"{arguments.precision}, ZeRO {arguments.zero_stage}, overrides {arguments.overrides}")  # fmt: skip
    print("tokens/s of ours over the other's (above 1: ours is faster)")
    print(HEADER.replace("step", "turn"))
    for row in rows:
        peak = facts["peak_bytes"][row.name] / 2**20
        print(f"{row.row()}  {facts['tokens_per_second'][row.name]:10,.0f} tokens/s  peak {peak:,.0f} MiB")
    print(
        f"ours: {facts['tokens_per_second']['ours']:,.0f} tokens/s, peak {facts['peak_bytes']['ours'] / 2**20:,.0f} MiB"
    )
    peers = [row for row in rows if not row.name.startswith("A/A")]
    bar = BARS[arguments.device]
    for row in peers:
        print(f"{row.name}: {'meets' if row.median >= bar else 'MISSES'} the bar of {bar:g}")
    if arguments.json:
        record = {"command": sys.argv, "machine": machine, "versions": versions, **facts}
        record |= {"rows": [vars(row) for row in rows], "first_losses": losses, "bar": bar}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
