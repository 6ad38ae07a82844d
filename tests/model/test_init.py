"""Parameter counts, initial weights that depend on name and seed alone, and the padding of the vocabulary."""

import math
import random

import pytest
import torch
from torch import Tensor, nn

from megameta.model import GPT, ModelConfig, cross_entropy_sum, initialize_weights
from megameta.model.init import RESIDUAL_PROJECTIONS, draw_parameter, is_vocabulary_table
from tests.support.models import make_tokens, small_config


def count(**changes: object) -> int:
    with torch.device("meta"):
        model = GPT(ModelConfig(vocab_size=50304, **changes))
    assert model.embedding.tokens.weight.device.type == "meta"
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_of_the_paper() -> None:
    """spec §2: 123.6 M without and 151.9 M with the branch, 12 layers, D 768, V 50304, RoPE."""
    embedding, projections, mlp, norm = 50304 * 768, 4 * 768**2, 8 * 768**2, 768
    twin = embedding + 12 * (projections + mlp + 2 * norm) + norm
    assert count(meta_attention=False) == twin == 123_587_328
    assert count() == twin + 12 * (projections + norm) == 151_908_096
    assert count(position="ape") == 151_908_096 + 1024 * 768
    assert count(tie_embeddings=False) == 151_908_096 + embedding


def test_parameters_of_chosen_layers() -> None:
    twin, branch = count(meta_attention=False), 4 * 768**2 + 768
    assert count(meta_layers=(3,)) == twin + branch
    assert count(meta_layers=(0, 2, 11)) == twin + 3 * branch
    model = build(num_layers=3, meta_layers=(0, 2))
    whole = set(parameters(build(num_layers=3)))
    assert set(parameters(model)) == {name for name in whole if not ("meta" in name and name.startswith("blocks.1."))}


def test_defaults_are_the_paper_with_one_meta_token() -> None:
    config = ModelConfig()
    assert (config.vocab_size, config.padded_vocab_size(), config.meta_token_id) == (50258, 50304, 50257)
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(config).parameters()) == 151_908_096


def build(seed: int = 0, vocab_multiple: int = 128, **changes: object) -> GPT:
    config = small_config(**changes)
    model = GPT(config, vocab_multiple)
    initialize_weights(model, config, seed)
    return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("branch", "adds"), [({}, 9), ({"meta_attention": False}, 6), ({"meta_layers": (1,)}, 7)], ids=str
)
def test_standard_deviation_by_kind(branch: dict, adds: int) -> None:
    """Normal 0.02; projections into the residual stream over √(adds): three a layer with the branch, two without."""
    model = build(
        hidden_size=256,
        intermediate_size=512,
        num_layers=3,
        vocab_size=500,
        **branch,
        position="ape",
        max_position_embeddings=256,
        tie_embeddings=False,
        activation="swiglu",
        bias=True,
        qk_norm=True,
    )
    scaled = []
    for name, value in parameters(model).items():
        if name.endswith("bias"):
            assert not value.any(), name
            continue
        if value.ndim == 1:
            assert (value == 1).all(), name
            continue
        if is_vocabulary_table(name):
            value = value[:500]
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        scaled += [name] * residual
        std = 0.02 / math.sqrt(adds) if residual else 0.02
        assert abs(value.std().item() / std - 1) < 0.02, name  # at least 2**16 values: 0.3 % is one sigma
        assert abs(value.mean().item()) < 5 * std / math.sqrt(value.numel()), name
        assert 3.5 < value.abs().max().item() / std < 6.5, name  # normal, not truncated
    assert len(scaled) == adds
    assert all(name.endswith(RESIDUAL_PROJECTIONS) for name in scaled)


