"""Outputs and gradients of every parameter against the dense float64 oracle (spec §2), in all options."""

import re
from typing import Any

import pytest
import torch

from megameta.model import GPT, ModelConfig, cross_entropy_sum, make_context
from megameta.model.gpt import make_logits
from megameta.model.init import is_vocabulary_table
from tests.support import oracle
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
    "position": ["rope", "ape", "none", "rnope"],
    "metas": ["ragged", "none", "one", "all"],
    "documents": ["one", "packed", "left_pad", "right_pad"],
    "positions": ["default", "restart", "shared", "scattered"],
    "activation": ["gelu", "gelu_tanh", "swiglu"],
    "num_key_value_heads": [4, 2, 1],
    "columns": ["counted", "larger", "length", "beyond"],
    "norm": ["layernorm", "rmsnorm"],
    "bias": [False, True],
    "zero_meta_positions": [False, True],
    "zero_meta_embedding": [False, True],
    "rotary_fraction": [1.0, 0.5],
    "qk_norm": [False, True],
    "parallel_residual": [False, True],
    "tie_embeddings": [True, False],
    "meta_token_id": [11, 36],
    "vocab_multiple": [1, 64],
}
BATCH_KEYS = ("metas", "documents", "positions", "columns", "vocab_multiple")
#: Position scaling needs rope, so that it is no option of the covering choice.
SCALED = covering(
    {
        "position_scaling": ["linear", "ntk", "yarn"],
        "position": ["rope", "rnope"],
        "position_scaling_factor": [1.5, 4.0, 8.0],
        "zero_meta_positions": [False, True],
        "rotary_fraction": [1.0, 0.5],
        "documents": ["one", "packed"],
        "positions": ["default", "scattered"],
        "yarn_attention_factor": [1.0, 0.7],
        "original_max_position_embeddings": [16, 64, 2048],
    }
)
#: The branch in some of three layers.
CHOSEN = covering(
    {
        "meta_layers": [(0,), (1,), (2,), (0, 2)],
        "position": ["rope", "ape", "rnope"],
        "metas": ["ragged", "none", "all"],
        "documents": ["one", "packed", "left_pad"],
        "parallel_residual": [False, True],
        "bias": [False, True],
    }
)
CASES = covering(OPTIONS)
SCALED = [
    {**CASES[0], **case, **({} if case["position_scaling"] == "yarn" else {"yarn_attention_factor": 1.0})}
    for case in SCALED
]
CHOSEN = [{**CASES[0], "num_layers": 3, **case} for case in CHOSEN]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def run_both(case: dict[str, Any], dtype: torch.dtype) -> tuple[GPT, dict[str, torch.Tensor], list[torch.Tensor]]:
    """The model and the oracle, forward and backward, on one batch: the model, the oracle's leaves, both logits."""
    config = small_config(**{key: value for key, value in case.items() if key not in BATCH_KEYS})
    model = small_model(config, dtype, vocab_multiple=case["vocab_multiple"])
    token = make_tokens(config, case["metas"])
    document = make_documents(case["documents"])
    position = make_positions(case["positions"], document)
    most = int((token == config.meta_token_id).sum(dim=1).max())
    columns = {"counted": None, "larger": min(most + 2, LENGTH), "length": LENGTH, "beyond": LENGTH + 3}
    logits = model(token, position_BT=position, document_BT=document, num_meta_columns=columns[case["columns"]])
    state = reference_state(model, requires_grad=True)
    expected = oracle.forward(config, state, token, position, document)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (logits * weight.to(dtype)).sum().backward()
    (expected * weight).sum().backward()
    return model, state, [logits, expected]


