"""The fused loss and its gradients against float64 logits in one process; what it holds; a vocabulary over ranks."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megameta.model import ModelConfig, cross_entropy_sum
from megameta.parallel import losses as fused_loss
from megameta.parallel.groups import TensorParallel
from megameta.parallel.losses import (
    chunk_rows,
    fused_cross_entropy_sum,
    fused_score_function,
    loss_and_gradient,
    score_function,
)
from tests.support.live_tensors import LiveTensors
from tests.support.ranks import run_ranks

WIDTH, ENTRIES = 24, 301


def make_case(dtype=torch.float64, batch=3, rows=37):
    """Hidden states, weight, labels of which some do not count (a whole sequence among them); a scale of the loss."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batch, rows, WIDTH, generator=draw, dtype=torch.float64)
    weight = torch.randn(ENTRIES, WIDTH, generator=draw, dtype=torch.float64)
    label = torch.randint(0, ENTRIES, (batch, rows), generator=draw)
    label[0, ::3] = -100
    label[1] = -100
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), label, 0.37


def expected():
    x, weight, label, scale = make_case()
    loss = F.cross_entropy(F.linear(x, weight).flatten(0, 1), label.flatten(), ignore_index=-100, reduction="sum")
    (loss * scale).backward()
    return loss.detach(), x.grad, weight.grad


def error(value, reference):
    return float((value.double() - reference).norm() / reference.norm())


def errors(loss, x, weight):
    return [error(a, b) for a, b in zip((loss.detach(), x.grad, weight.grad), expected())]


#: Whose code takes the loss: torch's (on a CPU, from 2.13 on), ours, and ours with a compiled pass (GPUs).
KINDS = ["torch's", "ours", "compiled"] if hasattr(F, "linear_cross_entropy") else ["ours", "compiled"]


@pytest.fixture(params=KINDS)
def fused(request, monkeypatch):
    """``fused_cross_entropy_sum`` of each kind; the compiled pass runs as torch.compile would trace it."""
    if request.param != "torch's":
        monkeypatch.setattr(fused_loss, "is_torchs", lambda device_type, ranks: False)
    fused = partial(fused_cross_entropy_sum, compiled=loss_and_gradient if request.param == "compiled" else None)
    fused.kind = request.param
    return fused


def set_rows(monkeypatch, rows):
    monkeypatch.setitem(fused_loss.MIN_ROWS, "cpu", rows)


