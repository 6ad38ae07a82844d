"""Decoding with a cache equals the full forward pass, in every division into chunks (spec §2 and §3)."""

from typing import Any

import pytest
import torch

from megameta.model import DecodingCache
from megameta.model.cache import NOWHERE
from tests.support.decoding import CHUNKS, decode
from tests.support.models import (
    BATCH,
    LENGTH,
    assert_close,
    case_id,
    covering,
    make_documents,
    make_positions,
    make_tokens,
    small_config,
    small_model,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
OPTIONS: dict[str, list] = {
    "chunks": list(CHUNKS),
    "metas": ["ragged", "none", "one", "all"],
    "documents": ["one", "left_pad", "right_pad", "packed"],
    "positions": ["default", "restart", "scattered"],
    "position": ["rope", "ape", "rnope", "none"],
    "zero_meta_positions": [False, True],
    "dtype": [torch.float64, torch.float32],
    "num_key_value_heads": [4, 2],
    "columns": [None, LENGTH],
    "parallel_residual": [False, True],
    "grad": [False, True],
}
#: Position scaling needs rope, so that it is no option of the covering choice.
SCALED = {
    "position": "rope",
    "position_scaling": "yarn",
    "position_scaling_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CHOSEN = {"meta_layers": (0, 2), "num_layers": 4}
CONFIG_KEYS = (*SCALED, *CHOSEN, "position", "zero_meta_positions", "num_key_value_heads", "parallel_residual")


COVERING = covering(OPTIONS)
CASES = [*COVERING, *({**case, **SCALED} for case in COVERING[:4]), *({**case, **CHOSEN} for case in COVERING[4:12])]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_decoding_equals_the_full_forward(case: dict[str, Any]) -> None:
    config = small_config(bias=True, **{key: case[key] for key in CONFIG_KEYS if key in case})
    model = small_model(config, case["dtype"])
    token, document = make_tokens(config, case["metas"]), make_documents(case["documents"])
    position = make_positions(case["positions"], document)
    cache = DecodingCache()
    with torch.set_grad_enabled(case["grad"]):
        full = model(token, position_BT=position, document_BT=document)
        steps = decode(
            model, token, CHUNKS[case["chunks"]], cache, position=position, document=document, columns=case["columns"]
        )
    assert_close(steps, full, TOLERANCE[case["dtype"]], "logits")
    assert cache.length == LENGTH


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunks", ["ones", "mixed", "whole"])
def test_meta_cache_holds_meta_columns_only(chunks: str, seed: int) -> None:
    """As many columns as the fullest row of each pass has meta-tokens, each at its place, and none for text."""
    config = small_config()
    model = small_model(config)
    token = make_tokens(config, "ragged", seed=seed)
    is_meta = token == config.meta_token_id
    cache = DecodingCache()
    with torch.no_grad():
        decode(model, token, CHUNKS[chunks], cache)
    columns = sum(int(part.sum(dim=1).max()) for part in is_meta.split(CHUNKS[chunks], dim=1))
    assert len(cache.meta) == len(cache.causal) == config.num_layers
    for (key, value), (all_key, all_value) in zip(cache.meta, cache.causal):
        assert key.shape == value.shape == (BATCH, config.num_heads, columns, config.head_size)
        assert all_key.shape == all_value.shape == (BATCH, config.num_heads, LENGTH, config.head_size)
    for row in range(BATCH):
        order = cache.meta_order_BM[row]
        assert order[order != NOWHERE].tolist() == is_meta[row].nonzero().flatten().tolist()


def test_no_meta_tokens_leave_the_meta_cache_empty() -> None:
    config = small_config()
    cache = DecodingCache()
    with torch.no_grad():
        decode(small_model(config), make_tokens(config, "none"), CHUNKS["mixed"], cache)
    assert cache.meta == []
    assert cache.meta_order_BM is None


@pytest.mark.parametrize("documents", ["one", "left_pad"])
@pytest.mark.parametrize("position", ["rope", "ape"])
@pytest.mark.parametrize("index", [[2, 0, 0, 1, 3], [1, 1], [3, 2, 1, 0]], ids=str)
def test_select_reorders_repeats_and_drops(index: list[int], position: str, documents: str) -> None:
    config = small_config(position=position)
    model = small_model(config)
    token, document = make_tokens(config, "ragged"), make_documents(documents)
    places = make_positions("restart", document)
    pick = torch.tensor(index)
    after = make_tokens(config, "ragged", seed=7, batch=len(index), length=5)
    cache = DecodingCache()
    with torch.no_grad():
        decode(model, token, [8, 5], cache, position=places, document=document)
        cache.select(pick)
        new_places = places[pick][:, -1:] + torch.arange(1, 6)
        new_document = None if document is None else document[pick][:, -1:].expand(-1, 5)
        steps = decode(model, after, [1, 1, 3], cache, position=new_places, document=new_document)
        full = model(
            torch.cat((token[pick], after), dim=1),
            position_BT=torch.cat((places[pick], new_places), dim=1),
            document_BT=None if document is None else torch.cat((document[pick], new_document), dim=1),
        )
    assert_close(steps, full[:, LENGTH:], 1e-10, "after select")


@pytest.mark.parametrize("sizes", [[1] * 5, [5], [2, 3]], ids=str)
@pytest.mark.parametrize("documents", ["one", "left_pad", "packed"])
@pytest.mark.parametrize("length", [0, 1, 4, 9, LENGTH, LENGTH + 2])
def test_crop_then_continue_equals_recomputation(length: int, documents: str, sizes: list[int]) -> None:
    config = small_config(zero_meta_positions=True)
    model = small_model(config)
    token = make_tokens(config, "ragged", length=LENGTH)
    after = make_tokens(config, "ragged", seed=9, length=5)
    document = make_documents(documents)
    kept = min(length, LENGTH)
    new_document = None if document is None else document[:, -1:].expand(-1, 5)
    cache = DecodingCache()
    with torch.no_grad():
        decode(model, token, [3, *[1] * 4, 6], cache, document=document)
        cache.crop(length)
        assert cache.length == kept
        steps = decode(model, after, sizes, cache, document=new_document)
        full = model(
            torch.cat((token[:, :kept], after), dim=1),
            document_BT=None if document is None else torch.cat((document[:, :kept], new_document), dim=1),
        )
    assert_close(steps, full[:, kept:], 1e-10, "after crop")


def test_crop_again_and_again() -> None:
    """Speculative decoding crops at every step: rejected meta-tokens must never come back."""
    config = small_config()
    model = small_model(config)
    token = make_tokens(config, "ragged")
    wrong = torch.full((BATCH, 3), config.meta_token_id)
    cache = DecodingCache()
    with torch.no_grad():
        for t in range(LENGTH):
            decode(model, wrong, [2, 1], cache)
            cache.crop(t)
            step = decode(model, token[:, t : t + 1], [1], cache)
            assert_close(step, model(token[:, : t + 1])[:, -1:], 1e-10, f"step {t}")


def test_documents_that_begin_late() -> None:
    """Rows that came without documents are document 0, with and without meta-tokens among them."""
    config = small_config()
    model = small_model(config)
    token = make_tokens(config, "ragged", seed=1)
    document = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    document[:, 9:] = 1
    cache = DecodingCache()
    with torch.no_grad():
        first = decode(model, token[:, :6], [4, 2], cache)
        rest = decode(model, token[:, 6:], [2, 1, 4], cache, document=document[:, 6:])
        full = model(token, document_BT=document)
    assert_close(torch.cat((first, rest), dim=1), full, 1e-10, "late documents")