@pytest.mark.parametrize("multiple", [1, 8, 256])
def test_independent_of_vocabulary_padding(multiple: int) -> None:
    a, b = parameters(build(tie_embeddings=False)), parameters(build(vocab_multiple=multiple, tie_embeddings=False))
    assert a.keys() == b.keys()
    for name in a:
        rows = 37 if is_vocabulary_table(name) else None
        assert torch.equal(a[name][:rows], b[name][:rows]), name
        if rows:
            assert len(b[name]) == -(-37 // multiple) * multiple
            assert not b[name][rows:].any()


def test_independent_of_construction_order_and_of_global_random_state() -> None:
    """Same name, shape and seed: bitwise the same values, in whatever order and module they are drawn."""
    model = build(seed=3, bias=True)
    named = list(parameters(model).items())
    random.Random(0).shuffle(named)
    torch.manual_seed(12345)
    for name, value in named:
        shape = (37, *value.shape[1:]) if is_vocabulary_table(name) else tuple(value.shape)
        assert torch.equal(draw_parameter(name, shape, model.config, 3), value[: shape[0]]), name
    holder = nn.Module()
    holder.blocks = nn.ModuleDict({"1": model.blocks[1], "0": model.blocks[0]})
    before = {name: value.clone() for name, value in parameters(model).items()}
    with torch.no_grad():
        for parameter in holder.parameters():
            parameter.fill_(9)
    state = torch.get_rng_state()
    initialize_weights(holder, model.config, 3)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in parameters(model).items():
        assert torch.equal(value, before[name]), name


def test_golden_values() -> None:
    """Initial weights are part of every recorded loss: they may not move between releases (of torch either)."""
    config = small_config()
    first = draw_parameter("blocks.0.attention.q_proj.weight", (32, 32), config, 0)[0, :4]
    expected = torch.tensor([-0.00755372318, 0.0208611339, -0.01783753, -0.018803047])
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=0)
    last = draw_parameter("embedding.tokens.weight", (37, 32), config, 7)[-1, -4:]
    expected = torch.tensor([0.00861115102, 0.0158202611, -0.0123030627, 0.00860477984])
    torch.testing.assert_close(last, expected, rtol=1e-5, atol=0)


def test_seeds_and_names_differ() -> None:
    a, b = parameters(build(seed=0)), parameters(build(seed=1))
    matrices = [name for name, value in a.items() if value.ndim == 2]
    for name in matrices:
        same = (a[name][:37] == b[name][:37]).float().mean()
        assert same < 0.01, name
    shapes = {name: a[name].shape for name in matrices}
    for i, name in enumerate(matrices):
        for other in matrices[i + 1 :]:
            if shapes[name] == shapes[other]:
                assert (a[name] == a[other]).float().mean() < 0.01, (name, other)


def test_twin_draws_the_same_values() -> None:
    """Without the branch every parameter starts from the same values, but for the projections into the residual stream,
    whose draws are the same and whose scale is 1/√2L instead of 1/√3L (the spec counts the branch's adds)."""
    model, twin = parameters(build()), parameters(build(meta_attention=False))
    assert {name for name in model if "meta" not in name} == set(twin)
    for name, value in twin.items():
        if name.endswith(RESIDUAL_PROJECTIONS):
            torch.testing.assert_close(value, model[name] * math.sqrt(3 / 2), rtol=1e-6, atol=0)
        else:
            assert torch.equal(value, model[name]), name


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_padding_rows_stay_zero(tie_embeddings: bool) -> None:
    """No gradient reaches them, and weight decay of zero is zero; the logits have no padding."""
    model = build(vocab_multiple=64, tie_embeddings=tie_embeddings)
    tables = [p for n, p in model.named_parameters() if is_vocabulary_table(n)]
    assert len(tables) == (1 if tie_embeddings else 2)
    start = [table.detach().clone() for table in tables]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        token = make_tokens(model.config, "ragged", seed=step)
        logits = model(token)
        assert logits.shape[-1] == 37
        cross_entropy_sum(logits[:, :-1], token[:, 1:]).backward()
        for table in tables:
            assert table.shape == (64, 32)
            assert table.grad[:37].any()
            assert not table.grad[37:].any()
        optimizer.step()
        optimizer.zero_grad()
    for table, before in zip(tables, start):
        assert not table[37:].any()
        assert (table[:37] != before[:37]).all()


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    model = build(vocab_size=500, meta_token_id=499, vocab_multiple=512)
    token = make_tokens(model.config, "ragged")
    loss = cross_entropy_sum(model(token)[:, :-1], token[:, 1:]) / token[:, 1:].numel()
    assert abs(loss.item() - math.log(500)) < 0.1