def gradient_scale(name: str, state: dict[str, torch.Tensor]) -> float:
    """Scale of a gradient that is zero in exact arithmetic: that of the same branch's values.

    Queries and keys have none where each row has one key or all keys are alike, nor have key biases that are not
    rotated (softmax does not see what is added to all scores of a row): both sides hold rounding errors alone.
    """
    if not re.search(r"attention\.[qk]_(proj|norm)", name):
        return 0.0
    grad = state[name].grad
    branch = name.split("attention.")[0] + "attention.v_proj."
    scale = max(float(value.grad.abs().max()) for key, value in state.items() if key.startswith(branch))
    return scale if float(grad.abs().max()) < 1e-12 * scale else 0.0


@pytest.mark.parametrize("case", SCALED, ids=case_id)
def test_scaled_positions(case: dict[str, Any]) -> None:
    test_outputs_and_gradients(case, torch.float64)


@pytest.mark.parametrize("case", CHOSEN, ids=case_id)
def test_branch_in_chosen_layers(case: dict[str, Any]) -> None:
    test_outputs_and_gradients(case, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_outputs_and_gradients(case: dict[str, Any], dtype: torch.dtype) -> None:
    model, state, (logits, expected) = run_both(case, dtype)
    assert logits.dtype == dtype
    assert_close(logits, expected, TOLERANCE[dtype], "logits")
    names = [name for name, _ in model.named_parameters()]
    assert sorted(names) == sorted(state)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = parameter.grad
        if is_vocabulary_table(name):
            assert not grad[model.config.vocab_size :].any(), name
            grad = grad[: model.config.vocab_size]
        reference = state[name].grad
        if reference is None:
            reference = torch.zeros_like(state[name])
        assert_close(grad, reference, TOLERANCE[dtype], name, scale=gradient_scale(name, state))


def test_every_pair_of_option_values_is_covered() -> None:
    """The list of cases is what it claims to be, and the gradients that it compares are not all zero."""
    for a, b in [("position", "documents"), ("metas", "documents"), ("positions", "zero_meta_positions")]:
        seen = {(case[a], case[b]) for case in CASES}
        assert len(seen) == len(OPTIONS[a]) * len(OPTIONS[b])
    _, state, _ = run_both({**CASES[0], "metas": "ragged", "documents": "one", "position": "rope"}, torch.float64)
    for name, value in state.items():
        assert value.grad is not None and value.grad.abs().max() > 1e-3, name


@pytest.mark.parametrize("documents", ["one", "packed"])
def test_no_meta_tokens_give_zero_gradients_and_the_twin_output(documents: str) -> None:
    config = small_config(bias=True, qk_norm=True)
    model = small_model(config)
    token, document = make_tokens(config, "none"), make_documents(documents)
    logits = model(token, document_BT=document)
    logits.square().sum().backward()
    branch = [(n, p) for n, p in model.named_parameters() if "meta" in n]
    assert len(branch) == config.num_layers * 12  # norm 2, four projections 8, query and key norms 2
    for name, parameter in branch:
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    twin = GPT(small_config(bias=True, qk_norm=True, meta_attention=False), 8).double()
    twin.load_state_dict({n: v for n, v in model.state_dict().items() if "meta" not in n})
    assert torch.equal(twin(token, document_BT=document), logits)
    with torch.no_grad():
        assert torch.equal(model(token, document_BT=document), logits)


def add_branch(config: ModelConfig, model: GPT, token: torch.Tensor, x: torch.Tensor, **given: Any) -> torch.Tensor:
    rows = make_context(config, token, **given).meta
    x, source = rows.take(x)
    return rows.add_(x.clone(), model.blocks[0].branch(source, rows))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", ["one", "packed", "left_pad"])
@pytest.mark.parametrize("metas", ["none", "one", "ragged", "all"])
def test_branch_adds_exactly_zero_at_text(metas: str, documents: str, dtype: torch.dtype) -> None:
    """Bitwise x wherever there is no meta-token, output bias included; the oracle's value at meta-tokens."""
    config = small_config(bias=True)
    model = small_model(config, dtype)
    token, document = make_tokens(config, metas), make_documents(documents)
    x = torch.randn(BATCH, LENGTH, config.hidden_size, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert model.blocks[0].meta_attention.o_proj.bias.abs().min() > 0
    for columns in (None, LENGTH):
        y = add_branch(config, model, token, x, document_BT=document, num_meta_columns=columns)
        is_meta = token == config.meta_token_id
        assert torch.equal(y[~is_meta], x[~is_meta])
        state = reference_state(model)
        for row in range(BATCH):
            doc = torch.zeros(LENGTH, dtype=torch.long) if document is None else document[row]
            added = oracle.meta_branch(config, state, 0, x[row].double(), is_meta[row], torch.arange(LENGTH), doc)
            assert not added[~is_meta[row]].any()
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
            assert_close(y[row], x[row].double() + added, tolerance, "branch")


def test_text_rows_do_not_reach_the_branch() -> None:
    """Not even as NaN: the branch reads meta rows alone. Padding columns read row 0, so row 0 stays finite here."""
    config = small_config()
    model = small_model(config)
    token = make_tokens(config, "ragged")
    x = torch.randn(BATCH, LENGTH, config.hidden_size, dtype=torch.float64)
    clean = add_branch(config, model, token, x)
    is_meta = token == config.meta_token_id
    poison = ~is_meta
    poison[:, 0] = False
    poisoned = add_branch(config, model, token, x.masked_fill(poison[..., None], float("nan")))
    assert torch.equal(poisoned[is_meta], clean[is_meta])


def test_padded_logits_have_the_same_loss_and_gradients() -> None:
    """As a GPU makes them; what pads the vocabulary gets no gradient at all."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 8, dtype=torch.float64, generator=generator)
    weight[37:] = 0
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=generator)
    label = torch.randint(0, 37, (2, 5), generator=generator)
    results = []
    for padded in (False, True):
        leaves = [z.clone().requires_grad_() for z in (x, weight)]
        logits = make_logits(*leaves, 37, padded=padded)
        assert logits.shape == (2, 5, 37)
        loss = cross_entropy_sum(logits, label)
        loss.backward()
        assert not leaves[1].grad[37:].any()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_angles_agree_with_float64_angles(fraction: float) -> None:
    """The oracle shares the float32 frequencies of the model; here they are measured against exact ones."""
    from megameta.model.rope import rotate, rotation_at

    config = small_config(hidden_size=256, rotary_fraction=fraction)
    position = torch.tensor([[0, 1, 2, 511, 1023, 8191]])
    size = config.rotary_size
    frequency = torch.tensor([10000.0 ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64)
    angle = position[0, :, None].double() * frequency
    x = torch.randn(1, 1, 6, config.head_size, dtype=torch.float64)
    y = rotate(x, rotation_at(position, config))
    pairs = torch.complex(x[0, 0, :, : size // 2], x[0, 0, :, size // 2 : size]) * torch.polar(
        torch.ones_like(angle), angle
    )
    expected = torch.cat((pairs.real, pairs.imag, x[0, 0, :, size:]), dim=-1)
    # float32 keeps 24 bits of an angle of up to 8191 radians, and of the frequency that it comes from.
    bound = 4 * 8192 * 2.0**-24
    assert_close(y[0, 0], expected, bound, "rotated")
    assert torch.equal(y[0, 0, 0], x[0, 0, 0])


def test_context_of_a_batch_is_computed_once() -> None:
    """zero_meta_positions acts on meta-tokens alone, and positions of (1, T) serve a whole batch."""
    config = small_config(zero_meta_positions=True)
    token = make_tokens(config, "ragged")
    context = make_context(config, token, position_BT=torch.arange(100, 100 + LENGTH)[None])
    is_meta = token == config.meta_token_id
    assert context.position_BT.shape == token.shape
    assert not context.position_BT[is_meta].any()
    assert (context.position_BT >= 100)[~is_meta].all()
