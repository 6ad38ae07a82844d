"""What some tests need and a machine may lack: they are skipped there, and the report says what would run them."""

import pytest

from megameta.engine.compile import missing_compiler

_MISSING = missing_compiler("cpu")

#: For tests that make native code: with torch.compile's own backend (inductor), or a fake CUDA device.
needs_cxx = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))
