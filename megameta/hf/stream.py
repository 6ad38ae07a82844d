"""A model that has the weights of one layer at a time: made on the meta device, filled as each module runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

#: Parameter's name in the model to its tensor, float32, on the CPU.
Read = Callable[[str], Tensor]


def layers_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model that are filled one by one: elements of its lists, and what stands beside the lists."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if isinstance(model, nn.ModuleList) or not any(isinstance(part, nn.ModuleList) for part in child.modules()):
            if next(child.parameters(), None) is not None:
                yield path, child
        else:
            yield from layers_of(child, f"{path}.")


@contextmanager
def filled(module: nn.Module, prefix: str, read: Read) -> Iterator[nn.Module]:
    """The module with its weights; without them again afterwards."""
    _fill(module, prefix, read)
    try:
        yield module
    finally:
        module.to_empty(device="meta")


@contextmanager
def streamed(model: nn.Module, read: Read) -> Iterator[nn.Module]:
    """A model on the meta device whose layers are filled when they are called, and emptied when they return.

    Its own ``forward`` runs as it is. Every parameter must be in a layer (``layers_of``) that is called as a module.
    """
    hooks = []
    covered = set()
    for path, layer in layers_of(model):
        covered |= {f"{path}.{name}" for name, _ in layer.named_parameters(remove_duplicate=False)}
        hooks.append(layer.register_forward_pre_hook(_filler(path, read)))
        hooks.append(layer.register_forward_hook(_empty))
    missed = {name for name, _ in model.named_parameters(remove_duplicate=False)} - covered
    if missed:
        raise ValueError(f"{', '.join(sorted(missed))}: in no layer of {type(model).__name__}")
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _fill(module: nn.Module, prefix: str, read: Read) -> None:
    names = [name for name, _ in module.named_parameters()]
    module.load_state_dict({name: read(f"{prefix}.{name}") for name in names}, strict=False, assign=True)


def _filler(path: str, read: Read) -> Callable[[nn.Module, Any], None]:
    return lambda module, _inputs: _fill(module, path, read)


def _empty(module: nn.Module, _inputs: Any, _output: Any) -> None:
    module.to_empty(device="meta")
