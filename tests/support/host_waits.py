"""Where the host of a GPU would wait for its device: seen on a CPU, by call site.

Counted are readings of a number (``item``, ``float``, ``bool``, ``tolist``), operations whose result's size depends on
values, and tensors made of numbers of the host, whose copy to a device is waited for as it comes from pageable memory.
Not seen: what a CUDA kernel's own code waits for, copies of whole tensors between devices, and collectives.
"""

import traceback
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}


class HostWaits(TorchDispatchMode):
    """``with HostWaits() as waits: …``; then ``waits.sites`` is a count by "file:function"."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: Counter[str] = Counter()
        self._patches = [
            self._patch(torch, "tensor"),
            self._patch(torch.Tensor, "new_tensor"),
            self._patch(torch.Tensor, "tolist"),
        ]

    def __enter__(self) -> "HostWaits":
        for patch in self._patches:
            patch.start()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in _READS or by_mask:
            self._count(name)
        return func(*args, **(kwargs or {}))

    def _patch(self, owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._count(name)
            return original(*args, **kwargs)

        return mock.patch.object(owner, name, counted)

    def _count(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        caller = frames[-1]
        self.sites[f"{what} in {'/'.join(caller.filename.split('/')[-2:])}:{caller.name}"] += 1
