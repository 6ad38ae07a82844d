"""A cache that drops rows gives what a full one does under a mask that forbids them, and holds no more."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megameta.model import DecodingCache, KeepRule, PruningCache
from megameta.model.cache import NOWHERE
from tests.support import oracle
from tests.support.decoding import CHUNKS, decode, forbidden, kept_rows
from tests.support.models import (
    BATCH,
    LENGTH,
    assert_close,
    case_id,
    covering,
    make_documents,
    make_positions,
    make_tokens,
    reference_state,
    small_config,
    small_model,
)

OPTIONS: dict[str, list] = {
    "chunks": list(CHUNKS),
    "metas": ["ragged", "none", "one", "all"],
    "documents": ["one", "left_pad", "right_pad", "packed"],
    "positions": ["default", "restart", "scattered"],
    "position": ["rope", "ape", "rnope"],
    "zero_meta_positions": [False, True],
    "num_key_value_heads": [4, 2],
    "columns": [None, LENGTH],
    "parallel_residual": [False, True],
    "window": [1, 2, 4, 7],
    "sinks": [0, 1, 3],
    "pinned": ["meta", "none", "random"],
    "dtype": [torch.float64, torch.float32],
}
CONFIG_KEYS = ("position", "zero_meta_positions", "num_key_value_heads", "parallel_residual")
CONFIG_KEYS += ("num_layers", "meta_layers")
COVERING = covering(OPTIONS)
CASES = [*COVERING, *({**case, "num_layers": 3, "meta_layers": (0, 2)} for case in COVERING[:6])]


def random_pins(rule: KeepRule, document: Tensor | None) -> Tensor:
    """Which rows the rule draws, by the rank that the test counts itself."""
    rank = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for row in range(BATCH):
        seen: dict[int, int] = {}
        for t in range(LENGTH):
            name = 0 if document is None else int(document[row, t])
            rank[row, t] = seen.get(name, 0)
            seen[name] = seen.get(name, 0) + 1
    return rule.pins(torch.zeros(BATCH, LENGTH, dtype=torch.bool), rank)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_dropping_equals_forbidding(case: dict[str, Any]) -> None:
    config = small_config(bias=True, **{key: case[key] for key in CONFIG_KEYS if key in case})
    model = small_model(config, case["dtype"])
    token, document = make_tokens(config, case["metas"]), make_documents(case["documents"])
    position = make_positions(case["positions"], document)
    rule = KeepRule(case["window"], case["sinks"], case["pinned"], share=0.4, seed=3)
    is_meta = token == config.meta_token_id
    pinned = None
    if rule.pinned != "meta":
        pinned = torch.zeros_like(is_meta) if rule.pinned == "none" else random_pins(rule, document)
    mask = forbidden(rule, is_meta, document, pinned)
    expected = oracle.forward(config, reference_state(model), token, position, document, mask)
    cache = PruningCache(rule)
    with torch.no_grad():
        logits = decode(
            model, token, CHUNKS[case["chunks"]], cache, position=position, document=document, columns=case["columns"]
        )
    real = torch.ones_like(is_meta) if document is None else document >= 0
    assert torch.isfinite(logits).all()
    assert_close(logits[real], expected[real], {torch.float64: 1e-6, torch.float32: 1e-5}[case["dtype"]], "logits")
    assert cache.length == LENGTH


@pytest.mark.parametrize("documents", ["one", "left_pad", "packed"])
@pytest.mark.parametrize("chunks", list(CHUNKS))
def test_a_window_that_holds_all_is_a_full_cache(chunks: str, documents: str) -> None:
    config = small_config()
    model = small_model(config)
    token, document = make_tokens(config, "ragged"), make_documents(documents)
    with torch.no_grad():
        pruned = decode(model, token, CHUNKS[chunks], PruningCache(KeepRule(LENGTH, 0)), document=document)
        full = decode(model, token, CHUNKS[chunks], DecodingCache(), document=document)
    real = torch.ones_like(token, dtype=torch.bool) if document is None else document >= 0
    assert_close(pruned[real], full[real], 1e-12, "logits")


@pytest.mark.parametrize("pinned", ["meta", "none", "random"])
@pytest.mark.parametrize("documents", ["one", "left_pad", "packed"])
@pytest.mark.parametrize("chunks", ["ones", "mixed", "whole"])
def test_each_sequence_holds_its_own_rows_and_no_more(chunks: str, documents: str, pinned: Any) -> None:
    """Rows that are held after the last pass, by their places; tensors are as wide as the fullest sequence's."""
    config = small_config()
    model = small_model(config)
    token, document = make_tokens(config, "ragged"), make_documents(documents)
    rule = KeepRule(3, 2, pinned, share=0.3)
    is_meta = token == config.meta_token_id
    pins = {"meta": is_meta, "none": torch.zeros_like(is_meta), "random": random_pins(rule, document)}[pinned]
    cache = PruningCache(rule)
    with torch.no_grad():
        decode(model, token, CHUNKS[chunks], cache, document=document)
    longer = KeepRule(rule.window - 1, rule.sinks) if rule.window > 1 else rule  # the next row is the window's last
    causal, meta = [], []
    for row in range(BATCH):
        held = kept_rows(longer, is_meta[row], None if document is None else document[row], pins[row])[-1]
        order = cache.rows.order_BN[row]
        assert set(order[order != NOWHERE].tolist()) == held
        causal.append(len(held))
        in_branch = {t for t in held if is_meta[row, t]}
        order = cache.meta_rows.order_BN[row]
        assert set(order[order != NOWHERE].tolist()) == in_branch
        meta.append(len(in_branch))
    size = 2 * BATCH * config.num_heads * config.head_size * 8 * config.num_layers
    assert cache.allocated_bytes() == size * (max(causal) + max(meta))


