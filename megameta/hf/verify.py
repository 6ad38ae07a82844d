"""Reloads an export from its files and compares it with the training model."""

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megameta.checkpoint.tensor_file import LazyTensors, StoredTensors
from megameta.errors import UserError
from megameta.hf.bundle import MODELING_FILE
from megameta.hf.gpt2 import fits_gpt2
from megameta.hf.shards import as_exported, cast, open_shards
from megameta.hf.stream import LayerWeights
from megameta.model import GPT, ModelConfig
from megameta.model.context import make_context
from megameta.model.shapes import on_meta_device, without_kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Largest difference of a logit, relative to the largest logit of the training model, in float32.
TOLERANCE = 1e-5
_PROBE_LENGTH = 64
_MODULE_NAME = "megameta_export_under_verification"


def verify_export(directory: str | Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check that the files hold these very tensors and that the written code computes the training model's logits.

    Neither model is ever in memory: tensors are compared one by one, and layers get their weights while they run.

    Args:
        tensors: canonical name to tensor, in the dtype that the files should hold.

    Raises:
        UserError: they do not; the message says where.
    """
    directory = Path(directory)
    tensors = cast(tensors, None)
    try:
        model = _make_model(directory, config)
        stored = open_shards(directory)
        aliases = _check_names(directory, model, stored)
        _check_tensors(directory, stored, as_exported(config, tensors))
        token_BT = _probe(config)
        with torch.no_grad():
            expected_BTV = _reference_logits(config, tensors, token_BT)
            with LayerWeights(lambda name: stored[aliases.get(name, name)]).streamed(model):
                logits_BTV = model(token_BT, use_cache=False).logits
    finally:
        shutil.rmtree(directory / "__pycache__", ignore_errors=True)
        sys.modules.pop(_MODULE_NAME, None)
    if not torch.isfinite(expected_BTV).all():
        raise UserError(
            "the model to export gives logits that are not finite: its weights are damaged, have diverged, or are too"
            " large for the type to be stored (--dtype bfloat16 and float32 hold larger numbers than float16)"
        )
    difference = float((logits_BTV - expected_BTV).abs().max() / expected_BTV.abs().max().clamp(min=1e-30))
    if not difference <= TOLERANCE:
        raise UserError(
            f"verification of {directory} failed: its logits differ from the training model's by {difference:.1e}"
            f" relative, more than {TOLERANCE:.0e}"
        )


def _make_model(directory: Path, config: ModelConfig) -> "PreTrainedModel":
    """The model that the written config.json and the written code make, float32, without weights."""
    if fits_gpt2(config):
        from transformers import GPT2LMHeadModel

        model_class: Any = GPT2LMHeadModel
    else:
        model_class = _import_file(directory / MODELING_FILE).MegametaForCausalLM
    model_config = model_class.config_class.from_pretrained(directory)
    with on_meta_device():
        return model_class(model_config).float().eval()


def _check_names(directory: Path, model: "PreTrainedModel", stored: StoredTensors) -> dict[str, str]:
    """Refuse files that do not hold exactly the model's weights; which weight a tied one is taken from."""
    aliases = model.all_tied_weights_keys
    expected = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in aliases
    }
    wrong = {
        "missing_keys": expected.keys() - stored.keys(),
        "unexpected_keys": stored.keys() - expected.keys(),
        "mismatched_keys": {name for name in expected.keys() & stored.keys() if stored.shape(name) != expected[name]},
    }
    said = [f"{kind}: {', '.join(sorted(names)[:3])}" for kind, names in wrong.items() if names]
    if said:
        raise UserError(f"verification of {directory} failed: on reloading, {'; '.join(said)}")
    return aliases


def _check_tensors(directory: Path, stored: StoredTensors, wanted: LazyTensors) -> None:
    for name in wanted:
        # entries first: equal bytes of another type or shape would be another tensor
        if name not in stored or stored.entry(name) != wanted.entry(name) or not _same(stored[name], wanted[name]):
            raise UserError(f"verification of {directory} failed: {name} as reloaded is not what was to be written")


def _same(first: Tensor, second: Tensor) -> bool:
    """Bit by bit, so that NaN is itself and −0 is not 0."""
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (first, second)))


def _reference_logits(config: ModelConfig, tensors: Mapping[str, Tensor], token_BT: Tensor) -> Tensor:
    """Logits of the training model (``GPT``), one layer in memory at a time."""
    weights = LayerWeights(tensors.__getitem__)
    with on_meta_device():
        model = GPT(without_kernels(config), vocab_multiple=1).eval()
    context = make_context(config, token_BT)
    with weights.filled(model.embedding, "embedding"):
        x_BTD = model.embedding(token_BT, context)
    for layer, block in enumerate(model.blocks):
        with weights.filled(block, f"blocks.{layer}"):
            x_BTD = block(x_BTD, context)
    table = tensors["embedding.tokens.weight"].float() if config.tie_embeddings else torch.empty(0)
    with weights.filled(model.head, "head"):
        return model.head(x_BTD, table)


def _import_file(path: Path) -> ModuleType:
    """Import a written modeling file by path, not through transformers' cache of remote code."""
    spec = importlib.util.spec_from_file_location(_MODULE_NAME, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE_NAME] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _probe(config: ModelConfig) -> Tensor:
    """Three sequences of random ids: without meta-tokens, with some, and with many."""
    generator = torch.Generator().manual_seed(0)
    length = min(config.max_position_embeddings, _PROBE_LENGTH)
    token_BT = torch.randint(config.vocab_size, (3, length), generator=generator)
    token_BT = token_BT.masked_fill(token_BT == config.meta_token_id, 0 if config.meta_token_id else 1)
    share_B1 = torch.tensor([[0.0], [0.1], [0.5]])
    is_meta_BT = torch.rand(token_BT.shape, generator=generator) < share_B1
    is_meta_BT[1:, min(1, length - 1)] = True
    return token_BT.masked_fill(is_meta_BT, config.meta_token_id)
