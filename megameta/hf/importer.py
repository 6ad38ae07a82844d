"""Reads HuggingFace directories: no code of theirs is run, and weights come from safetensors alone.

Exports of this project come back as they were. GPT-2 and GPT-NeoX (Pythia) from elsewhere, which know no meta-token,
are read as they are, and become a start for training in ``megameta.hf.start``.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megameta.checkpoint.tensor_file import LazyTensors, MadeTensors
from megameta.errors import UserError
from megameta.hf import gpt2, neox
from megameta.hf.foreign import HFValues
from megameta.hf.names import check_tensors, from_hf_name
from megameta.hf.shards import open_shards, widened
from megameta.model import ModelConfig

_CONFIG_FILE = "config.json"


class ImportedModel(NamedTuple):
    """A model in a HuggingFace directory."""

    config: ModelConfig
    tensors: LazyTensors
    """By canonical name, logical rows; read from the files when they are asked for."""
    tokenizer_dir: str | None
    """Where ``load_tokenizer`` finds the tokenizer; None where there is none."""
    is_foreign: bool = False
    """Whether it was made elsewhere: then ``config`` is that of a model without meta-tokens, whose ``meta_token_id``
    (the last id) means nothing."""


def import_from_hf(directory: str | Path) -> ImportedModel:
    """The inverse of ``export_to_hf``, for both of its kinds; bitwise, 16-bit weights widened to float32.

    Raises:
        UserError: a directory that is not an export of this project, or a damaged one.
    """
    model = read_hf_model(directory)
    if model.is_foreign:
        raise UserError(
            f"{directory} was not exported by megameta, so it has no meta-token: start from it with"
            f" megameta train CONFIG init.from_hf={directory}, or make a checkpoint of it with"
            f" python tools/convert_checkpoint.py from-hf {directory} --output CHECKPOINT"
        )
    return model


def read_hf_model(directory: str | Path) -> ImportedModel:
    """An export of this project, or a GPT-2 or GPT-NeoX from elsewhere; 16-bit weights are widened to float32.

    Raises:
        UserError: another kind of model, one that the training model cannot compute, or damaged files.
    """
    directory = Path(directory)
    path = directory / _CONFIG_FILE
    values = read_json(path)
    try:
        model = _read(directory, values)
    except KeyError as error:
        raise UserError(f"{directory} is damaged: {error.args[0]} is missing") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from error
    check_tensors(model.config, model.tensors, str(directory))
    return model


def _read(directory: Path, values: dict[str, Any]) -> ImportedModel:
    kind = values.get("model_type")
    tokenizer = _tokenizer_dir(directory)
    if kind == "megameta":
        return ImportedModel(*_from_megameta(values, widened(open_shards(directory))), tokenizer)
    if kind == "gpt2" and gpt2.CONFIG_SECTION in values:
        stored = widened(open_shards(directory))
        config = gpt2.read_gpt2_section(values, stored)
        return ImportedModel(config, gpt2.from_gpt2(config, stored), tokenizer)
    if kind == "gpt2":
        config = _foreign_config(directory, values, gpt2.read_gpt2_config, 50257)
        stored = widened(open_shards(directory, gpt2.IGNORED))
        return ImportedModel(config, gpt2.from_gpt2(config, stored), tokenizer, is_foreign=True)
    if kind == "gpt_neox":
        config = _foreign_config(directory, values, neox.read_neox_config, 50432)
        stored = widened(open_shards(directory, neox.IGNORED))
        return ImportedModel(config, neox.from_neox(config, stored), tokenizer, is_foreign=True)
    raise UserError(
        f"{directory}: a model of type {kind!r} cannot be imported; exports of megameta, and gpt2 and gpt_neox from"
        " elsewhere can"
    )


def _foreign_config(directory: Path, values: dict[str, Any], read: Any, default_vocab_size: int) -> ModelConfig:
    asked = HFValues(values, directory / _CONFIG_FILE)
    fields = read(asked)
    vocab_size = asked.get("vocab_size", default_vocab_size)
    asked.check()
    return ModelConfig(**fields, vocab_size=vocab_size, meta_attention=False)


def _from_megameta(values: dict[str, Any], stored: LazyTensors) -> tuple[ModelConfig, LazyTensors]:
    from megameta.hf.configuration import MegametaConfig

    config = MegametaConfig(**values).to_model_config()
    names = {from_hf_name(name): name for name in stored}
    output = names.get("head.output.weight")
    if config.tie_embeddings and output is not None:  # some writers store a tied weight twice
        if not torch.equal(stored[output], stored[names["embedding.tokens.weight"]]):
            raise ValueError("tie_word_embeddings is true, but lm_head.weight is not the token embedding")
        del names["head.output.weight"]
    return config, renamed(stored, names)


def renamed(tensors: LazyTensors, names: dict[str, str]) -> MadeTensors:
    """Some tensors under other names (new name to the one they have)."""

    def maker(name: str) -> Any:
        return lambda: tensors[name]

    return MadeTensors({new: (tensors.entry(old)._replace(name=new), maker(old)) for new, old in names.items()})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a HuggingFace directory.

    Raises:
        UserError: it is not there, or no such thing.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the directory of a HuggingFace model") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: an object is expected")
    return values


def _tokenizer_dir(directory: Path) -> str | None:
    names = ("tokenizer.json", "vocab.json", "*.model")
    return str(directory) if any(any(directory.glob(name)) for name in names) else None