@contextlib.contextmanager
def nothing_from_before() -> Iterator[None]:
    """The collector looks at none of the millions of objects that this process has so far."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def bytes_alive() -> int:
    """Of the storages of all tensors with four dimensions, which only keys and values have here."""
    gc.collect()
    found = (x.untyped_storage() for x in gc.get_objects() if type(x) is Tensor and x.ndim == 4)
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def test_memory_is_bounded_while_rows_go_by() -> None:
    """Every tensor that is alive, found by the garbage collector: nothing but the kept rows and one layer's pass."""
    config = small_config(num_layers=4)
    model = small_model(config, torch.float32)
    generator = torch.Generator().manual_seed(1)
    token = torch.randint(12, config.vocab_size, (1, 600), generator=generator)
    cache = PruningCache(KeepRule(8, 2))
    alive = []
    with torch.no_grad(), nothing_from_before():
        for part in token.split(50, dim=1):
            model(part, cache=cache, position_BT=torch.arange(50)[None])
            alive.append(bytes_alive())
    kept = 9  # two sinks and seven of the window, the next row being its eighth
    assert alive == [2 * kept * config.hidden_size * 4 * config.num_layers] * 12
    assert cache.allocated_bytes() == alive[0]


def test_pass_without_meta_tokens_drops_old_meta_rows() -> None:
    config = small_config()
    token = make_tokens(config, "all", length=2)
    cache = PruningCache(KeepRule(2, 0, "none"))
    model = small_model(config)
    with torch.no_grad():
        model(token, cache=cache)
        assert cache.meta[0][0].shape[2] == 1
        model(make_tokens(config, "none", length=1), cache=cache)
    assert cache.meta[0][0].shape[2] == 0
    assert cache.meta_rows.order_BN.shape[1] == 0


