"""The layers that have the branch: what may be asked for, and what the cache holds."""

import dataclasses

import pytest
import torch

from megameta.model import GPT, DecodingCache
from tests.support.models import LENGTH, assert_close, make_tokens, small_config, small_model


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 2)])
def test_branch_and_cache_of_the_chosen_layers_alone(layers: tuple[int, ...]) -> None:
    config = small_config(num_layers=3, meta_layers=layers)
    model = small_model(config)
    assert {int(name.split(".")[1]) for name, _ in model.named_parameters() if "meta" in name} == set(layers)
    token, cache = make_tokens(config, "ragged"), DecodingCache()
    with torch.no_grad():
        full = model(token)
        steps = [model(token[:, part], cache=cache) for part in (slice(0, 6), slice(6, LENGTH))]
    assert_close(torch.cat(steps, dim=1), full, 1e-10, "cached")
    assert (len(cache.causal), len(cache.meta)) == (3, len(layers))


def test_a_layer_without_the_branch_is_one_whose_branch_adds_nothing() -> None:
    config = small_config(num_layers=3, meta_layers=(0, 2))
    model = small_model(config)
    whole = GPT(dataclasses.replace(config, meta_layers=None), 8).double()
    with torch.no_grad():
        whole.blocks[1].meta_attention.o_proj.weight.zero_()
    missing = whole.load_state_dict(model.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(name.startswith("blocks.1.") for name in missing.missing_keys)
    token = make_tokens(config, "ragged")
    assert_close(whole(token), model(token), 1e-12)


def test_one_value_for_one_model() -> None:
    assert small_config(num_layers=3, meta_layers=[2, 0]) == small_config(num_layers=3, meta_layers=(0, 2))
    assert small_config(meta_layers=[1, 0]) == small_config() and small_config(meta_layers=[0, 1]).meta_layers is None
    chosen = small_config(num_layers=5, meta_layers=(1, 4))
    assert [chosen.layer_has_meta(layer) for layer in range(5)] == [False, True, False, False, True]
    assert (chosen.count_meta_layers(), chosen.count_meta_layers(1, 4)) == (2, 1)
    assert small_config(meta_attention=False).count_meta_layers() == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"meta_layers": (0, 2)}, r"meta_layers \[0, 2\]: there is no layer 2; num_layers 2 makes them 0 to 1"),
        ({"meta_layers": (-1,)}, "there is no layer -1"),
        ({"meta_layers": (1, 1)}, "names layer 1 more than once: name each layer once"),
        ({"meta_layers": ()}, r"meta_layers is empty: leave it out \(null\).*set meta_attention to false"),
        ({"meta_layers": (0,), "meta_attention": False}, r"meta_attention is false: leave meta_layers out \(null\)"),
    ],
)
def test_contradictions_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_config(**changes)
