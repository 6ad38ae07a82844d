"""Checkpoints: tensors by canonical parameter name in safetensors, independent of the layout that wrote them."""

from megameta.checkpoint.resume import check_resumable
from megameta.checkpoint.store import (
    Checkpoint,
    TrainerState,
    find_checkpoint,
    latest_checkpoint,
    load_weights,
    open_checkpoint,
    prune,
    save_weights,
    write_checkpoint,
)

__all__ = [
    "Checkpoint",
    "TrainerState",
    "check_resumable",
    "find_checkpoint",
    "latest_checkpoint",
    "load_weights",
    "open_checkpoint",
    "prune",
    "save_weights",
    "write_checkpoint",
]
