"""How long the first forward pass of a step takes on this rank, without waiting for the device.

Forward passes of plain data parallelism and ZeRO 0 to 2 hold no collective, so that a slow rank shows here and the
others do not wait for it; under tensor parallelism and ZeRO 3 the ranks of a group look alike.
"""

import time
from types import TracebackType

import torch


class ForwardTimer:
    """``with timer: forward()``, then ``read`` once something else has waited for the device."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._begin = 0.0
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._cuda else []
        self.seconds = 0.0
        """The last reading; 0 before the first."""

    def __enter__(self) -> None:
        if self._cuda:
            self._events[0].record()
        else:
            self._begin = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self._events[1].record()
        else:
            self.seconds = time.perf_counter() - self._begin

    def read(self) -> None:
        """Take the reading of the events, if the device has passed them; else the former one stays."""
        if self._cuda and self._events[1].query():
            self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
