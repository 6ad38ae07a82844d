"""The tests, as a package, so that they can import their kit (``tests/support``)."""

import pytest

pytest.register_assert_rewrite("tests.support")  # before anything imports it: helpers' assertions say what they found
