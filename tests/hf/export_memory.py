"""Run by test_memory.py in a process of its own: how far memory rises while a checkpoint is exported.

Prints, in bytes: the model's size, its largest layer's, and the rise of the peak of resident memory over that before.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megameta.checkpoint import load_weights, save_weights
from megameta.checkpoint.tensor_file import MadeTensors, TensorEntry
from megameta.hf.export import export_to_hf
from megameta.model import ModelConfig
from megameta.model.shapes import parameter_shapes

BASELINE = {"position": "ape", "meta_attention": False}


def resident(field: str) -> int:
    """VmRSS, or VmHWM: its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def reset_peak() -> None:
    """Let VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def drawn(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 0.02 if len(shape) > 1 else torch.ones(shape)


def make(root: Path, name: str, config: ModelConfig) -> MadeTensors:
    """A checkpoint of random weights, of which not two are ever in memory."""
    makers: dict[str, tuple[TensorEntry, Callable[[], Tensor]]] = {
        tensor: (TensorEntry(tensor, shape), partial(drawn, shape))
        for tensor, shape in parameter_shapes(config).items()
    }
    tensors = MadeTensors(makers)
    save_weights(root / name, config, tensors, None)
    return tensors


def main(root: Path, kind: str, dtype: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"vocab_size": 1000, "num_heads": 8, "max_position_embeddings": 64}
    changes = BASELINE if kind == "gpt2" else {}
    small = ModelConfig(**shape, hidden_size=32, num_layers=2, **changes)
    large = ModelConfig(**shape, hidden_size=512, num_layers=12, **changes)
    make(root, "small", small)
    tensors = make(root, "large", large)
    export_to_hf(*load_small(root), root / "hf_small")  # what is imported and compiled on the way is there from now on
    reset_peak()
    before = resident("VmRSS")
    config, weights = load_weights(root / "large")
    export_to_hf(config.model, weights, root / "hf", dtype=getattr(torch, dtype), max_shard_size="40MB")
    rise = resident("VmHWM") - before
    layer = sum(tensors.entry(name).num_bytes for name in tensors if name.startswith("blocks.0."))
    total = sum(tensors.entry(name).num_bytes for name in tensors)
    print(json.dumps({"total": total, "layer": layer, "rise": rise}))


def load_small(root: Path) -> tuple[ModelConfig, MadeTensors]:
    config, weights = load_weights(root / "small")
    return config.model, weights  # type: ignore[return-value]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
