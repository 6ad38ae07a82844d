"""What some tests need and a machine may lack: they are skipped there, and the report says what would run them."""

import pytest

from megameta.train.compile import missing_compiler

_MISSING = missing_compiler()

#: For tests in which torch.compile's own backend (inductor) makes code for the CPU.
needs_cxx = pytest.mark.skipif(_MISSING is not None, reason=f"torch.compile: {_MISSING}")
