"""Policies for meta-tokens: where they stand, and that ``generate`` writes the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megameta.hf.insertion import MetaPolicy, MetaTokenInserter, segment_ends_of
from tests.support.exports import make_pair, padded_batch

META, END = 7, 3
TEXTS = st.lists(st.integers(0, 9), max_size=40)


def policy(name: str, every: int = 4) -> MetaPolicy:
    return MetaPolicy(name, META, every, frozenset({END}))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(ids=TEXTS, every=st.integers(2, 6))
def test_every_nth_slot_is_a_meta_token_and_the_text_stays(ids: list[int], every: int) -> None:
    found = policy("every", every).apply(ids)
    assert [token for token in found if token != META] == [token for token in ids if token != META]
    assert all((token == META) == (slot % every == every - 1) for slot, token in enumerate(found))


@settings(max_examples=60, deadline=None)
@given(ids=TEXTS)
def test_segments_end_with_a_meta_token(ids: list[int]) -> None:
    found = policy("segments").apply(ids)
    text = [token for token in ids if token != META]
    expected: list[int] = []
    for token in text:
        expected += [token, META] if token == END else [token]
    assert found == expected


def test_none_and_given() -> None:
    assert policy("none").apply([1, META, 2]) == [1, 2]
    assert policy("given").apply([1, META, 2]) == [1, META, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sometimes", META), "no policy 'sometimes'"),
        (("every", META, 1), "at least 2"),
        (("segments", META), "needs the ids"),
        (("segments", META, 10, frozenset({META})), "needs the ids"),
    ],
)
def test_bad_policies_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaPolicy(*arguments)


def test_segment_ends_are_told_by_bytes() -> None:
    assert segment_ends_of([b"a", b"\n", b".\n", b"\nb", b""]) == {1, 2}


@pytest.mark.parametrize("name", ["none", "given", "every", "segments"])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 2}])
def test_generate_writes_what_the_policy_says(name: str, sampling: dict) -> None:
    """Rows with different padding: each keeps its own slots. New slots of ``every`` go on with those of the prompt."""
    config, _, wrapper = make_pair()
    ids, mask = padded_batch(config)
    meta, every = config.meta_token_id, 3
    ends = frozenset(range(0, config.vocab_size - 1, 2)) - {meta}
    chosen = MetaPolicy(name, meta, every, ends)  # type: ignore[arg-type]
    torch.manual_seed(0)
    settings = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, "suppress_tokens": [meta], **sampling}
    inserter = MetaTokenInserter(chosen, mask)
    output = wrapper.generate(ids, attention_mask=mask, logits_processor=[inserter], **settings)
    repeats = len(output) // len(ids)
    for row, written in enumerate(output.tolist()):
        padding = int((mask[row // repeats] == 0).sum())
        for place in range(ids.shape[1], len(written)):
            before = written[padding:place]
            if name == "every":
                expected = len(before) % every == every - 1 and before[-1] != meta
            else:
                expected = name == "segments" and before[-1] in ends
            assert (written[place] == meta) == expected, (row, place)