@pytest.fixture(params=[1, 5, 64, 1000], ids=lambda rows: f"chunks of {rows}")
def rows(request, monkeypatch):
    set_rows(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
def test_loss_and_gradients(fused, rows, dtype, bound):
    x, weight, label, scale = make_case(dtype)
    loss = fused(x, weight, label)
    (loss * scale).backward()
    assert loss.dtype == x.grad.dtype == weight.grad.dtype == dtype
    assert max(errors(loss, x, weight)) < bound
    assert not x.grad[1].any()


@pytest.mark.parametrize("multiple", [1, 7, 64])
def test_a_padded_product_changes_nothing(fused, multiple, monkeypatch):
    """As on a GPU; entries of padding have no gradient to give."""
    monkeypatch.setattr(fused_loss, "row_multiple", lambda device_type: multiple)
    set_rows(monkeypatch, 5)
    x, weight, label, scale = make_case()
    loss = fused(x, weight, label)
    (loss * scale).backward()
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape
    assert max(errors(loss, x, weight)) < 1e-14


def test_bf16_is_as_near_as_logits_are(fused, rows):
    found = {}
    for name in ("logits", "fused"):
        x, weight, label, scale = make_case(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy_sum(F.linear(x, weight), label) if name == "logits" else fused(x, weight, label)
        (loss * scale).backward()
        assert loss.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
        found[name] = errors(loss, x, weight)
    if fused.kind == "torch's":
        assert max(found["fused"]) < 1e-6, "torch's products are in float32 on a CPU"
        return
    assert min(found["fused"][1:]) > 1e-4, "this is not bf16"
    for own, other in zip(found["fused"], found["logits"], strict=True):
        assert own < max(1.5 * other, 1e-3)


def test_a_row_without_a_target_may_hold_anything(fused):
    x, weight, label, _ = make_case()
    with torch.no_grad():
        x[1] *= 1e4  # of which the exponentials are not finite; no row of this sequence has a target
    loss = fused(x, weight, label)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all() and not x.grad[1].any()


def test_a_second_backward_pass_is_an_error(fused):
    x, weight, label, _ = make_case()
    loss = fused(x, weight, label)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|backward called twice"):
        loss.backward()


def test_logits_of_all_rows_are_never_held(monkeypatch):
    """Of our code; what torch's makes inside does not pass through Python."""
    monkeypatch.setattr(fused_loss, "is_torchs", lambda device_type, ranks: False)
    entries, rows, width = 4096, 2048, 64
    x, weight = torch.randn(1, rows, width, requires_grad=True), torch.randn(entries, width, requires_grad=True)
    label, whole, peaks = torch.randint(0, entries, (1, rows)), 4 * rows * entries, {}
    for name in ("logits", "fused"):
        with LiveTensors() as live:
            live.known([x, weight, label])
            loss = (
                cross_entropy_sum(F.linear(x, weight), label)
                if name == "logits"
                else fused_cross_entropy_sum(x, weight, label)
            )
            loss.backward()
        peaks[name] = live.peak
    print(f"peak beside the inputs, in logits of all rows: { ({k: round(v / whole, 3) for k, v in peaks.items()}) }")
    assert peaks["logits"] > 2.9 * whole
    assert peaks["fused"] < 0.4 * whole


def test_scores_by_sequence():
    x, weight, label, _ = make_case()
    group = (torch.arange(label.shape[1]) % 2).expand_as(label)
    x.data[0] *= 3  # some targets are the most likely token
    label[2, 5:] = -100
    label[2, :5] = F.linear(x, weight)[2, :5].argmax(dim=-1)
    with torch.no_grad():
        wanted = score_function(ModelConfig(), None)(F.linear(x, weight), label, group, 2)
        found = fused_score_function(ModelConfig(), None)(x, weight, label, group, 2)
    assert wanted[1] >= 5 and wanted[2] == 1
    torch.testing.assert_close(found, wanted)


def test_rows_of_a_chunk():
    assert chunk_rows(8192, 768, 50304, "cpu") == 256
    assert chunk_rows(8192, 768, 50304, "cuda") == 4096
    assert chunk_rows(65536, 4096, 50304, "cpu") == chunk_rows(65536, 4096, 50304, "cuda") == 5336
    assert chunk_rows(100, 768, 50304, "cpu") == 100
    assert chunk_rows(8192, 768, 0, "cpu") == 8192


def _on_ranks(topology, uneven):
    """Errors of this rank's part: the ranks hold the entries in equal parts, or the second one holds none."""
    fused_loss.MIN_ROWS["cpu"] = 2  # so that the size of chunks follows from the number of entries, which differs
    tp = TensorParallel(dist.group.WORLD, topology.world_size, topology.rank)
    width = ENTRIES if uneven else -(-ENTRIES // topology.world_size)
    start, stop = (min(r * width, ENTRIES) for r in (topology.rank, topology.rank + 1))
    x, weight, label, scale = make_case(torch.float32)
    own = weight.detach()[start:stop].clone().requires_grad_()
    loss = fused_cross_entropy_sum(x, own, label, start, tp, entries=width)
    (loss * scale).backward()
    dist.all_reduce(x.grad)
    wanted = expected()
    at_own = error(own.grad, wanted[2][start:stop]) if stop > start else 0.0
    return [error(loss.detach(), wanted[0]), error(x.grad, wanted[1]), at_own]


def _both(topology):
    return _on_ranks(topology, False), _on_ranks(topology, True)


def test_a_vocabulary_over_ranks():
    for report in run_ranks(_both, 2):
        for found in report:
            assert max(found) < 1e-6, found
