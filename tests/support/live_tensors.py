"""What autograd keeps, and what is alive at all, in bytes: measured from outside, on a CPU."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SavedTensors:
    """Bytes of distinct storages saved for backward inside the context; parameters are not counted."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._known = {p.untyped_storage().data_ptr() for p in parameters}
        self._kept: list[Tensor] = []  # so that no address is used twice
        self.num_bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._known:
            self._known.add(address)
            self._kept.append(tensor)
            self.num_bytes += tensor.untyped_storage().nbytes()
        return tensor

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)
        self._kept.clear()


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that operators inside the context have made and that still live: now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def known(self, tensors: Iterable[Tensor]) -> None:
        """Not to be counted: they were there before."""
        for tensor in tensors:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return out
