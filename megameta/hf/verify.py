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

from megameta.errors import UserError
from megameta.hf.bundle import MODELING_FILE
from megameta.hf.gpt2 import fits_gpt2, to_gpt2
from megameta.hf.names import to_hf_name
from megameta.model import GPT, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Largest difference of a logit, relative to the largest logit of the training model, in float32.
TOLERANCE = 1e-5
_PROBE_LENGTH = 64
_MODULE_NAME = "megameta_export_under_verification"


def verify_export(directory: str | Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check that the files hold these very tensors and that the written code computes the training model's logits.

    Args:
        tensors: canonical name to tensor, in the dtype that the files should hold.

    Raises:
        UserError: they do not; the message says where.
    """
    directory = Path(directory)
    try:
        model = _load(directory, config)
    finally:
        shutil.rmtree(directory / "__pycache__", ignore_errors=True)
        sys.modules.pop(_MODULE_NAME, None)
    stock = fits_gpt2(config)
    named = to_gpt2(config, tensors) if stock else {to_hf_name(name): tensor for name, tensor in tensors.items()}
    loaded = model.state_dict()
    for name, tensor in named.items():
        if name not in loaded or not torch.equal(loaded[name], tensor.float()):
            raise UserError(f"verification of {directory} failed: {name} as reloaded is not what was to be written")
    token_BT = _probe(config)
    reference = GPT(config, vocab_multiple=1).eval()
    reference.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    with torch.inference_mode():
        expected_BTV = reference(token_BT)
        logits_BTV = model(token_BT, use_cache=False).logits
    if not torch.isfinite(expected_BTV).all():
        raise UserError("the model to export gives logits that are not finite: its weights are damaged or diverged")
    difference = float((logits_BTV - expected_BTV).abs().max() / expected_BTV.abs().max().clamp(min=1e-30))
    if not difference <= TOLERANCE:
        raise UserError(
            f"verification of {directory} failed: its logits differ from the training model's by {difference:.1e}"
            f" relative, more than {TOLERANCE:.0e}"
        )


def _load(directory: Path, config: ModelConfig) -> "PreTrainedModel":
    """The model from the files alone, float32."""
    if fits_gpt2(config):
        from transformers import GPT2LMHeadModel

        model_class: Any = GPT2LMHeadModel
    else:
        model_class = _import_file(directory / MODELING_FILE).MegametaForCausalLM
    model, info = model_class.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    wrong = [f"{kind}: {', '.join(sorted(map(str, info[kind]))[:3])}" for kind in info if info[kind]]
    if wrong:
        raise UserError(f"verification of {directory} failed: on reloading, {'; '.join(wrong)}")
    return model.eval()


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
