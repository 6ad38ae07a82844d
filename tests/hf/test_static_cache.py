"""``generate`` over a cache of fixed size, eager and compiled: the tokens of a cache that grows."""

import pytest
import torch

from megameta.hf.cache import MegametaCache
from megameta.hf.insertion import MetaPolicy, MetaTokenInserter
from megameta.model import DecodingCache
from megameta.model.fixed_cache import ROOM, FixedCache
from tests.support.exports import make_pair, padded_batch
from tests.support.generation import compiling, fresh_compiler, generate, writing_metas

CASES = [
    {"position": "rope"},
    {"position": "ape"},
    {"position": "none", "zero_meta_embedding": True},
    {"position": "rnope", "zero_meta_positions": True},
    {"num_layers": 3, "meta_layers": (0, 2)},
    {"meta_attention": False},
    {"num_key_value_heads": 2, "qk_norm": True, "parallel_residual": True, "activation": "swiglu"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_the_cache_that_grows(case: dict) -> None:
    """0, 1, 3 and 5 meta-tokens, left padding; read whole and by chunks; beams."""
    config, wrapper = writing_metas(**case)
    ids, mask = padded_batch(config)
    expected = generate(wrapper, ids, mask)
    written = expected[:, ids.shape[1] :] == config.meta_token_id
    assert written.any() and not written.all()
    static = {"cache_implementation": "static"}
    assert torch.equal(generate(wrapper, ids, mask, **static), expected)
    assert torch.equal(generate(wrapper, ids, mask, prefill_chunk_size=4, **static), expected)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(wrapper, ids, mask, **beams, **static), generate(wrapper, ids, mask, **beams))


def test_policies_and_a_sequence_that_ends() -> None:
    """Meta-tokens in every third slot; rows that have ended go on with padding."""
    config, _, wrapper = make_pair()
    ids, mask = padded_batch(config)

    def run(**arguments):
        inserter = MetaTokenInserter(MetaPolicy("every", config.meta_token_id, every=3), mask)
        return generate(wrapper, ids, mask, logits_processor=[inserter], eos_token_id=[5, 6, 7, 8], **arguments)

    expected = run()
    assert (expected[:, -1] == 0).any(), "a sequence has ended before another"
    assert torch.equal(run(cache_implementation="static"), expected)


def test_sizes_and_going_on() -> None:
    config, wrapper = writing_metas()
    ids, mask = padded_batch(config)
    expected = generate(wrapper, ids, mask)
    first = generate(
        wrapper, ids, mask, max_new_tokens=5, cache_implementation="static", max_cache_len=33,
        return_dict_in_generate=True,
    )  # fmt: skip
    cache = first.past_key_values
    assert isinstance(cache, MegametaCache) and isinstance(cache.decoding, FixedCache)
    assert cache.get_max_length() == ROOM and int(cache.get_seq_length()) == 18
    storages = [x.data_ptr() for layer in (*cache.decoding.causal, *cache.decoding.meta) for x in layer]
    assert {x.shape[2] for layer in cache.decoding.causal for x in layer} == {ROOM}
    assert {x.shape[2] for layer in cache.decoding.meta for x in layer} == {ROOM + 1}  # 5 + 64 − 14 rows, and one
    longer = torch.nn.functional.pad(mask, (0, 5), value=1)
    rest = generate(wrapper, first.sequences, longer, max_new_tokens=15, past_key_values=cache)
    assert torch.equal(rest, expected)
    assert storages == [x.data_ptr() for layer in (*cache.decoding.causal, *cache.decoding.meta) for x in layer]
    with pytest.raises(ValueError, match="room for 64 rows, but up to 113 are to be written"):
        generate(wrapper, rest, None, max_new_tokens=80, past_key_values=cache)
    cache.reset()
    assert torch.equal(generate(wrapper, ids, mask, past_key_values=cache), expected)


def test_sequences_are_reordered_with_their_numbers_of_meta_tokens() -> None:
    config, model, _ = make_pair()
    ids, _ = padded_batch(config)
    meta = torch.full((4, 1), config.meta_token_id)
    found = []
    for cache in (DecodingCache(), FixedCache(40, config.count_meta_layers())):
        with torch.no_grad():
            model(ids, cache=cache)
            cache.select(torch.tensor([3, 0, 0, 2]))
            found.append(torch.cat([model(meta, cache=cache) for _ in range(3)], dim=1))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    config, _, wrapper = make_pair(position="ape")
    ids, mask = padded_batch(config)
    assert generate(wrapper, ids, mask, max_new_tokens=51, cache_implementation="static").shape[1] == 65
    with pytest.raises(ValueError, match="up to 65 rows exceeds this model's 64 learned positions"):
        generate(wrapper, ids, mask, max_new_tokens=52, cache_implementation="static")
    with pytest.raises(ValueError, match="not both"):
        generate(wrapper, ids, mask, cache_implementation="static", past_key_values=MegametaCache())
    with pytest.raises(ValueError, match="not supported with Static"):
        generate(wrapper, ids[1:2], mask[1:2], cache_implementation="static", prompt_lookup_num_tokens=3)
    cache = generate(
        wrapper, ids, mask, cache_implementation="static", return_dict_in_generate=True, max_new_tokens=4
    ).past_key_values
    cache.crop(0)
    with pytest.raises(ValueError, match="a cache of fixed size cannot go back"):
        cache.crop(-1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:4], ids=str)
@fresh_compiler()
def test_a_step_is_compiled_whole_and_once(case: dict) -> None:
    """Two graphs, of steps with and without meta-tokens, whatever the lengths; no break in them."""
    config, wrapper = writing_metas(**case)
    ids, mask = padded_batch(config)
    compiled = {"cache_implementation": "static", "compile_config": compiling(backend="aot_eager")}
    assert torch.equal(generate(wrapper, ids, mask, **compiled), generate(wrapper, ids, mask))
    shorter = ids[:, 2:], mask[:, 2:]
    assert torch.equal(generate(wrapper, *shorter, **compiled), generate(wrapper, *shorter))
    stats = torch._dynamo.utils.counters
    assert stats["stats"]["unique_graphs"] == 2 and not stats["graph_break"]


@fresh_compiler()
def test_chunks_of_a_prompt_are_compiled() -> None:
    """With breaks where padding is looked for."""
    config, wrapper = writing_metas(**CASES[3])
    ids, mask = padded_batch(config)
    chunks = {"prefill_chunk_size": 4, "compile_config": compiling(backend="eager")}
    chunks["compile_config"].fullgraph = False
    assert torch.equal(
        generate(wrapper, ids, mask, cache_implementation="static", **chunks), generate(wrapper, ids, mask)
    )


@fresh_compiler()
def test_compiled_by_hand_over_a_cache_that_grows() -> None:
    config, wrapper = writing_metas()
    ids, mask = padded_batch(config)
    expected = generate(wrapper, ids, mask, max_new_tokens=6)
    wrapper.forward = torch.compile(wrapper.forward, dynamic=True, backend="eager")
    assert torch.equal(generate(wrapper, ids, mask, max_new_tokens=6), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
