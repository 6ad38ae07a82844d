"""What a machine is and can do: versions, the rate of copies and of matrix products.

python benchmarks/machine.py
python benchmarks/machine.py --device cuda --json machine.json
"""

import argparse
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megameta.cluster.machine import measure_peak_flops

PACKAGES = ("torch", "triton", "deepspeed", "flash-attn", "transformers", "numpy")
#: Bytes of a copy, by device.
SIZE = {"cpu": 2**26, "cuda": 2**31}


def copy_rate(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes a second of the best of some copies."""
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        if "cuda" in (source.device.type, target.device.type):
            torch.cuda.synchronize()
        best = max(best, source.nbytes / (time.perf_counter() - start))
    return best


def installed(name: str) -> str | None:
    """The version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe(device: str) -> dict[str, Any]:
    """All of it, by name."""
    start = time.perf_counter()
    import deepspeed  # noqa: F401  (how long it takes)

    found: dict[str, Any] = {"python": platform.python_version(), "seconds_to_import_deepspeed": 0.0}
    found["seconds_to_import_deepspeed"] = time.perf_counter() - start
    found["versions"] = {name: installed(name) for name in PACKAGES}
    memory = torch.empty(SIZE[device], dtype=torch.uint8, device=device)
    found["copy_bytes_per_second"] = copy_rate(memory, torch.empty_like(memory))
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
        pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        found["host_to_device_bytes_per_second"] = copy_rate(pinned, torch.empty_like(pinned, device=device))
        del pinned
    del memory
    precisions = ("bf16", "fp16", "fp32") if device == "cuda" else ("fp32",)
    found["product_flops_per_second"] = {name: measure_peak_flops(device, name) for name in precisions}
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        found["product_flops_per_second"]["tf32"] = measure_peak_flops(device, "fp32")
    return found


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    text = json.dumps(describe(arguments.device), indent=1) + "\n"
    print(text, end="")
    if arguments.json:
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
