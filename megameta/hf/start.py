"""A model in a HuggingFace directory as the start of a run (``init.from_hf``): its configuration and its weights.

A model from elsewhere gets what it lacks, a row for the meta-token and the meta branch, so that step 0 computes what
the source computes. The branch is drawn like that of a new model, but its output projection is zero: it adds nothing
until it has learnt something. The meta-token's rows are the mean of their table's: its logit is then the mean of the
logits, at most the logarithm of the mean of their exponentials, so the loss on text rises by log(1 + 1/V) or less. (A
small random row would not do: all of GPT-2's logits are far below 0.)
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megameta.checkpoint.tensor_file import LazyTensors, MadeTensors, TensorEntry
from megameta.config import DataSection
from megameta.errors import UserError
from megameta.hf.importer import ImportedModel, read_hf_model
from megameta.model import ModelConfig
from megameta.model.init import draw_parameter, is_vocabulary_table
from megameta.model.shapes import parameter_shapes
from megameta.tokenizers import Tokenizer, load_tokenizer

#: What a run may set as it likes; every other field of ModelConfig is the source's.
_FREE = (
    "meta_attention",
    "meta_layers",
    "zero_meta_positions",
    "zero_meta_embedding",
    "position_scaling",
    "position_scaling_factor",
    "original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_attention_factor",
    "initializer_range",
    "attention_backend",
)
_BRANCH = (".meta_attention.", ".norm_meta.")


def start_values(raw: Mapping[str, Any], directory: str) -> dict[str, Any]:
    """Plain values of a run configuration with what follows from init.from_hf: the model section, and data.tokenizer
    where none is given and the directory has one.

    Raises:
        UserError: ``read_hf_model``'s; or the configuration asks for another model, told with every key that differs.
    """
    source = read_hf_model(directory)
    data, given = dict(raw.get("data") or {}), dict(raw.get("model") or {})
    if data.get("tokenizer") is None and source.tokenizer_dir is not None:
        data["tokenizer"] = source.tokenizer_dir
    tokenizer = load_tokenizer(data["tokenizer"]) if isinstance(data.get("tokenizer"), str) else None
    model = start_model(source, tokenizer, directory)
    free: tuple[str, ...] = _FREE
    if model["position"] != "ape":  # no table ends there: it says how long the longest sequence was
        free = (*_FREE, "max_position_embeddings")
        length = data.get("sequence_length", DataSection.model_fields["sequence_length"].default)
        if isinstance(length, int):
            model["max_position_embeddings"] = max(length, model["max_position_embeddings"])
    differing = [
        f"model.{key}: {given[key]!r} in the configuration, {value!r} in the source"
        for key, value in model.items()
        if key in given and key not in free and given[key] != value
    ]
    if differing:
        raise UserError(
            "\n  ".join([f"{directory} is another model than the configuration's:", *differing, "leave these keys out"])
        )
    return {**raw, "model": {**model, **given}, "data": data}


def start_model(source: ImportedModel, tokenizer: Tokenizer | None, directory: str | Path) -> dict[str, Any]:
    """Values of the model section: the source's; of a foreign one with a meta-token and the branch in all layers.

    Args:
        tokenizer: gives the meta-token's id; without one it comes after the source's last row. Rows of a foreign source
            that no token has (they make its table a rounder size) are left out.

    Raises:
        UserError: the tokenizer is not the source's.
    """
    values = source.config.to_dict()
    del values["attention_backend"]
    if tokenizer is not None:
        _check_tokenizer(source, tokenizer, directory)
        values |= {"vocab_size": tokenizer.vocab_size, "meta_token_id": tokenizer.meta_token_id}
    elif source.is_foreign:
        rows = source.config.vocab_size
        values |= {"vocab_size": rows + 1, "meta_token_id": rows}
    if source.is_foreign:
        values["meta_attention"] = True
    return values


def _check_tokenizer(source: ImportedModel, tokenizer: Tokenizer, directory: str | Path) -> None:
    rows, config = source.config.vocab_size, source.config
    wrong = None
    if source.is_foreign and tokenizer.meta_token_id > rows:
        wrong = f"it has {tokenizer.meta_token_id} entries, and the source {rows} rows"
    elif not source.is_foreign and (tokenizer.vocab_size, tokenizer.meta_token_id) != (rows, config.meta_token_id):
        wrong = (
            f"it has {tokenizer.vocab_size} entries and the meta-token at {tokenizer.meta_token_id}, and the source"
            f" {rows} rows and {config.meta_token_id}"
        )
    elif source.tokenizer_dir is not None and not _same_ids(tokenizer, load_tokenizer(source.tokenizer_dir)):
        wrong = f"its ids are not those of the one in {source.tokenizer_dir}"
    if wrong is not None:
        raise UserError(f"data.tokenizer is not the tokenizer of {directory}: {wrong}; leave it out, or give that one")


def _same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    if one.digest() == other.digest():
        return True
    same_size = (one.vocab_size, one.meta_token_id, one.eod_id) == (other.vocab_size, other.meta_token_id, other.eod_id)
    return same_size and all(one.spelling(index) == other.spelling(index) for index in range(one.vocab_size))


def start_weights(directory: str | Path, config: ModelConfig, seed: int) -> LazyTensors:
    """Weights of a run's model by canonical name, each made when it is asked for; what the source lacks is as above.

    Tensors that the model does not have are kept, so that whoever takes the weights can refuse them by name.

    Raises:
        UserError: see ``read_hf_model``; or the source lacks more than the branch and the meta-token.
    """
    source = read_hf_model(directory)
    shapes = parameter_shapes(config)
    tensors = source.tensors
    made: dict[str, tuple[TensorEntry, Callable[[], Tensor]]] = {}
    for name in [*shapes, *(name for name in tensors if name not in shapes)]:
        if name in tensors and source.is_foreign and is_vocabulary_table(name):
            entry = TensorEntry(name, shapes.get(name, tensors.shape(name)), tensors.entry(name).dtype)
            made[name] = (entry, partial(_with_meta_row, tensors, name, config))
        elif name in tensors:
            made[name] = (tensors.entry(name), partial(tensors.__getitem__, name))
        elif any(part in name for part in _BRANCH):
            made[name] = (TensorEntry(name, shapes[name]), partial(_fresh, name, shapes[name], config, seed))
    return MadeTensors(made)


def _with_meta_row(tensors: Mapping[str, Tensor], name: str, config: ModelConfig) -> Tensor:
    """The source's rows of a vocabulary table, and their mean in the meta-token's place."""
    rows = tensors[name]
    table = torch.empty(config.vocab_size, rows.shape[1], dtype=rows.dtype)
    kept = rows[: min(len(rows), config.vocab_size)]
    table[: len(kept)] = kept
    is_text = torch.arange(len(kept)) != config.meta_token_id
    table[config.meta_token_id] = kept[is_text].double().mean(dim=0)
    return table


def _fresh(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """A parameter of a new branch: as drawn for a new model, but for the output projection, which is zero."""
    if name.endswith("meta_attention.o_proj.weight"):
        return torch.zeros(shape)
    return draw_parameter(name, shape, config, seed)
