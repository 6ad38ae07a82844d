"""Only kernels that add numbers up in the same order every time (run.deterministic)."""

import os

import torch

#: Eight workspaces of 4096 KiB, with which cuBLAS gives the same bits on every stream (its documentation). It reads
#: this when it is first used.
WORKSPACE = ":4096:8"


def use_deterministic_kernels() -> None:
    """For the rest of the process. On a GPU before its first matrix product.

    torch then takes a deterministic kernel for each operation, or raises where it has none, and its compiler chooses
    nothing by timing. Of ours that concerns the gradients of tables and of gathered rows (atomic additions) and of
    attention (so does flash-attn's, which ``model.attention`` tells).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.use_deterministic_algorithms(True)
    # It would fill all new memory with NaN. Nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
