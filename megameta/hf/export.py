"""Writes a model as a HuggingFace directory, and refuses to leave one behind whose logits are not the model's."""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megameta.errors import UserError
from megameta.files import whole_directory
from megameta.hf.bundle import MODELING_FILE, bundle_source
from megameta.hf.card import make_card
from megameta.hf.gpt2 import fits_gpt2, make_gpt2_config
from megameta.hf.names import check_tensors
from megameta.hf.shards import as_exported, cast, write_shards
from megameta.hf.verify import verify_export
from megameta.model import ModelConfig
from megameta.tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

#: Classes that transformers' Auto classes find in the modeling file.
AUTO_MAP = {
    "AutoConfig": "MegametaConfig",
    "AutoModel": "MegametaModel",
    "AutoModelForCausalLM": "MegametaForCausalLM",
}


def export_to_hf(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    output_dir: str | Path,
    tokenizer: Tokenizer | None = None,
    card: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write safetensors, config.json, generation_config.json, the modeling file, tokenizer files and a model card.

    A model that GPT2LMHeadModel computes exactly (``fits_gpt2``) becomes that, without a modeling file. The directory
    appears under its name only when it is whole and has been verified (``verify_export``). Tensors are asked for one by
    one, and no more than a layer of them is kept: with a lazy mapping (``StoredTensors``) no model is ever in memory.

    Args:
        tensors: logical tensors (no padding rows) by canonical name in the plain ``GPT``.
        card: see ``make_card``.
        dtype: of the stored weights; default: that of the tensors.
        overwrite: replace an existing export.
        max_shard_size: weights are split into files of at most this size.
        files: what the card shows, by name.

    Returns:
        The directory.

    Raises:
        UserError: the output exists, tensors or tokenizer do not fit the configuration, or verification failed.
    """
    output = Path(output_dir)
    _check_output(output, overwrite)
    # Which kernel trained the model says nothing about this machine, nor about the one that will load it.
    config = dataclasses.replace(config, attention_backend="auto")
    check_tensors(config, tensors, "the model to export")
    _check_tokenizer(config, tokenizer)
    _check_shard_size(max_shard_size)
    stored = cast(tensors, dtype)
    stored_dtype = stored.entry(next(iter(stored))).dtype
    with _appears_whole(output) as directory:
        pad_id = _write_tokenizer(config, tokenizer, directory)
        _hf_config(config, stored_dtype).save_pretrained(directory)
        _generation_config(config, tokenizer, pad_id).save_pretrained(directory)
        write_shards(directory, as_exported(config, stored), max_shard_size)
        stock = fits_gpt2(config)
        if not stock:
            (directory / MODELING_FILE).write_text(bundle_source(), encoding="utf-8")
        parameters = sum(math.prod(stored.shape(name)) for name in stored)
        about: dict[str, Any] = {"num_parameters": parameters, "has_tokenizer": tokenizer is not None}
        text = make_card(config, card or {}, stock=stock, dtype=_name_of(stored_dtype), **about)
        for name, content in {**(files or {}), "README.md": text.encode()}.items():
            (directory / name).write_bytes(content)
        verify_export(directory, config, stored)
    return output


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{output} exists already: choose another output, or pass --overwrite to replace it")
    if not (output / "config.json").is_file():
        raise UserError(
            f"{output} is not a HuggingFace model directory, so it is not overwritten: choose another output"
        )


def _check_shard_size(size: str) -> None:
    if not re.fullmatch(r"[1-9][0-9]*(\.[0-9]+)?[KMGT]B", size, re.IGNORECASE):
        raise UserError(f"the largest size of a file of weights is {size!r}: write it like 500MB or 5GB")


def _check_tokenizer(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        return
    if tokenizer.vocab_size > config.vocab_size or tokenizer.meta_token_id != config.meta_token_id:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} entries and the meta-token at {tokenizer.meta_token_id}, but the"
            f" model {config.vocab_size} and {config.meta_token_id}: give the tokenizer that the model was trained with"
        )


@contextlib.contextmanager
def _appears_whole(output: Path) -> Iterator[Path]:
    try:
        with whole_directory(output) as work:
            yield work
    except OSError as error:
        raise UserError(f"cannot write to {output.parent}: {error.strerror or error}") from error


def _hf_config(config: ModelConfig, dtype: torch.dtype) -> "PretrainedConfig":
    """What becomes config.json."""
    from megameta.hf.modeling import MegametaConfig

    result: PretrainedConfig
    if fits_gpt2(config):
        result, result_class = make_gpt2_config(config), "GPT2LMHeadModel"
    else:
        module = MODELING_FILE.removesuffix(".py")
        auto_map = {auto: f"{module}.{name}" for auto, name in AUTO_MAP.items()}
        result_class = AUTO_MAP["AutoModelForCausalLM"]
        result = MegametaConfig.from_model_config(config, auto_map=auto_map)
    result.architectures = [result_class]
    result.dtype = _name_of(dtype)
    return result


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_tokenizer(config: ModelConfig, tokenizer: Tokenizer | None, directory: Path) -> int | None:
    """Save the tokenizer and return the id of its padding token."""
    if tokenizer is None:
        return None
    tokenizer.save(directory)
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values.setdefault("model_max_length", config.max_position_embeddings)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    pad = values.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    pad_id = tokenizer.token_id(pad) if pad else None
    return tokenizer.eod_id if pad_id is None else pad_id


def _generation_config(config: ModelConfig, tokenizer: Tokenizer | None, pad_id: int | None) -> "GenerationConfig":
    from transformers import GenerationConfig

    eod_id = tokenizer.eod_id if tokenizer is not None else None
    return GenerationConfig(
        bos_token_id=eod_id, eos_token_id=eod_id, pad_token_id=pad_id, suppress_tokens=[config.meta_token_id]
    )
