"""Wait for what happens, not for a time: a test must not know how fast the machine is."""

import time
from collections.abc import Callable
from typing import TypeVar

#: A limit against hanging, in seconds.
LIMIT = 600.0


Happened = TypeVar("Happened")


def wait_until(
    happened: Callable[[], Happened],
    *,
    unless: Callable[[], object] = lambda: None,
    limit: float = LIMIT,
    pause: float = 0.01,
    why: Callable[[], str] = lambda: "",
) -> Happened:
    """Its value, once ``happened()`` is true; ``why()`` is said where it does not happen.

    Raises:
        AssertionError: ``unless()`` gave something other than None before (an exit code, say), or the limit passed.
    """
    end = time.monotonic() + limit
    while not (value := happened()):
        other = unless()
        if other is not None and not happened():
            raise AssertionError(f"it will not happen any more: {other!r}")
        assert time.monotonic() < end, f"did not happen within {limit:g} s\n{why()}"
        time.sleep(pause)
    return value
