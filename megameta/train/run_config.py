"""From a configuration file to the whole configuration of a run; needs no torch, unless init.from_hf is given."""

import os
from typing import Any

from megameta.config import RunConfig, build_config, key_locations, load_raw
from megameta.errors import UserError
from megameta.tokenizers import Tokenizer, load_tokenizer


def load_run_config(
    path: str | os.PathLike[str], overrides: list[str] | None = None, *, need_files: bool = True
) -> RunConfig:
    """The configuration with what follows from its files filled in: the model from init.from_hf, the vocabulary from
    data.tokenizer, the window of learned positions from data.sequence_length.

    Args:
        need_files: whether a tokenizer or init.from_hf that is not there is an error (it is not for ``config show`` and
            ``check``).
    """
    raw = load_raw(path, overrides)
    sections = [raw.get(name) or {} for name in ("init", "model", "data")]
    start = sections[0].get("from_hf") if all(isinstance(section, dict) for section in sections) else None
    if isinstance(start, str) and (need_files or os.path.exists(start)):
        from megameta.hf.start import start_values

        raw = start_values(raw, start)
    locations = key_locations(path, overrides or [])
    config = build_config(raw, str(path), locations)
    given = raw.get("model") or {}
    filled: dict[str, Any] = {}
    if config.data.tokenizer is not None and (need_files or os.path.exists(config.data.tokenizer)):
        filled = _vocabulary(load_tokenizer(config.data.tokenizer), given, config.data.tokenizer)
    if "max_position_embeddings" not in given:
        filled["max_position_embeddings"] = config.data.sequence_length
    return build_config({**raw, "model": {**given, **filled}}, str(path), locations)


def _vocabulary(tokenizer: Tokenizer, given: dict[str, Any], path: str) -> dict[str, int]:
    facts = {"vocab_size": tokenizer.vocab_size, "meta_token_id": tokenizer.meta_token_id}
    for key, value in facts.items():
        if key in given and given[key] != value:
            raise UserError(f"model.{key} is {given[key]}, but the tokenizer {path} has {value}; leave the key out")
    return facts
