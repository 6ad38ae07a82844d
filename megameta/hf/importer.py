"""Reads exports back: no code of theirs is run, and weights come from safetensors alone."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megameta.errors import UserError
from megameta.hf.gpt2 import from_gpt2
from megameta.hf.names import check_tensors, from_hf_name
from megameta.model import ModelConfig

_INDEX_FILE = "model.safetensors.index.json"
_WEIGHTS_FILE = "model.safetensors"


class ImportedModel(NamedTuple):
    """What ``export_to_hf`` took."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer_dir: str | None
    """Where ``load_tokenizer`` finds the tokenizer; None where the export has none."""


def import_from_hf(directory: str | Path) -> ImportedModel:
    """The inverse of ``export_to_hf``, for both of its kinds; bitwise, 16-bit weights widened to float32.

    Raises:
        UserError: a directory that is not an export of this project, or a damaged one.
    """
    directory = Path(directory)
    values = _read_json(directory / "config.json")
    kind = values.get("model_type")
    if kind not in ("megameta", "gpt2"):
        raise UserError(f"{directory}: a model of type {kind!r} cannot be imported; megameta and its own gpt2 can")
    tensors = _read_tensors(directory)
    try:
        if kind == "gpt2":
            config, tensors = from_gpt2(values, tensors)
        else:
            config, tensors = _from_megameta(values, tensors)
    except KeyError as error:
        raise UserError(f"{directory} is damaged: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from error
    check_tensors(config, tensors, str(directory))
    return ImportedModel(config, tensors, _tokenizer_dir(directory))


def _from_megameta(values: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    from megameta.hf.configuration import MegametaConfig

    config = MegametaConfig(**values).to_model_config()
    result = {from_hf_name(name): tensor for name, tensor in tensors.items()}
    output = result.get("head.output.weight")
    if config.tie_embeddings and output is not None:  # some writers store a tied weight twice
        if not torch.equal(output, result["embedding.tokens.weight"]):
            raise ValueError("tie_word_embeddings is true, but lm_head.weight is not the token embedding")
        del result["head.output.weight"]
    return config, result


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the directory of a HuggingFace model") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: an object is expected")
    return values


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = [_WEIGHTS_FILE]
    if (directory / _INDEX_FILE).is_file():
        names = sorted(set(_read_json(directory / _INDEX_FILE).get("weight_map", {}).values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = directory / name
        if path.name != name:
            raise UserError(f"{directory / _INDEX_FILE} points out of its directory: {name}")
        try:
            tensors.update(load_file(path))
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing (only safetensors are read)") from error
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
    narrow = (torch.float16, torch.bfloat16)
    return {name: tensor.float() if tensor.dtype in narrow else tensor for name, tensor in tensors.items()}


def _tokenizer_dir(directory: Path) -> str | None:
    found = (directory / "tokenizer.json").is_file() or any(directory.glob("*.model"))
    return str(directory) if found else None
