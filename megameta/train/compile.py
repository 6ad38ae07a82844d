"""Blocks run by code that torch.compile makes of them."""

import contextlib
import os
import shutil
import sysconfig
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from megameta.config import RunConfig
from megameta.errors import UserError
from megameta.model import Block

#: torch.compile's. Tests of layouts take one that needs no compiler.
BACKEND = "inductor"


def missing_compiler() -> str | None:
    """What torch.compile's own backend lacks on this machine to make code for a CPU, and the remedy; None: nothing.

    It is a C++ compiler (torch's choice: CXX, else g++) and Python's headers, which the code that it makes includes.
    """
    compiler = os.environ.get("CXX", "g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if shutil.which(compiler) is None:
        return f"a C++ compiler is needed, and there is no {compiler}: apt install g++ python3-dev, or set CXX"
    if not header.is_file():
        return f"Python's headers are needed, and there is no {header}: apt install python3-dev"
    return None


def compile_blocks(model: nn.Module, device_type: str, *, partitioned: bool = False) -> None:
    """Make every block of a GPT or stage run compiled, in place, before DeepSpeed sees it; the first passes compile.

    Alike blocks share their code, because one function is compiled, not each block. It takes the place of the method,
    so that names of parameters stay as they are and a block's own hooks run outside.

    Args:
        partitioned: ZeRO 3, whose hooks gather parameters: those of a whole block at once, outside the compiled code.

    Raises:
        UserError: on a CPU without a C++ compiler or Python's headers.
    """
    if device_type == "cpu" and BACKEND == "inductor" and (missing := missing_compiler()):
        raise UserError(f"train.compile=blocks: {missing}; or set train.compile=none")
    if partitioned:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [Block])
    # Shapes are the same in every batch of a run; code for any shape would be slower, and could differ in its last
    # bits between a run and its resumption.
    forward = torch.compile(Block.forward, dynamic=False, backend=BACKEND)
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = partial(forward, module)  # type: ignore[method-assign]


def as_written(config: RunConfig) -> AbstractContextManager:
    """Blocks run as their source says inside: shapes and switches of evaluations would each compile anew."""
    return contextlib.nullcontext() if config.train.compile == "none" else torch.compiler.set_stance("force_eager")
