"""Modules that have shapes and no values, and the shapes of a model's parameters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megameta.model.config import ModelConfig
from megameta.model.gpt import GPT


class _NoInitialValues(TorchFunctionMode):
    """Functions of torch.nn.init leave tensors as they are."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = keywords or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return keywords["tensor"] if "tensor" in keywords else arguments[0]
        return function(*arguments, **keywords)


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Modules made inside have shapes and no values (torch's meta device).

    Nothing is drawn either: torch would take its reference functions for that, which import its compiler, two seconds
    of every command that only asks for a shape.
    """
    with torch.device("meta"), _NoInitialValues():
        yield


def without_kernels(config: ModelConfig) -> ModelConfig:
    """The same model where only its shapes are asked for: on a machine without flash-attn, too."""
    return replace(config, attention_backend="sdpa")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by canonical name, in the model's order, without the rows that pad the vocabulary."""
    with on_meta_device():
        return {name: tuple(p.shape) for name, p in GPT(without_kernels(config), vocab_multiple=1).named_parameters()}
