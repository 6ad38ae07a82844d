"""What the fork server of the tests imports before the first process is forked from it (see ``server.py``).

Imports only: a thread or a torch operation in the server would be copied, half, into every process of the suite.
"""

import gc
import importlib
import pkgutil
from collections.abc import Iterator

#: Imported late, by what a step, a save or a conversion first does; a forked process would spend seconds on them.
LATE = (
    "deepspeed.ops",
    "deepspeed.pipe",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # by every engine; its torch.compile imports all of inductor
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "setuptools",  # by what DeepSpeed looks up at an engine's start
    "torch._dynamo",
    "torch.distributed.nn.functional",
    "torch.utils.tensorboard",
    "transformers.generation",
)
#: Seconds of imports that few commands need; those have to wait for them.
HEAVY = ("megameta.hf.harness", "megameta.analysis.plots", "megameta.reproduce.figures")


def modules() -> Iterator[str]:
    """Every module of megameta that is worth it."""
    yield "megameta"
    for module in pkgutil.walk_packages(importlib.import_module("megameta").__path__, "megameta."):
        if module.name not in HEAVY and not module.name.endswith("__main__"):
            yield module.name


for name in (*LATE, *modules()):
    importlib.import_module(name)
gc.collect()
gc.freeze()  # a collection in a forked process would copy the pages of all these objects
