"""The baseline as transformers' own GPT-2."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from megameta.errors import UserError
from megameta.hf.export import export_to_hf
from megameta.hf.gpt2 import fits_gpt2
from megameta.hf.importer import import_from_hf
from tests.support.exports import BASELINE, padded_batch, small_tokenizer, tensors_of, tokenizer_config
from tests.support.models import assert_close, case_id, covering, small_config, small_model

VARIANTS = covering({"bias": [False, True], "tie_embeddings": [True, False], "activation": ["gelu", "gelu_tanh"]})


@pytest.mark.parametrize("case", VARIANTS, ids=case_id)
def test_stock_gpt2_computes_the_same(case: dict, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    config = tokenizer_config(tokenizer, **BASELINE, **case, attention_backend="auto", norm_eps=1e-4)
    model = small_model(config, torch.float32, vocab_multiple=1).eval()
    directory = export_to_hf(config, tensors_of(model), tmp_path / "export", tokenizer)
    assert not list(directory.glob("*.py")) and "auto_map" not in json.loads((directory / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(directory)  # no trust_remote_code
    assert type(loaded) is GPT2LMHeadModel and type(AutoConfig.from_pretrained(directory)).__name__ == "GPT2Config"
    ids, mask = padded_batch(config)
    with torch.inference_mode():
        assert_close(loaded(ids).logits, model(ids), 1e-5)
    generated = loaded.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert not (generated[:, ids.shape[1] :] == config.meta_token_id).any()
    text = "the old man"
    assert AutoTokenizer.from_pretrained(directory)(text)["input_ids"] == tokenizer.encode(text)
    imported = import_from_hf(directory)
    assert imported.config == config and imported.tokenizer_dir == str(directory)
    tensors = tensors_of(model)
    assert imported.tensors.keys() == tensors.keys()
    assert all(torch.equal(imported.tensors[name], tensors[name]) for name in tensors)


def test_biases_that_were_trained_since_are_kept(tmp_path: Path) -> None:
    config = small_config(**BASELINE)
    export_to_hf(config, tensors_of(small_model(config, torch.float32, vocab_multiple=1)), tmp_path / "export")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        loaded.transformer.h[1].attn.c_attn.bias += 0.5
    loaded.save_pretrained(tmp_path / "tuned")
    imported = import_from_hf(tmp_path / "tuned")
    assert imported.config.bias
    assert imported.tensors["blocks.1.attention.k_proj.bias"].eq(0.5).all()
    assert not imported.tensors["blocks.0.attention.k_proj.bias"].any()


@pytest.mark.parametrize(
    "changes",
    [
        {"meta_attention": True},
        {"position": "rope"},
        {"norm": "rmsnorm"},
        {"activation": "swiglu"},
        {"qk_norm": True},
        {"parallel_residual": True},
        {"num_key_value_heads": 2},
        {"zero_meta_positions": True},
        {"zero_meta_embedding": True},
    ],
    ids=str,
)
def test_what_gpt2_does_not_compute_is_no_gpt2(changes: dict) -> None:
    assert fits_gpt2(small_config(**BASELINE))
    assert not fits_gpt2(small_config(**{**BASELINE, **changes}))


def test_other_gpt2s_are_not_mistaken_for_ours(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not exported by megameta"):
        import_from_hf(tmp_path)
