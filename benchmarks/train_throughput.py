"""Tokens/s and utilisation of `megameta train` itself, on random tokens: the whole line under DeepSpeed.

python benchmarks/train_throughput.py --device cuda --output train.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from megameta.data.indexed import IndexedDatasetWriter
from megameta.train.metrics import read_metrics

#: Overrides of configs/paper/meta-rope.yaml for a short run on one process.
CUDA = ["train.micro_batch_size=32", "train.global_batch_size=64", "train.num_steps=40", "optimizer.warmup_steps=10"]
CPU = [
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.vocab_size=512",
    "model.meta_token_id=511",
    "data.sequence_length=128",
    "train.micro_batch_size=4",
    "train.global_batch_size=8",
    "train.num_steps=12",
    "train.precision=fp32",
    "optimizer.warmup_steps=2",
]


def main() -> None:
    """Train twice, with the branch and without, and print medians over the steps after the warm-up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parser.parse_args()
    config = Path(__file__).resolve().parents[1] / "configs" / "paper" / "meta-rope.yaml"
    size = [*(CUDA if arguments.device == "cuda" else CPU), *arguments.overrides]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = 50257 if arguments.device == "cuda" else 511
        write_random_dataset(Path(folder, "random"), vocabulary, 4_000_000)
        for name, branch in (("branch", "true"), ("no branch", "false")):
            run = Path(folder, name)
            command = [sys.executable, "-m", "megameta", "train", str(config), f"run.dir={run}"]
            command += [f"run.device={arguments.device}", f"data.train=[{folder}/random]", "data.valid={}"]
            command += ["data.tokenizer=null", f"model.meta_attention={branch}", *size]
            subprocess.run(command, check=True)
            records = [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
            steady = records[len(records) // 3 :]
            results[name] = {
                "tokens_per_second": statistics.median(record["tokens_per_second"] for record in steady),
                "mfu": statistics.median(record["mfu"] for record in steady),
                "first_loss": records[0]["loss"],
                "last_loss": records[-1]["loss"],
            }
    for name, result in results.items():
        print(
            f"{name:<10} {result['tokens_per_second']:12,.0f} tokens/s   mfu {result['mfu']:.3f} of the measured peak"
        )
    if arguments.output:
        record = {"command": sys.argv, "overrides": size, "runs": results}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write_random_dataset(prefix: Path, vocabulary: int, num_tokens: int) -> None:
    """Documents of 1000 random tokens."""
    draws = np.random.default_rng(0)
    with IndexedDatasetWriter(str(prefix), np.dtype(np.uint16)) as writer:
        for _ in range(num_tokens // 1000):
            writer.add_document(draws.integers(0, vocabulary, 1000))


if __name__ == "__main__":
    main()
