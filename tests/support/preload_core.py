"""What every rank of a test needs: torch, the parts of DeepSpeed that a step uses, megameta without HuggingFace.

Six seconds of imports; all of ``preload.py`` are eleven. Imports only: see there.
"""

import gc
import importlib
import pkgutil
from collections.abc import Iterable

#: Imported late, by what a step or a save first does; a forked process would spend seconds on them.
LATE = (
    "deepspeed.ops",
    "deepspeed.pipe",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "setuptools",  # by what DeepSpeed looks up at an engine's start
    "torch._dynamo",
    "torch.distributed.nn.functional",
)
PACKAGES = ("train", "engine", "cluster", "parallel", "checkpoint", "data", "model", "config")


def import_all(packages: Iterable[str], *, but: Iterable[str] = ()) -> None:
    """Every module of these packages; those that are run as programs are left out."""
    for package in packages:
        path = importlib.import_module(package).__path__
        for module in pkgutil.walk_packages(path, f"{package}."):
            if module.name not in but and not module.name.endswith("__main__"):
                importlib.import_module(module.name)


for name in LATE:
    importlib.import_module(name)
import_all(f"megameta.{package}" for package in PACKAGES)
gc.collect()
gc.freeze()  # a collection in a forked process would copy the pages of all these objects
