"""Blocks run by code that torch.compile makes of them."""

import contextlib
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from megameta.config import RunConfig
from megameta.errors import UserError
from megameta.log import LOG
from megameta.model import Block
from megameta.parallel.losses import loss_and_gradient
from megameta.parallel.topology import Topology

#: torch.compile's. Tests of layouts take one that needs no compiler.
BACKEND = "inductor"
#: Seconds until blocks are compiled, forward and backward, by device (docs/performance.md: measured on a CPU, on a GPU
#: estimated).
COMPILE_SECONDS = {"cpu": 30.0, "cuda": 60.0}
#: Seconds that compiled code saves of a block's passes over a micro-batch: for starts of kernels, and for each number
#: of the residual stream (on one of a CPU's threads). As above.
SAVED_STARTS = {"cpu": 1e-3, "cuda": 1e-4}
SAVED_PASSES = {"cpu": 8e-9, "cuda": 5e-11}
_COMPILERS = {"cpu": ("C++", "g++", "CXX", ("g++",)), "cuda": ("C", "gcc", "CC", ("gcc", "clang"))}


def missing_compiler(device_type: str) -> str | None:
    """What torch.compile's own backend lacks on this machine to make code for a device, and the remedy; None: nothing.

    For a CPU it is a C++ compiler (torch's choice: CXX, else g++), for a GPU triton and a C compiler (triton's choice:
    CC, else gcc or clang); for both Python's headers, which the code that they make includes.
    """
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is needed, and is not installed: pip install triton"
    language, package, variable, names = _COMPILERS[device_type]
    names = (os.environ[variable],) if os.environ.get(variable) else names
    if not any(map(shutil.which, names)):
        remedy = f"apt install {package} python3-dev, or set {variable}"
        return f"a {language} compiler is needed, and there is no {' or '.join(names)}: {remedy}"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"Python's headers are needed, and there is no {header}: apt install python3-dev"
    return None


def try_compiler(device: str) -> str | None:
    """Compile one line for a device, as ``compile_blocks`` would: what went wrong, None: it works."""
    if BACKEND == "inductor" and (missing := missing_compiler(torch.device(device).type)):
        return missing
    try:
        torch.compile(lambda x: x + 1, dynamic=False, backend=BACKEND)(torch.zeros(8, device=device))
    except Exception as error:  # whatever a broken compiler brings up: it is named, and blocks run as written
        return f"a compiler is there, and fails: {str(error).strip().splitlines()[0]}"
    return None


def saved_seconds(config: RunConfig, topology: Topology) -> float:
    """What compiled blocks save of a whole run, estimated."""
    train, kind = config.train, topology.device_type
    micro_batches = train.num_steps * train.global_batch_size / (train.micro_batch_size * topology.data_parallel_size)
    blocks = config.model.num_layers / topology.pipeline_parallel_size
    numbers = train.micro_batch_size * config.data.sequence_length * config.model.hidden_size
    threads = torch.get_num_threads() if kind == "cpu" else 1
    passes = SAVED_PASSES[kind] * numbers / (topology.tensor_parallel_size * threads)
    return micro_batches * blocks * (SAVED_STARTS[kind] + passes)


def why_not_compile(config: RunConfig, topology: Topology) -> str | None:
    """Why blocks of a run that begins had better not be compiled, None: they had. Of this rank alone."""
    if config.finetune.directory is not None:
        return "lengths of tasks differ, and each would compile anew"
    saved, needed = saved_seconds(config, topology), COMPILE_SECONDS[topology.device_type]
    if saved < needed:
        return f"it takes about {needed:.0f} s, and would save about {saved:.0f} s of this run"
    return try_compiler(topology.device)


def compile_blocks(model: nn.Module, device_type: str, *, partitioned: bool = False) -> None:
    """Make every block of a GPT or stage run compiled, in place, before DeepSpeed sees it; the first passes compile.

    Alike blocks share their code, because one function is compiled, not each block. It takes the place of the method,
    so that names of parameters stay as they are and a block's own hooks run outside.

    Args:
        partitioned: ZeRO 3, whose hooks gather parameters: those of a whole block at once, outside the compiled code.

    Raises:
        UserError: a compiler or Python's headers are missing.
    """
    if BACKEND == "inductor" and (missing := missing_compiler(device_type)):
        raise UserError(f"train.compile=blocks: {missing}; or set train.compile=none")
    if partitioned:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [Block])
    LOG.info("blocks are compiled: the first step takes about %.0f s longer", COMPILE_SECONDS[device_type])
    # Shapes are the same in every batch of a run; code for any shape would be slower, and could differ in its last
    # bits between a run and its resumption.
    forward = torch.compile(Block.forward, dynamic=False, backend=BACKEND)
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = partial(forward, module)  # type: ignore[method-assign]


def compile_loss() -> Callable[..., tuple[Tensor, Tensor]]:
    """``loss_and_gradient`` compiled, one code for all sizes: chunks at the end of a batch are shorter."""
    return torch.compile(loss_and_gradient, dynamic=True, backend=BACKEND)


def as_written(config: RunConfig) -> AbstractContextManager:
    """Blocks run as their source says inside: shapes and switches of evaluations would each compile anew."""
    return contextlib.nullcontext() if config.train.compile == "none" else torch.compiler.set_stance("force_eager")
