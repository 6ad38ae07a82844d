"""A model that has the weights of one layer at a time: made on the meta device, filled as each module runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def layers_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model that are filled one by one: elements of its lists, and what stands beside the lists."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if isinstance(model, nn.ModuleList) or not any(isinstance(part, nn.ModuleList) for part in child.modules()):
            if next(child.parameters(), None) is not None:
                yield path, child
        else:
            yield from layers_of(child, f"{path}.")


class LayerWeights:
    """Gives float32 weights to the layers of models on the meta device, and takes them back.

    The memory of one layer serves the next: allocated anew each time, blocks of a few MB leave glibc's heap in pieces,
    and it grew by half of every layer.

    Args:
        read: a parameter's name in the model to its tensor on the CPU, of any type.
    """

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._read = read
        self._spare: list[Tensor] = []

    @contextmanager
    def filled(self, module: nn.Module, prefix: str) -> Iterator[nn.Module]:
        """The module with its weights; without them again afterwards."""
        self._fill(module, prefix)
        try:
            yield module
        finally:
            self._empty(module)

    @contextmanager
    def streamed(self, model: nn.Module) -> Iterator[nn.Module]:
        """A model whose layers are filled when they are called and emptied when they return; its ``forward`` as it is.

        Raises:
            ValueError: a parameter is in no layer (``layers_of``).
        """
        hooks = []
        covered = set()
        for path, layer in layers_of(model):
            covered |= {f"{path}.{name}" for name, _ in layer.named_parameters(remove_duplicate=False)}
            hooks.append(layer.register_forward_pre_hook(self._filler(path)))
            hooks.append(layer.register_forward_hook(lambda module, _inputs, _output: self._empty(module)))
        try:
            missed = {name for name, _ in model.named_parameters(remove_duplicate=False)} - covered
            if missed:
                raise ValueError(f"{', '.join(sorted(missed))}: in no layer of {type(model).__name__}")
            yield model
        finally:
            for hook in hooks:
                hook.remove()

    def _filler(self, path: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, _inputs: self._fill(module, path)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        parameters = dict(module.named_parameters())
        buffers = self._buffers([parameter.shape for parameter in parameters.values()])
        for (name, parameter), buffer in zip(parameters.items(), buffers, strict=True):
            tensor = self._read(f"{prefix}.{name}")
            if tensor.shape != parameter.shape:
                raise ValueError(f"{prefix}.{name} has the shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
            _replace(module, name, buffer.copy_(tensor))

    def _buffers(self, shapes: list[torch.Size]) -> list[Tensor]:
        """Memory for a layer: what is spare and fits; the rest of that is given back before more is taken."""
        kept: list[Tensor | None] = []
        for shape in shapes:
            index = next((index for index, spare in enumerate(self._spare) if spare.shape == shape), None)
            kept.append(self._spare.pop(index) if index is not None else None)
        self._spare.clear()
        return [torch.empty(shape) if buffer is None else buffer for shape, buffer in zip(shapes, kept, strict=True)]

    def _empty(self, module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters()):
            self._spare.append(parameter.detach())
            _replace(module, name, torch.empty_like(parameter, device="meta"))


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
