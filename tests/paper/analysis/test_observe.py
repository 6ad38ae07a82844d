"""Looking into a model shows what it computes, and leaves it as it was."""

import math

import pytest
import torch

from megameta.paper.analysis.observe import (
    observed_attention,
    observed_parts,
    observed_residuals,
    switched_off,
    zeroed_meta_embedding,
)
from tests.support.analyses import HEADS, LAYERS, SAMPLES, dense


def fingerprint(model) -> tuple:
    """All that a context could leave behind: attributes and hooks of every module, and bits of every parameter."""
    modules = [
        (
            name,
            {
                key: dict(value) if isinstance(value, dict) else value  # hooks are kept in dictionaries
                for key, value in vars(module).items()
                if key not in ("_parameters", "_buffers", "_modules")
            },
            list(module._modules.items()),
        )
        for name, module in model.named_modules()
    ]
    return modules, {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}


def same(before: tuple, after: tuple) -> bool:
    weights = all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(before[1].values(), after[1].values()))
    return before[0] == after[0] and weights


def contexts(model):
    def ignore(*_):
        return None

    return {
        "attention": observed_attention(model, ignore, ("causal", "meta")),
        "residuals": observed_residuals(model, ignore),
        "parts": observed_parts(model, ignore, ignore),
        "off": switched_off(model, range(LAYERS)),
        "zeroed": zeroed_meta_embedding(model),
    }


@pytest.mark.parametrize("name", ["attention", "residuals", "parts", "off", "zeroed"])
def test_the_model_is_what_it_was(subject, name):
    batch = next(subject.held_out(2))
    before = fingerprint(subject.model)
    plain = subject.hidden_states(batch)
    with contexts(subject.model)[name]:
        assert not same(before, fingerprint(subject.model))  # the fingerprint would see it
        inside = subject.hidden_states(batch)
    assert same(before, fingerprint(subject.model))
    assert torch.equal(plain, subject.hidden_states(batch))
    assert torch.equal(plain, inside) == (name not in ("off", "zeroed"))


@pytest.mark.parametrize("name", ["attention", "residuals", "parts", "off", "zeroed"])
def test_after_an_error_too(subject, name):
    before = fingerprint(subject.model)
    with pytest.raises(KeyError), contexts(subject.model)[name]:
        raise KeyError
    assert same(before, fingerprint(subject.model))


@torch.no_grad()
def test_probabilities_are_those_of_the_outputs(subject):
    """Rows add up to 1 and give the kernel's own output; unseen keys get exactly 0."""
    from megameta.paper.analysis.observe import blocks_of

    seen, outputs = [], []
    kept = [(block.attention, block.attention.attend) for block in blocks_of(subject.model)]
    values = []
    try:
        for attention, attend in kept:

            def record(q, k, v, mask, attend=attend):
                values.append(v.repeat_interleave(HEADS // v.shape[1], dim=1))
                outputs.append(attend(q, k, v, mask))
                return outputs[-1]

            attention.attend = record
        batch = next(subject.held_out(SAMPLES))
        with observed_attention(subject.model, seen.append):
            subject.hidden_states(batch)
    finally:
        for attention, attend in kept:
            attention.attend = attend
    assert [(s.layer, s.branch) for s in seen] == [(layer, "causal") for layer in range(LAYERS)]
    for s, v_BHSK, o_BHTK in zip(seen, values, outputs, strict=True):
        assert float((s.probability_BHTS.sum(dim=-1) - 1).abs().max()) < 1e-6
        assert float((s.probability_BHTS @ v_BHSK - o_BHTK).abs().max()) <= 1e-6 * float(o_BHTK.abs().max())
        unseen = ~s.visible_BTS[:, None].expand_as(s.logit_BHTS)
        assert bool((s.probability_BHTS[unseen] == 0).all()) and bool((s.logit_BHTS[unseen] == -math.inf).all())


@torch.no_grad()
def test_logits_and_residuals_are_the_oracles(subject):
    attention, levels = [], []
    for batch in subject.held_out(SAMPLES):
        with (
            observed_attention(subject.model, attention.append),
            observed_residuals(subject.model, lambda level, x_BTD: levels.append((level, x_BTD))),
        ):
            subject.hidden_states(batch)
    for row, sequence in enumerate(dense(subject)):
        for level, expected in enumerate(sequence.levels):
            assert levels[level][0] == level
            pieces = torch.cat([x for number, x in levels if number == level])
            assert float((pieces[row] - expected).abs().max()) < 2e-5 * float(expected.abs().max())
        for layer in range(LAYERS):
            found = torch.cat([s.logit_BHTS for s in attention if s.layer == layer])[row].double()
            expected = torch.tensor(sequence.scores[layer], dtype=torch.float64)
            assert torch.equal(found.isinf(), expected.isinf())
            assert float((found - expected).nan_to_num().abs().max()) < 1e-4


@torch.no_grad()
def test_switching_off_is_having_no_branch(subject):
    batch = next(subject.held_out(SAMPLES))
    whole = subject.hidden_states(batch)
    with switched_off(subject.model, [1]):  # this layer has none
        assert torch.equal(whole, subject.hidden_states(batch))
    block = subject.model.blocks[2]
    branch = block.meta_attention
    with switched_off(subject.model, [2]):
        without = subject.hidden_states(batch)
    try:
        block.meta_attention = None
        assert torch.equal(without, subject.hidden_states(batch))
    finally:
        block.meta_attention = branch
    assert not torch.equal(without, whole)
