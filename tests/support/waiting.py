"""Wait for what happens, not for a time: a test must not know how fast the machine is."""

import time
from collections.abc import Callable

#: A limit against hanging, in seconds.
LIMIT = 600.0


def wait_until(
    happened: Callable[[], object],
    *,
    unless: Callable[[], object] = lambda: None,
    limit: float = LIMIT,
    pause: float = 0.01,
) -> None:
    """Return once ``happened()`` is true.

    Raises:
        AssertionError: ``unless()`` gave something other than None before (an exit code, say), or the limit passed.
    """
    end = time.monotonic() + limit
    while not happened():
        other = unless()
        if other is not None and not happened():
            raise AssertionError(f"it will not happen any more: {other!r}")
        assert time.monotonic() < end, f"did not happen within {limit:g} s"
        time.sleep(pause)
