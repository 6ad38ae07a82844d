"""The HuggingFace classes against the training model."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from megameta.hf.cache import MegametaCache
from megameta.hf.configuration import MegametaConfig
from megameta.model import make_context
from megameta.model.cache import NOWHERE
from tests.support.exports import CASES, make_pair, padded_batch
from tests.support.models import assert_close, case_id, make_tokens, small_config

POSITIONS = ["rope", "ape", "none", "rnope"]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_logits_are_the_training_models(case: dict) -> None:
    config, model, wrapper = make_pair(**case)
    for metas in ("none", "ragged", "all"):
        ids = make_tokens(config, metas)
        with torch.inference_mode():
            assert_close(wrapper(ids).logits, model(ids), 1e-5, metas)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_config_is_lossless(case: dict, tmp_path) -> None:
    config = small_config(**case, rope_theta=500.0, norm_eps=1e-6, attention_backend="auto")
    MegametaConfig.from_model_config(config).save_pretrained(tmp_path)
    assert MegametaConfig.from_pretrained(tmp_path).to_model_config() == config


def test_config_refuses_what_it_cannot_compute() -> None:
    with pytest.raises(ValueError, match="rope_type 'yarn' is not supported"):
        MegametaConfig(rope_parameters={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(ValueError, match="not a multiple"):
        MegametaConfig(hidden_size=30, num_attention_heads=4)


@pytest.mark.parametrize("zero_meta_positions", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
def test_padding_on_either_side_changes_nothing(position: str, zero_meta_positions: bool) -> None:
    config, model, wrapper = make_pair(position=position, zero_meta_positions=zero_meta_positions)
    left, mask = padded_batch(config)
    right, right_mask = torch.full_like(left, config.meta_token_id), torch.zeros_like(mask)
    rows = [ids[keep.bool()] for ids, keep in zip(left, mask)]
    for i, row in enumerate(rows):
        right[i, : len(row)], right_mask[i, : len(row)] = row, 1
    with torch.inference_mode():
        outputs = wrapper(left, attention_mask=mask).logits, wrapper(right, attention_mask=right_mask).logits
        unmasked = wrapper(right).logits
        for i, row in enumerate(rows):
            expected = model(row[None])[0]
            assert_close(outputs[0][i, -len(row) :], expected, 1e-5, "left")
            assert_close(outputs[1][i, : len(row)], expected, 1e-5, "right")
            assert_close(unmasked[i, : len(row)], expected, 1e-5, "right, without a mask")


def test_padding_is_never_a_meta_token() -> None:
    config, _, wrapper = make_pair()
    ids, mask = padded_batch(config)
    assert ((ids == config.meta_token_id) & (mask == 0)).any()
    with torch.inference_mode():
        cache = wrapper(ids, attention_mask=mask).past_key_values
    count = (cache.decoding.meta_order_BM != NOWHERE).sum(dim=1)
    assert count.tolist() == [0, 1, 3, 5]
    assert cache.decoding.meta_order_BM.shape[1] == 5  # nor does it cost a column


def chunks_through_cache(wrapper, ids: Tensor, mask: Tensor | None, sizes: list[int], cache=None) -> Tensor:
    logits, start = [], 0
    for size in sizes:
        seen = None if mask is None else mask[:, : start + size]
        out = wrapper(ids[:, start : start + size], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + size
        logits.append(out.logits)
    assert isinstance(cache, MegametaCache) and cache.get_seq_length() == start
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("position", POSITIONS)
def test_cached_chunks_equal_the_full_pass(position: str) -> None:
    config, _, wrapper = make_pair(position=position)
    ids, mask = padded_batch(config)
    with torch.inference_mode():
        for attention_mask in (None, mask):
            full = wrapper(ids, attention_mask=attention_mask, use_cache=False).logits
            chunked = chunks_through_cache(wrapper, ids, attention_mask, [5, 1, 1, 4, 3], DynamicCache())
            keep = slice(None) if attention_mask is None else mask.bool()
            assert_close(chunked[keep], full[keep], 1e-5)


def test_cache_operations() -> None:
    config, _, wrapper = make_pair()
    ids, mask = padded_batch(config)
    with torch.inference_mode():
        full = wrapper(ids, attention_mask=mask).logits
        cache = wrapper(ids[:, :12], attention_mask=mask[:, :12], use_cache=True).past_key_values
        assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (12, 4, 2)
        assert cache.get_mask_sizes(2, 0) == (14, 0)
        assert cache.get_max_length() == -1 and not cache.is_compileable and cache.is_initialized
        cache.crop(-3)  # meta-tokens are among the forgotten rows
        cache.crop(0)
        assert cache.get_seq_length() == 9
        again = wrapper(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits
        assert_close(again, full[:, 9:], 1e-5, "crop")
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([3, 1, 0, 1]))
        order = torch.tensor([3, 1, 0, 1])
        again = wrapper(ids[order, 12:], attention_mask=mask[order], past_key_values=cache).logits
        assert_close(again, full[order, 12:], 1e-5, "reorder_cache")
        cache.crop(-2)
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.batch_repeat_interleave(2)
        order = torch.tensor([3, 3, 0, 0])
        again = wrapper(ids[order, 12:], attention_mask=mask[order], past_key_values=cache).logits
        assert_close(again, full[order, 12:], 1e-5, "select and repeat")
        cache.reset()
        assert (cache.get_seq_length(), cache.batch_size) == (0, -1)


def test_other_caches_are_refused_by_name() -> None:
    config, _, wrapper = make_pair()
    ids, _ = padded_batch(config)
    static = StaticCache(config=wrapper.config, max_cache_len=32)
    with pytest.raises(ValueError, match="cannot use a StaticCache"):
        wrapper(ids, past_key_values=static)


def test_arguments_that_are_not_supported() -> None:
    config, _, wrapper = make_pair(position="ape", max_position_embeddings=14)
    ids, mask = padded_batch(config)
    for arguments, message in [
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "pass input_ids"),
        ({"input_ids": ids, "output_attentions": True}, "output_attentions is not supported"),
        ({"input_ids": ids, "attention_mask": mask[:, None, None]}, "attention_mask has shape"),
        ({"input_ids": ids, "attention_mask": mask[:, 1:]}, "attention_mask has shape"),
        ({"input_ids": torch.cat((ids, ids), dim=1)}, "exceeds this model's 14 learned positions"),
        ({"input_ids": ids, "labels": ids, "logits_to_keep": 1}, "leave logits_to_keep at 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrapper(**arguments)


def test_left_padding_beyond_the_learned_positions_is_fine() -> None:
    config, _, wrapper = make_pair(position="ape", max_position_embeddings=14)
    ids, mask = padded_batch(config)
    longer, longer_mask = torch.nn.functional.pad(ids, (4, 0)), torch.nn.functional.pad(mask, (4, 0))
    with torch.inference_mode():
        wide = wrapper(longer, attention_mask=longer_mask).logits[:, 4:]
        assert_close(wide[mask.bool()], wrapper(ids, attention_mask=mask).logits[mask.bool()], 1e-5)


def test_outputs() -> None:
    config, model, wrapper = make_pair()
    ids = make_tokens(config, "ragged")
    with torch.inference_mode():
        out = wrapper(ids, output_hidden_states=True)
        assert len(out.hidden_states) == config.num_layers + 1
        hidden = model.hidden_states(ids, make_context(config, ids))
        assert_close(model.head(hidden, model.embedding.tokens.weight), out.logits, 1e-5)
        assert_close(wrapper.lm_head(out.hidden_states[-1]), out.logits, 1e-6)
        assert wrapper(ids).hidden_states is None
        assert_close(wrapper(ids, logits_to_keep=2).logits, out.logits[:, -2:], 1e-6)
        assert_close(wrapper(ids, logits_to_keep=torch.tensor([0, 4])).logits, out.logits[:, [0, 4]], 1e-6)
        as_tuple = wrapper(ids, return_dict=False, use_cache=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], wrapper(ids, use_cache=False).logits)


def test_loss_skips_meta_tokens_padding_and_ignored_labels() -> None:
    config, _, wrapper = make_pair()
    ids, mask = padded_batch(config)
    labels = ids.clone()
    labels[1, 3:6] = -100
    out = wrapper(ids, attention_mask=mask, labels=labels)
    log_probability = out.logits.log_softmax(-1)
    losses = [
        -log_probability[i, t - 1, labels[i, t]]
        for i in range(len(ids))
        for t in range(1, ids.shape[1])
        if labels[i, t] not in (-100, config.meta_token_id) and mask[i, t] and mask[i, t - 1]
    ]
    assert_close(out.loss, torch.stack(losses).mean(), 1e-5)
    with_count = wrapper(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(7))
    assert_close(with_count.loss, torch.stack(losses).sum() / 7, 1e-5)
    nothing = wrapper(ids, labels=torch.full_like(ids, -100)).loss
    assert nothing.item() == 0


def test_gradients_with_and_without_checkpointing() -> None:
    config, _, wrapper = make_pair()
    ids, mask = padded_batch(config)
    wrapper.train()
    gradients = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            wrapper.gradient_checkpointing_enable({"use_reentrant": reentrant})
        wrapper.zero_grad()
        out = wrapper(ids, attention_mask=mask, labels=ids, use_cache=True)
        assert (out.past_key_values is None) == (reentrant is not None)  # what runs twice must not append twice
        out.loss.backward()
        gradients.append({name: p.grad.clone() for name, p in wrapper.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert_close(gradients[1][name], gradient, 1e-5, name)
        assert_close(gradients[2][name], gradient, 1e-5, name)


@pytest.mark.parametrize(("branch", "adds"), [({}, 6), ({"meta_layers": (1,)}, 5)], ids=str)
def test_initial_weights_are_gpt2s(branch: dict, adds: int) -> None:
    from megameta.hf.modeling import MegametaForCausalLM

    torch.manual_seed(0)
    config = small_config(hidden_size=128, intermediate_size=512, tie_embeddings=False, bias=True, **branch)
    state = MegametaForCausalLM(MegametaConfig.from_model_config(config)).state_dict()
    scaled = 0.02 / adds**0.5
    for name, tensor in state.items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif tensor.ndim == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            expected = scaled if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert abs(tensor.std().item() / expected - 1) < 0.05, name


def test_tied_and_resized_embeddings() -> None:
    config, _, wrapper = make_pair()
    assert wrapper.get_output_embeddings().weight is wrapper.get_input_embeddings().weight
    wrapper.resize_token_embeddings(config.vocab_size + 3, mean_resizing=False)
    assert wrapper(make_tokens(config, "ragged")).logits.shape[-1] == config.vocab_size + 3
    assert wrapper.get_output_embeddings().weight is wrapper.get_input_embeddings().weight