@pytest.mark.parametrize("documents", ["one", "left_pad"])
@pytest.mark.parametrize("index", [[2, 0, 0, 1, 3], [1, 1]], ids=str)
def test_select_reorders_repeats_and_drops(index: list[int], documents: str) -> None:
    config = small_config()
    model = small_model(config)
    token, document = make_tokens(config, "ragged"), make_documents(documents)
    pick = torch.tensor(index)
    after = make_tokens(config, "ragged", seed=7, batch=len(index), length=5)
    new_document = None if document is None else document[pick][:, -1:].expand(-1, 5)
    rule = KeepRule(3, 1)
    cache = PruningCache(rule)
    with torch.no_grad():
        decode(model, token, [8, 5], cache, document=document)
        cache.select(pick)
        steps = decode(model, after, [1, 1, 3], cache, document=new_document)
    whole = torch.cat((token[pick], after), dim=1)
    documents_of_all = None if document is None else torch.cat((document[pick], new_document), dim=1)
    mask = forbidden(rule, whole == config.meta_token_id, documents_of_all)
    expected = oracle.forward(config, reference_state(model), whole, None, documents_of_all, mask)
    assert_close(steps, expected[:, LENGTH:], 1e-6, "after select")


@pytest.mark.parametrize("length", [0, 1, 6])
@pytest.mark.parametrize("documents", ["one", "left_pad"])
def test_crop_while_nothing_is_lost(length: int, documents: str) -> None:
    config = small_config()
    model = small_model(config)
    token, document = make_tokens(config, "ragged"), make_documents(documents)
    after = make_tokens(config, "ragged", seed=9, length=6)
    new_document = None if document is None else torch.zeros(BATCH, 6, dtype=torch.long)
    rule = KeepRule(LENGTH + 1, 0)
    cache = PruningCache(rule)
    with torch.no_grad():
        decode(model, token, [3, *[1] * 4, 6], cache, document=document)
        cache.crop(length)
        assert cache.length == length
        steps = decode(model, after, [2, 1, 3], cache, document=new_document)
    whole = torch.cat((token[:, :length], after), dim=1)
    documents_of_all = None if document is None else torch.cat((document[:, :length], new_document), dim=1)
    mask = forbidden(rule, whole == config.meta_token_id, documents_of_all)
    expected = oracle.forward(config, reference_state(model), whole, None, documents_of_all, mask)
    assert_close(steps, expected[:, length:], 1e-6, "after crop")


def test_crop_after_a_loss_is_refused() -> None:
    config = small_config()
    cache = PruningCache(KeepRule(2, 1))
    with torch.no_grad():
        decode(small_model(config), make_tokens(config, "ragged"), [LENGTH], cache)
    cache.crop(LENGTH)  # nothing to forget
    with pytest.raises(ValueError, match="has dropped rows, so it cannot go back"):
        cache.crop(LENGTH - 1)
    cache.crop(0)
    assert cache.length == 0 and cache.allocated_bytes() == 0


def test_random_pins_have_their_share_and_differ_by_sequence_and_seed() -> None:
    no_meta, rank = torch.zeros(64, 4000, dtype=torch.bool), torch.arange(4000).expand(64, -1)
    pins = KeepRule(1, 0, "random", share=0.1, seed=1).pins(no_meta, rank)
    assert abs(float(pins.float().mean()) - 0.1) < 0.002  # standard deviation 0.0006
    other = KeepRule(1, 0, "random", share=0.1, seed=2).pins(no_meta, rank)
    for a, b in ((pins, other), (pins[1:], pins[:-1]), (pins[:, 1:], pins[:, :-1])):
        assert abs(float((a & b).float().mean()) - 0.01) < 0.002
    assert KeepRule(1, 0, "random", share=1.0).pins(no_meta, rank).all()


@pytest.mark.parametrize("wrong", [{"window": 0}, {"window": 1, "sinks": -1}, {"window": 1, "share": 1.5}])
def test_rules_that_make_no_sense(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        KeepRule(**wrong)
    with pytest.raises(ValueError, match="is not one of"):
        KeepRule(1, pinned="all")
