"""From a configuration file to the things a run is made of."""

import os
from typing import Any

import torch
from torch import Tensor

from megameta.checkpoint import load_weights
from megameta.config import RunConfig, build_config, key_places, load_raw
from megameta.data.tokenizer import Tokenizer, load_tokenizer
from megameta.errors import UserError
from megameta.model import GPT, ModelConfig, initialize_weights
from megameta.model.init import is_vocabulary_table


def load_run_config(
    path: str | os.PathLike[str], overrides: list[str] | None = None, *, need_files: bool = True
) -> RunConfig:
    """The configuration with what follows from its files filled in: the vocabulary from data.tokenizer, the window of
    learned positions from data.sequence_length.

    Args:
        need_files: whether a tokenizer that is not there is an error (it is not for ``config show`` and ``check``).
    """
    raw = load_raw(path, overrides)
    places = key_places(path, overrides or [])
    config = build_config(raw, str(path), places)
    given = raw.get("model") or {}
    filled: dict[str, Any] = {}
    if config.data.tokenizer is not None and (need_files or os.path.exists(config.data.tokenizer)):
        filled = _vocabulary(load_tokenizer(config.data.tokenizer), given, config.data.tokenizer)
    if "max_position_embeddings" not in given:
        filled["max_position_embeddings"] = config.data.sequence_length
    return build_config({**raw, "model": {**given, **filled}}, str(path), places)


def _vocabulary(tokenizer: Tokenizer, given: dict[str, Any], path: str) -> dict[str, int]:
    facts = {"vocab_size": tokenizer.vocab_size, "meta_token_id": tokenizer.meta_token_id}
    for key, value in facts.items():
        if key in given and given[key] != value:
            raise UserError(f"model.{key} is {given[key]}, but the tokenizer {path} has {value}; leave the key out")
    return facts


def build_model(config: RunConfig, weights: dict[str, Tensor] | None = None) -> GPT:
    """The model on the CPU, with the given weights (logical rows by canonical name) or drawn from run.seed.

    Raises:
        UserError: the weights are those of another model; names and shapes that differ are listed.
    """
    with torch.device("meta"):
        model = GPT(config.model)
    model.to_empty(device="cpu")
    if weights is None:
        initialize_weights(model, config.model, config.run.seed)
    else:
        load_into(model, config.model, weights)
    return model


def load_into(model: GPT, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Copy weights into a model; rows that pad the vocabulary become zero."""
    expected = dict(model.named_parameters())
    wrong = [f"{name}: missing" for name in expected.keys() - weights.keys()]
    wrong += [f"{name}: not in this model" for name in weights.keys() - expected.keys()]
    for name in expected.keys() & weights.keys():
        shape = list(expected[name].shape)
        if is_vocabulary_table(name):
            shape[0] = config.vocab_size
        if list(weights[name].shape) != shape:
            wrong.append(f"{name}: shape {list(weights[name].shape)}, the model has {shape}")
    if wrong:
        raise UserError("\n  ".join(["the checkpoint's weights do not fit the model:", *sorted(wrong)[:20]]))
    with torch.no_grad():
        for name, parameter in expected.items():
            rows = weights[name].shape[0]
            parameter[:rows] = weights[name]
            parameter[rows:] = 0


def initial_weights(config: RunConfig) -> dict[str, Tensor] | None:
    """Weights of init.from_checkpoint, None where the run starts from drawn ones."""
    if config.init.from_checkpoint is None:
        return None
    return load_weights(config.init.from_checkpoint)[1]
