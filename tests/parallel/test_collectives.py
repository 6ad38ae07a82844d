"""Each autograd collective against the same function of all ranks' inputs in one process, forward and backward.

A rank's part of the loss is <w_r, y_r> with weights of its own; where every rank holds the same y, and only one loss
is meant, all of them use one w. Float64, so that agreement is exact to rounding.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megameta.parallel import collectives, losses
from megameta.parallel.groups import make_groups
from tests.support.ranks import run_ranks

WORLD, BATCH, LENGTH, WIDTH = 4, 2, 8, 3
FUNCTIONS = ("copy_to_shards", "reduce_shards", "gather_sequence", "scatter_sequence", "split_sequence")
#: Functions whose input is the same on every rank, and those whose output (and so its gradient) is.
SAME_INPUT = ("copy_to_shards", "split_sequence")
SAME_OUTPUT = ("reduce_shards",)
VOCABULARIES = {"even": (5, 5, 5, 5), "uneven": (5, 5, 5, 2), "a rank without entries": (5, 5, 1, 0)}


def draw(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(name):
    length = LENGTH // WORLD if name == "gather_sequence" else LENGTH
    return [draw(0 if name in SAME_INPUT else rank, BATCH, length, WIDTH) for rank in range(WORLD)]


def weights(name):
    length = LENGTH // WORLD if name in ("scatter_sequence", "split_sequence") else LENGTH
    return [draw(100 if name in SAME_OUTPUT else 100 + rank, BATCH, length, WIDTH) for rank in range(WORLD)]


def by_hand(name, xs):
    """What each rank gets, from all ranks' inputs, in plain torch."""
    total = sum(xs)
    if name == "copy_to_shards":
        return list(xs)
    if name == "reduce_shards":
        return [total] * WORLD
    if name == "gather_sequence":
        return [torch.cat(list(xs), dim=1)] * WORLD
    if name == "scatter_sequence":
        return list(total.chunk(WORLD, dim=1))
    return [x.chunk(WORLD, dim=1)[rank] for rank, x in enumerate(xs)]  # split_sequence


def expected(name):
    """Outputs by rank, and gradients of the whole loss with respect to each rank's input."""
    xs = [x.requires_grad_() for x in inputs(name)]
    if name in SAME_INPUT:
        xs = [xs[0]] * WORLD
    ys = by_hand(name, xs)
    parts = [(w * y).sum() for w, y in zip(weights(name), ys)]
    (parts[0] if name in SAME_OUTPUT else sum(parts)).backward()
    return [y.detach() for y in ys], [x.grad for x in xs]


def vocabulary_case(widths, dtype=torch.float64):
    logits = 3 * draw(7, BATCH, LENGTH, sum(widths))
    label = torch.randint(sum(widths), (BATCH, LENGTH), generator=torch.Generator().manual_seed(8))
    label[0, 0] = label[1, 3] = -100
    return logits.to(dtype), label


def _everything(topology):
    topology = dataclasses.replace(topology, tensor_parallel_size=WORLD)
    tp = make_groups(topology).layers
    out = {}
    for name in FUNCTIONS:
        x = inputs(name)[tp.rank].requires_grad_()
        y = getattr(collectives, name)(x, tp)
        (weights(name)[tp.rank] * y).sum().backward()
        out[name] = (y.detach(), x.grad)
    for case, widths in VOCABULARIES.items():
        for dtype in (torch.float64, torch.bfloat16):
            logits, label = vocabulary_case(widths, dtype)
            start = sum(widths[: tp.rank])
            # entries behind the vocabulary's end belong to nobody: 5 a rank, as padding has it
            own = logits[..., start : start + widths[tp.rank]].clone().requires_grad_()
            loss = losses.vocabulary_cross_entropy_sum(own, label, start, tp)
            (2.5 * loss).backward()
            out[case, dtype] = (loss.detach(), own.grad)
            out[case, dtype, "argmax"] = losses.vocabulary_argmax(own.detach(), start, tp)
    return out


@pytest.fixture(scope="module")
def outcomes():
    return run_ranks(_everything, WORLD)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_and_backward(outcomes, name):
    ys, grads = expected(name)
    for rank in range(WORLD):
        y, grad = outcomes[rank][name]
        torch.testing.assert_close(y, ys[rank])
        torch.testing.assert_close(grad, grads[rank])


@pytest.mark.parametrize("case", VOCABULARIES)
def test_cross_entropy_of_sharded_logits(outcomes, case):
    widths = VOCABULARIES[case]
    logits, label = vocabulary_case(widths)
    logits.requires_grad_()
    loss = F.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=-100, reduction="sum")
    (2.5 * loss).backward()
    for rank, part in enumerate(logits.grad.split(widths, dim=-1)):
        own_loss, own_grad = outcomes[rank][case, torch.float64]
        torch.testing.assert_close(own_loss, loss.detach())
        torch.testing.assert_close(own_grad, part)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", VOCABULARIES)
def test_most_likely_token_of_sharded_logits(outcomes, case, dtype):
    logits, _ = vocabulary_case(VOCABULARIES[case], dtype)
    top = logits.max(dim=-1).values
    for rank in range(WORLD):
        found = outcomes[rank][case, dtype, "argmax"]
        assert torch.equal(found, outcomes[0][case, dtype, "argmax"])
        assert torch.equal(logits.gather(-1, found[..., None])[..., 0], top)
        assert not (logits == top[..., None])[..., :1].logical_and(found[..., None] != 0).any(), "the first of equals"


@pytest.mark.parametrize("case", VOCABULARIES)
def test_cross_entropy_in_bf16_is_summed_in_float32(outcomes, case):
    logits, label = vocabulary_case(VOCABULARIES[case], torch.bfloat16)
    wanted = F.cross_entropy(logits.flatten(0, 1).double(), label.flatten(), ignore_index=-100, reduction="sum")
    for rank in range(WORLD):
        loss, grad = outcomes[rank][case, torch.bfloat16]
        assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
        assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
