"""Small exports and tokenizers for the tests of the HuggingFace side."""

from typing import Any

import torch
from torch import Tensor

from megameta.hf.configuration import MegametaConfig
from megameta.hf.modeling import MegametaForCausalLM
from megameta.hf.names import to_hf_name
from megameta.model import GPT, ModelConfig
from megameta.tokenizers import FastTokenizer
from tests.support.models import covering, small_config, small_model

#: Every pair of these options occurs in one of the cases.
CASES = covering(
    {
        "position": ["rope", "ape", "none", "rnope"],
        "meta_attention": [True, False],
        "zero_meta_positions": [False, True],
        "zero_meta_embedding": [False, True],
        "norm": ["layernorm", "rmsnorm"],
        "bias": [False, True],
        "activation": ["gelu", "gelu_tanh", "swiglu"],
        "qk_norm": [False, True],
        "parallel_residual": [False, True],
        "tie_embeddings": [True, False],
        "num_key_value_heads": [4, 2],
        "rotary_fraction": [1.0, 0.5],
    }
)
#: The window before an extension.
WINDOW = {"original_max_position_embeddings": 16}
CASES += [
    {"position": "rope", "position_scaling": "yarn", "position_scaling_factor": 4.0, "zero_meta_positions": True},
    {"position": "rnope", "position_scaling": "ntk", "position_scaling_factor": 2.0, "rotary_fraction": 0.5},
    {"position": "rope", "position_scaling": "linear", "position_scaling_factor": 2.0},
    {"num_layers": 3, "meta_layers": (1,), "parallel_residual": True},
    {"num_layers": 4, "meta_layers": (0, 3), "position": "ape", "bias": True, "qk_norm": True},
]
CASES = [case | WINDOW if "position_scaling" in case else case for case in CASES]
#: The options of a baseline that GPT2LMHeadModel computes.
BASELINE = {"position": "ape", "meta_attention": False}


def make_pair(seed: int = 0, **changes: Any) -> tuple[ModelConfig, GPT, MegametaForCausalLM]:
    """A training model and the HuggingFace model of the same weights, float32."""
    config = small_config(**changes)
    model = small_model(config, torch.float32, vocab_multiple=1, seed=seed).eval()
    wrapper = MegametaForCausalLM(MegametaConfig.from_model_config(config)).eval()
    named = {to_hf_name(name): tensor for name, tensor in tensors_of(model).items()}
    assert not wrapper.load_state_dict(named, strict=False).unexpected_keys
    return config, model, wrapper


def tensors_of(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def small_tokenizer() -> FastTokenizer:
    """A byte-level BPE of 300 entries, trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the old man and the sea, the sea and the old man, wrench hammer pliers"] * 4, trainer)
    return FastTokenizer(backend, "<|endoftext|>")


def tokenizer_config(tokenizer: FastTokenizer, **changes: Any) -> ModelConfig:
    """A small model of the tokenizer's vocabulary."""
    return small_config(vocab_size=tokenizer.vocab_size, meta_token_id=tokenizer.meta_token_id, **changes)


def padded_batch(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Left-padded ids and their mask, (4, 14): 0, 1, 3 and 5 meta-tokens; one row is not padded, one is short."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, config.vocab_size - 1, (4, 14), generator=generator)
    ids = ids + (ids >= config.meta_token_id).long()
    mask = torch.ones_like(ids)
    for row, (pad, metas) in enumerate([(3, []), (0, [6]), (9, [9, 11, 12]), (2, [2, 3, 7, 10, 13])]):
        ids[row, metas] = config.meta_token_id
        mask[row, :pad] = 0
    ids = torch.where(mask.bool(), ids, config.meta_token_id)  # padding with the meta-token's id must not count as one
    return ids, mask
