"""What a machine is, and how fast it multiplies."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path

import torch

PACKAGES = ("megameta", "torch", "deepspeed", "transformers", "tokenizers", "numpy")


def machine_facts() -> dict[str, str]:
    """Machine and versions, a line each."""
    facts = {
        "processor": f"{_processor_name()}, {len(os.sched_getaffinity(0))} cores usable",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["GPUs"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return facts | {name: importlib.metadata.version(name) for name in PACKAGES}


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure_peak_flops(device: str, precision: str, seconds: float = 0.3) -> float:
    """The matrix-product rate of this process's device in flop/s: the best of repeated square products.

    Utilisation is stated against this rather than a data sheet, so that it means something on a CPU too.
    """
    size = 8192 if device.startswith("cuda") else 768
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best, end = 0.0, time.perf_counter() + seconds
    for repeat in range(1000):
        start = time.perf_counter()
        a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if repeat > 1:  # the first ones warm up
            best = max(best, 2 * size**3 / (now - start))
        if now > end and repeat > 4:
            break
    return best
