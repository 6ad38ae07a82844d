"""What autograd keeps, and what is alive at all, in bytes: measured from outside, on a CPU."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: Of which one end may have to go on before the other one comes; gloo keeps nothing of them.
POINT_TO_POINT = ("c10d.send.default", "c10d.recv_.default")


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
    """Bytes of the storages that operators inside the context have made and that still live: now and at the peak.

    What the program holds, and nothing else: a thread of gloo lets go of a collective's tensors some time after the
    collective has ended, and on a busy machine the next ones were there before. So it gets copies, not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def known(self, tensors: Iterable[Tensor]) -> None:
        """Not to be counted: they were there before."""
        for tensor in tensors:
            self._note(tensor.untyped_storage(), 0)

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        """Until it is freed: its address is another one's then. Which one's hangs on what threads do meanwhile."""
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("c10d.") and str(function) not in POINT_TO_POINT:
            return _on_copies(function, args, kwargs or {})
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            self._note(storage, storage.nbytes())
        return out


def _on_copies(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """A collective to its end on copies of its tensors, whose results are put into these."""
    copies: list[tuple[Tensor, Tensor]] = []

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copies.append((value, value.clone()))
        return copies[-1][1]

    out = function(*tree_map(copied, args), **kwargs)
    for leaf in tree_leaves(out):
        if isinstance(leaf, torch.ScriptObject):
            dist.Work.unbox(leaf).wait()
    for tensor, copy in copies:
        tensor.copy_(copy)
    return out
