"""Memory of a training step."""

import multiprocessing
import resource
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def kept_for_backward(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass, parameters themselves left out (copies by autocast are in)."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()  # its graph holds what was noted, so that no address is used twice
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    del result
    return sum(size for address, size in kept.items() if address not in own)


def peak_of(step: Callable[[], Any], device: str) -> int:
    """Bytes at the peak of a call, beyond what was there before. On a CPU it runs in a fork, which has its own peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def child() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        theirs.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    process = context.Process(target=child)
    process.start()
    theirs.close()
    peak = ours.recv()
    process.join()
    return peak
