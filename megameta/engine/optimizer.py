"""AdamW over two groups: matrices decay, norms and biases do not."""

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

from megameta.config import OptimizerSection
from megameta.errors import UserError


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters of two or more dimensions with weight decay, the others without (the GPT-2 and GPT-3 practice)."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: OptimizerSection) -> torch.optim.Optimizer:
    """torch's fused AdamW, which works at every ZeRO stage without building an extension, or apex's FusedAdam."""
    groups = parameter_groups(model, config.weight_decay)
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.implementation == "apex":
        return nvidia_apex_optimizers().FusedAdam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def nvidia_apex_optimizers() -> Any:
    """NVIDIA's ``apex.optimizers``.

    Raises:
        UserError: it is missing, or what is installed is the PyPI package of that name, another program.
    """
    remedy = "build it from https://github.com/NVIDIA/apex, or set optimizer.implementation=torch"
    if importlib.util.find_spec("apex") is None:
        raise UserError(f"optimizer.implementation is apex, but NVIDIA apex is not installed: {remedy}")
    try:
        optimizers = importlib.import_module("apex.optimizers")
        optimizers.FusedAdam  # noqa: B018 - AttributeError where it is another program
    except Exception as error:  # the namesake fails in its own ways, by its missing dependencies too
        raise UserError(
            "optimizer.implementation is apex, but the installed package named apex is not NVIDIA's (the one on PyPI is"
            f" another program), or is not built for this torch ({error}): pip uninstall apex, then {remedy}"
        ) from error
    return optimizers
