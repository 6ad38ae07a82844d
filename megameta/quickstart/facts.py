"""What the numbers were obtained on."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

PACKAGES = ("megameta", "torch", "deepspeed", "transformers", "tokenizers", "numpy")


def count_processes(global_batch_size: int) -> int:
    """Two processes on a CPU; else one a GPU, as many of them as divide the batch."""
    if not torch.cuda.is_available():
        return 2
    return max(n for n in range(1, torch.cuda.device_count() + 1) if global_batch_size % n == 0)


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
