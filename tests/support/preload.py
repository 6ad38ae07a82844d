"""What the fork server of the tests imports before the first process is forked from it (see ``server.py``).

Imports only: a thread or a torch operation in the server would be copied, half, into every process of the suite.
"""

import gc
import importlib

from tests.support.preload_core import import_all

LATE = ("torch.utils.tensorboard", "transformers.generation", "torch._inductor.compile_fx")
#: Seconds of imports that few commands need; those have to wait for them.
HEAVY = ("megameta.hf.harness", "megameta.paper.analysis.plots", "megameta.paper.reproduce.figures")

for name in LATE:
    importlib.import_module(name)
import_all(["megameta"], but=HEAVY)
gc.collect()
gc.freeze()
