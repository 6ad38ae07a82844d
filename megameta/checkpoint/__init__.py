"""Checkpoints: tensors by canonical parameter name in safetensors, independent of the layout that wrote them."""

from megameta.checkpoint.resume import check_resumable
from megameta.checkpoint.save import StateEntry, StateSource, save_distributed, save_weights, write_checkpoint
from megameta.checkpoint.store import (
    Checkpoint,
    TrainerState,
    find_checkpoint,
    latest_checkpoint,
    load_weights,
    open_checkpoint,
    prune,
)
from megameta.checkpoint.tensor_file import StoredTensors

__all__ = [
    "Checkpoint",
    "StateEntry",
    "StateSource",
    "StoredTensors",
    "TrainerState",
    "check_resumable",
    "find_checkpoint",
    "latest_checkpoint",
    "load_weights",
    "open_checkpoint",
    "prune",
    "save_distributed",
    "save_weights",
    "write_checkpoint",
]
