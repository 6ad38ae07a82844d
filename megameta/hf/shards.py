"""An export's weights on disk: under its names, in files of a limited size, one tensor in memory at a time."""

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megameta.checkpoint.tensor_file import LazyTensors, MadeTensors, StoredTensors, TensorWriter, entry_of
from megameta.errors import UserError
from megameta.hf.gpt2 import fits_gpt2, to_gpt2
from megameta.hf.names import to_hf_name
from megameta.model import ModelConfig
from megameta.model.shapes import parameter_shapes

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: What weights in pickles are called; only named in a message.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> MadeTensors:
    """The same tensors on the CPU, each cast when it is asked for; None keeps its type."""

    def make(name: str) -> Tensor:
        return tensors[name].detach().to("cpu", dtype)

    entries = [entry_of(tensors, name) for name in tensors]
    return MadeTensors(
        {entry.name: (entry._replace(dtype=dtype or entry.dtype), partial(make, entry.name)) for entry in entries}
    )


def as_exported(config: ModelConfig, tensors: LazyTensors) -> MadeTensors:
    """Canonical tensors under the names, and in the shapes, of the export's model; made when they are asked for."""
    if fits_gpt2(config):
        return to_gpt2(config, tensors)
    return MadeTensors(
        {
            to_hf_name(name): (tensors.entry(name)._replace(name=to_hf_name(name)), partial(tensors.__getitem__, name))
            for name in parameter_shapes(config)  # in the model's order, whatever that of the mapping is
        }
    )


def write_shards(directory: Path, tensors: LazyTensors, max_shard_size: str) -> None:
    """Write model.safetensors, or model-0000i-of-0000n.safetensors and the index, as ``save_pretrained`` does.

    Args:
        max_shard_size: like "5GB"; a tensor that is larger gets a file of its own.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    entries = [tensors.entry(name) for name in tensors]
    entries.sort(key=lambda entry: -entry.dtype.itemsize)  # a file aligns wider types by having them first
    shapes = {entry.name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in entries}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        writer = TensorWriter(directory / file, [tensors.entry(name) for name in names])
        try:
            for name in names:
                writer.write(name, tensors[name].contiguous())
            writer.close()
        except BaseException:
            writer.abandon()
            raise
    if split.is_sharded:
        metadata = {"total_parameters": sum(math.prod(entry.shape) for entry in entries), **split.metadata}
        index = {"metadata": metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def widened(tensors: LazyTensors) -> MadeTensors:
    """The same tensors, 16-bit ones as float32."""

    def make(name: str) -> Tensor:
        return tensors[name].to(wide[name])

    narrow = (torch.float16, torch.bfloat16)
    entries = [tensors.entry(name) for name in tensors]
    wide = {entry.name: torch.float32 if entry.dtype in narrow else entry.dtype for entry in entries}
    return MadeTensors(
        {entry.name: (entry._replace(dtype=wide[entry.name]), partial(make, entry.name)) for entry in entries}
    )


def open_shards(directory: Path, ignored: re.Pattern[str] | None = None) -> StoredTensors:
    """The tensors of a HuggingFace directory's safetensors files, read when they are asked for.

    Args:
        ignored: names that are left out (buffers that older versions of transformers stored).

    Raises:
        UserError: a file is missing or damaged, the index does not say what the files hold, or there are only pickles.
    """
    path = directory / INDEX_FILE
    if not path.is_file():
        _expect_safetensors(directory)
        return StoredTensors([directory / WEIGHTS_FILE], ignored)
    try:
        weight_map: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not readable ({error}); export the model again") from error
    for file in files:
        if Path(file).name != file:
            raise UserError(f"{path} points out of its directory: {file}")
        names = set(StoredTensors([directory / file], ignored))
        listed = {name for name, where in weight_map.items() if where == file}
        listed -= {name for name in listed if ignored is not None and ignored.search(name)}
        if names != listed:
            wrong = ", ".join(sorted(names ^ listed)[:3])
            raise UserError(f"{path}: does not say what {file} holds ({wrong}); export the model again")
    return StoredTensors([directory / file for file in files], ignored)


def _expect_safetensors(directory: Path) -> None:
    """Refuse a directory without model.safetensors; what it may hold in its place is never opened."""
    if (directory / WEIGHTS_FILE).is_file():
        return
    others = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if not others:
        raise UserError(f"{directory / WEIGHTS_FILE} is missing, and there is no {INDEX_FILE}: copy the weights there")
    raise UserError(
        f"{directory} holds {others[0]} and no {WEIGHTS_FILE}: only safetensors are read, because a pickle can run any"
        " code when it is opened. If you trust where it comes from, convert it in Python with transformers:"
        f" AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained(NEW_DIRECTORY)"
    )
