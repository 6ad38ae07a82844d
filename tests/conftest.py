"""What holds for the whole suite: one kit (``tests/support``), one thread of torch, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest
import torch

pytest.register_assert_rewrite("tests.support")
torch.set_num_threads(1)  # the shapes are tiny: one is faster than several, and leaves the cores to other tests
