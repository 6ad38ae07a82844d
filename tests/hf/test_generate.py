"""``generate`` with the meta branch's own cache."""

import pytest
import torch
from transformers import DynamicCache

from megameta.hf.cache import MegametaCache
from megameta.model import KeepRule
from tests.support import oracle
from tests.support.decoding import forbidden
from tests.support.exports import make_pair, padded_batch
from tests.support.models import reference_state


def generate(wrapper, ids, mask=None, **arguments):
    return wrapper.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0, **arguments)


CASES = [
    {"position": position, "zero_meta_positions": zeroed}
    for position in ("rope", "ape", "none", "rnope")
    for zeroed in (False, True)
]


@pytest.mark.parametrize("case", [*CASES, {"num_layers": 3, "meta_layers": (0, 2)}], ids=str)
def test_greedy_with_and_without_cache(case: dict) -> None:
    config, model, wrapper = make_pair(**case)
    ids, mask = padded_batch(config)
    cached = generate(wrapper, ids, mask)
    assert torch.equal(cached, generate(wrapper, ids, mask, use_cache=False))
    for row, keep, output in zip(ids, mask, cached):  # and each as if it were alone, by the training model
        sequence = row[keep.bool()]
        for _ in range(10):
            with torch.inference_mode():
                sequence = torch.cat((sequence, model(sequence[None])[0, -1].argmax()[None]))
        assert torch.equal(output[-len(sequence) :], sequence)


def test_meta_tokens_that_are_generated_count() -> None:
    config, _, wrapper = make_pair(tie_embeddings=False)
    with torch.no_grad():  # now and then the meta-token is the likeliest
        wrapper.lm_head.weight[config.meta_token_id] *= 2
    ids, mask = padded_batch(config)
    cached = generate(wrapper, ids, mask)
    new = cached[:, ids.shape[1] :]
    count = (new == config.meta_token_id).sum()
    assert 0 < count < new.numel()
    assert torch.equal(cached, generate(wrapper, ids, mask, use_cache=False))
    assert not (
        generate(wrapper, ids, mask, suppress_tokens=[config.meta_token_id])[:, 14:] == config.meta_token_id
    ).any()


@pytest.mark.parametrize("position", ["rope", "ape"])
def test_beam_search(position: str) -> None:
    config, _, wrapper = make_pair(position=position)
    ids, mask = padded_batch(config)
    beams = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}
    cached = generate(wrapper, ids, mask, **beams)
    assert cached.shape[0] == 8
    assert torch.equal(cached, generate(wrapper, ids, mask, use_cache=False, **beams))
    assert not torch.equal(cached[::2], generate(wrapper, ids, mask))  # beams were really reordered


def test_sampling_with_several_sequences() -> None:
    config, _, wrapper = make_pair()
    ids, mask = padded_batch(config)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(
            wrapper.generate(
                ids, attention_mask=mask, max_new_tokens=8, do_sample=True, num_return_sequences=3, pad_token_id=0,
                use_cache=use_cache,
            )
        )  # fmt: skip
    assert torch.equal(*outputs)


def test_cache_is_returned_and_carried_on() -> None:
    config, _, wrapper = make_pair()
    ids, mask = padded_batch(config)
    whole = generate(wrapper, ids, mask)
    for given in (None, DynamicCache(), MegametaCache()):
        first = wrapper.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, past_key_values=given,
            return_dict_in_generate=True,
        )  # fmt: skip
        cache = first.past_key_values
        assert isinstance(cache, MegametaCache) and cache.get_seq_length() == 17
        longer = torch.nn.functional.pad(mask, (0, 4), value=1)
        rest = wrapper.generate(
            first.sequences, attention_mask=longer, max_new_tokens=6, do_sample=False, pad_token_id=0,
            past_key_values=cache,
        )  # fmt: skip
        assert torch.equal(rest, whole)


def test_assisted_and_chunked_generation() -> None:
    config, _, wrapper = make_pair()
    ids, mask = padded_batch(config)
    row = ids[1:2]
    plain = generate(wrapper, row)
    assert torch.equal(plain, generate(wrapper, row, prompt_lookup_num_tokens=3))  # rolls the cache back
    _, _, assistant = make_pair(seed=0, position="rope")
    assert torch.equal(plain, generate(wrapper, row, assistant_model=assistant))
    assert torch.equal(generate(wrapper, ids, mask), generate(wrapper, ids, mask, prefill_chunk_size=4))


@pytest.mark.parametrize("kind", ["offloaded_static", "offloaded", "quantized"])
def test_caches_that_are_not_supported(kind: str) -> None:
    config, _, wrapper = make_pair()
    with pytest.raises(ValueError, match=f"cache_implementation='{kind}' is not supported"):
        generate(wrapper, padded_batch(config)[0], cache_implementation=kind)


def greedy_by_the_oracle(config, model, row: torch.Tensor, rule: KeepRule, steps: int) -> torch.Tensor:
    """A sequence without padding, a full pass of float64 a token, with a mask that forbids what the rule drops."""
    for _ in range(steps):
        mask = forbidden(rule, row[None] == config.meta_token_id, None)
        logits = oracle.forward(config, reference_state(model), row[None], forbidden_BTT=mask)
        row = torch.cat((row, logits[0, -1].argmax()[None]))
    return row


@pytest.mark.parametrize("position", ["rope", "ape"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_cache_that_drops_rows(position: str, chunk: int | None) -> None:
    """Left-padded and ragged, read whole and by chunks: each sequence as the definition has it, alone."""
    config, model, wrapper = make_pair(position=position)
    ids, mask = padded_batch(config)
    cache = wrapper.make_cache(3, sinks=1)
    chunks = {} if chunk is None else {"prefill_chunk_size": chunk}
    output = generate(wrapper, ids, mask, past_key_values=cache, **chunks)
    assert not torch.equal(output, generate(wrapper, ids, mask))
    for row, keep, found in zip(ids, mask, output):
        expected = greedy_by_the_oracle(config, model, row[keep.bool()], KeepRule(3, 1), 10)
        assert torch.equal(found[-len(expected) :], expected)
    assert isinstance(cache, MegametaCache) and cache.get_seq_length() == 23
    assert cache.decoding.causal[0][0].shape[2] < 12
    cache.reset()
    assert torch.equal(output, generate(wrapper, ids, mask, past_key_values=cache))


def test_beams_over_a_cache_that_drops_rows() -> None:
    config, _, wrapper = make_pair()
    ids, mask = padded_batch(config)
    beams = {"num_beams": 4, "num_return_sequences": 2}
    full = generate(wrapper, ids, mask, **beams)
    assert torch.equal(full, generate(wrapper, ids, mask, past_key_values=wrapper.make_cache(30, sinks=0), **beams))
    dropped = generate(wrapper, ids, mask, past_key_values=wrapper.make_cache(3), **beams)
    assert not torch.equal(full, dropped)
    alone = generate(wrapper, ids[1:2], mask[1:2], past_key_values=wrapper.make_cache(3), **beams)
    assert torch.equal(dropped[2:4], alone)
    with pytest.raises(ValueError, match="has dropped rows, so it cannot go back"):
        generate(wrapper, ids[1:2], mask[1:2], past_key_values=wrapper.make_cache(3), prompt_lookup_num_tokens=3)
