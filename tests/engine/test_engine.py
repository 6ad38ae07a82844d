"""The engine under every ZeRO stage, on up to three ranks, against a plain float64 loop (tests/support/training.py)."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megameta.engine.build import build_model
from megameta.engine.engine import NonFiniteGradient, NonFiniteLoss
from megameta.engine.pipeline_engine import make_engine
from megameta.model.init import is_vocabulary_table
from tests.support.ranks import run_ranks
from tests.support.training import (
    VOCABULARY,
    full_state,
    oracle_run,
    step_loader,
    take_steps,
    tiny_config,
    training_set,
    weights_digest,
)

STEPS, MOVE_AT, BF16_STEPS = 12, 6, 4
STAGES = (0, 1, 2, 3)  # 3 last: it patches torch's functions for the rest of the process


def _make(topology, config, weights=None):
    return make_engine(config, topology, weights), step_loader(config, topology)


def _catch_gradients(engine):
    """Whole gradients of the next step, taken between its last backward and its update."""
    found, check = {}, engine._read

    def look(*args):
        found.update({name: engine.state.gradient(name) for name in engine.state.parameters})
        return check(*args)

    engine._read = look
    return found


def _curve(topology, corpus, stage):
    config = tiny_config(corpus, parallel__zero_stage=stage)
    engine, loader = _make(topology, config)
    gradients = _catch_gradients(engine)
    results = take_steps(engine, loader, config, 1, 1)
    del engine._read
    gradients = dict(gradients)
    results += take_steps(engine, loader, config, 2, MOVE_AT)
    state = list(full_state(engine))
    results += take_steps(engine, loader, config, MOVE_AT + 1, STEPS)
    weights, _ = full_state(engine)
    report = {
        "gradients": gradients,
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "targets": [r.num_targets for r in results],
        "applied": all(r.applied for r in results),
        "digest": weights_digest(engine),
        "weights": weights,
        "micro_targets": [batch.num_targets for batch in loader.read(0)],
        "optimizer_step": engine.state.optimizer_step,
    }
    loader.close()
    engine.destroy()
    return report, state


def _moved(topology, corpus, stage, state):
    """Goes on at another stage from the weights and moments that a stage left after MOVE_AT steps."""
    dist.broadcast_object_list(state)
    weights, moments = state
    config = tiny_config(corpus, parallel__zero_stage=stage)
    engine, loader = _make(topology, config, weights)
    engine.state.load_moments(moments, MOVE_AT)
    again = full_state(engine)
    same = all(torch.equal(a[k], b[k]) for a, b in zip(state, again) for k in b)
    results = take_steps(engine, loader, config, MOVE_AT + 1, STEPS)
    report = {"losses": [r.loss for r in results], "same": same, "optimizer_step": engine.state.optimizer_step}
    loader.close()
    engine.destroy()
    return report


def _bf16(topology, corpus, stage):
    config = tiny_config(corpus, parallel__zero_stage=stage, train__precision="bf16")
    engine, loader = _make(topology, config)
    results = take_steps(engine, loader, config, 1, BF16_STEPS)
    dtypes = {p.dtype for p in engine.state.parameters.values()}
    loader.close()
    engine.destroy()
    return {"losses": [r.loss for r in results], "norms": [r.grad_norm for r in results], "dtypes": dtypes}


def _poisoned(topology, corpus, stage):
    """A weight becomes NaN on the last rank alone (everywhere at stage 3, where ranks share the weights)."""
    config = tiny_config(corpus, parallel__zero_stage=stage)
    engine, loader = _make(topology, config)
    take_steps(engine, loader, config, 1, 1)
    before = weights_digest(engine) if stage < 3 else ""
    if stage == 3:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([engine.engine.module.gpt.head.norm.weight], modifier_rank=0):
            engine.engine.module.gpt.head.norm.weight.data.fill_(math.nan)
    elif topology.rank == topology.world_size - 1:
        engine.engine.module.gpt.head.norm.weight.data[0] = math.nan
    before = weights_digest(engine)
    try:
        take_steps(engine, loader, config, 2, 2)
        message = None
    except NonFiniteLoss as error:
        message = str(error)
    report = {
        "message": message,
        "untouched": weights_digest(engine) == before,
        "optimizer_step": engine.state.optimizer_step,
    }
    loader.close()
    engine.destroy()
    return report


def _bad_gradient(topology, corpus, stage):
    """The loss is finite on every rank, a gradient on one rank is not."""
    config = tiny_config(corpus, parallel__zero_stage=stage)
    engine, loader = _make(topology, config)
    if topology.is_main:
        engine.engine.module.gpt.head.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    before, message, updated = weights_digest(engine), None, None
    try:
        take_steps(engine, loader, config, 1, 1)
    except NonFiniteGradient as error:
        message, updated = str(error), error.updated
    found = {"message": message, "updated": updated, "untouched": weights_digest(engine) == before}
    loader.close()
    engine.destroy()
    return found


def _everything(topology, corpus):
    torch.manual_seed(topology.rank)  # nothing may depend on it
    report, state = {}, None
    for stage in STAGES:
        report["curve", stage], left = _curve(topology, corpus, stage)
        if state is not None:
            report["moved", stage] = _moved(topology, corpus, stage, state)
        state = left
        report["bf16", stage] = _bf16(topology, corpus, stage)
        report["poisoned", stage] = _poisoned(topology, corpus, stage)
        report["bad gradient", stage] = _bad_gradient(topology, corpus, stage)
    return report


def _overlapping(topology, corpus):
    """Gradients summed in the backward pass, in many buckets."""
    found = {}
    for stage in (1, 2):
        zero = {"overlap_comm": True, "reduce_bucket_size": 3000}
        config = tiny_config(corpus, parallel__zero_stage=stage, deepspeed__zero_optimization=zero)
        engine, loader = _make(topology, config)
        found[stage] = [(r.loss, r.grad_norm) for r in take_steps(engine, loader, config, 1, BF16_STEPS)]
        loader.close()
        engine.destroy()
    return found


def test_sums_that_overlap_the_backward_pass(corpus, oracle):
    """The order of hooks and our norm and clipping after it; the streams of a GPU are not in this."""
    expected = zip(oracle["losses"][:BF16_STEPS], oracle["norms"][:BF16_STEPS])
    expected = [pytest.approx(pair, rel=1e-5) for pair in expected]
    for report in run_ranks(_overlapping, 2, corpus):
        assert report[1] == expected and report[2] == expected


def _three_ranks(topology, corpus):
    """Two steps at each stage, each from the state that the one before left."""
    report, state = {"losses": [], "norms": [], "same": []}, None
    for number, stage in enumerate(STAGES):
        config = tiny_config(corpus, parallel__zero_stage=stage, train__global_batch_size=12)
        engine, loader = _make(topology, config, state and state[0])
        if state is not None:
            engine.state.load_moments(state[1], 2 * number)
            again = full_state(engine)
            report["same"].append(all(torch.equal(a[k], b[k]) for a, b in zip(state, again) for k in a))
        results = take_steps(engine, loader, config, 2 * number + 1, 2 * number + 2)
        report["losses"] += [r.loss for r in results]
        report["norms"] += [r.grad_norm for r in results]
        state = [full_state(engine)]
        dist.broadcast_object_list(state)
        state = state[0]
        loader.close()
        engine.destroy()
    return report


def test_ranks_that_do_not_divide_the_parameters(corpus):
    """Partitions then end with padding, which DeepSpeed counts among the gradients of the last one."""
    config = tiny_config(corpus, train__global_batch_size=12)
    count = sum(parameter.numel() for parameter in build_model(config).parameters())
    assert count % 3, "the case divides"
    expected = oracle_run(config, 2 * len(STAGES))
    for report in run_ranks(_three_ranks, 3, corpus):
        assert report["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert report["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert report["same"] == [True] * 3


@pytest.fixture(scope="module")
def oracle(corpus):
    return oracle_run(tiny_config(corpus), STEPS)


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def ranks(request, corpus):
    return run_ranks(_everything, request.param, corpus)


def test_the_oracle_is_a_hard_case(corpus, oracle):
    """Clipping is active, and micro-batches have such different numbers of targets that a mean of means is wrong."""
    config = tiny_config(corpus)
    assert min(oracle["norms"]) > config.optimizer.clip_grad_norm
    dataset, model = training_set(config), build_model(config).double()
    sums, counts = [], []
    for first in range(0, 8, 2):
        for s in (dataset[first], dataset[first + 1]):
            token, document, position = (torch.from_numpy(x)[None] for x in (s.token_T, s.document_T, s.position_T))
            logits = model(token, document_BT=document, position_BT=position)[0].detach()
            sums.append(float(F.cross_entropy(logits, torch.from_numpy(s.label_T), reduction="sum")))
            counts.append(int((s.label_T >= 0).sum()))
    sums = [a + b for a, b in zip(sums[::2], sums[1::2])]
    counts = [a + b for a, b in zip(counts[::2], counts[1::2])]
    assert sum(sums) / sum(counts) == pytest.approx(oracle["losses"][0], rel=1e-12)
    mean_of_means = sum(s / c for s, c in zip(sums, counts)) / len(sums)
    assert abs(mean_of_means / oracle["losses"][0] - 1) > 1e-3
    assert max(counts) >= 2 * min(counts)


def logical(tensors):
    """Without the rows that pad the vocabulary, which must be zero."""
    out = {}
    for name, tensor in tensors.items():
        rows = VOCABULARY if is_vocabulary_table(name) else len(tensor)
        assert not tensor[rows:].any()
        out[name] = tensor[:rows]
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_before_the_first_step(ranks, oracle, stage):
    for rank in ranks:
        gradients = rank["curve", stage]["gradients"]
        assert gradients.keys() == oracle["gradients"].keys()
        for name, expected in logical(oracle["gradients"]).items():
            assert float(expected.norm()) > 1e-6, f"{name}: the case does not reach this parameter"
            error = float((gradients[name].double() - expected).norm() / expected.norm())
            assert error < 1e-5, (name, error)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_norms_follow_the_oracle(ranks, oracle, stage):
    for rank in ranks:
        report = rank["curve", stage]
        assert report["targets"] == oracle["targets"]
        assert report["losses"] == pytest.approx(oracle["losses"], rel=1e-5)
        assert report["norms"] == pytest.approx(oracle["norms"], rel=1e-4)
        assert report["applied"] and report["optimizer_step"] == STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_weights_at_the_end(ranks, oracle, stage):
    weights = ranks[0]["curve", stage]["weights"]
    assert weights.keys() == oracle["weights"].keys()
    for name, expected in logical(oracle["weights"]).items():
        error = float((weights[name].double() - expected).norm() / expected.norm())
        assert error < 5e-4, (name, error)  # key biases hardly have a gradient, and Adam scales it up


@pytest.mark.parametrize("stage", STAGES)
def test_replicas_are_bitwise_equal(ranks, stage):
    reports = [rank["curve", stage] for rank in ranks]
    assert len({report["digest"] for report in reports}) == 1
    assert all(report["losses"] == reports[0]["losses"] for report in reports)
    assert all(report["norms"] == reports[0]["norms"] for report in reports)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_state_moves_between_stages(ranks, oracle, stage):
    for rank in ranks:
        report = rank["moved", stage]
        assert report["same"], "gathered, loaded and gathered again is not the same"
        assert report["losses"] == pytest.approx(oracle["losses"][MOVE_AT:], rel=1e-5)
        assert report["optimizer_step"] == STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stays_near_float32(ranks, oracle, stage):
    for rank in ranks:
        report = rank["bf16", stage]
        assert report["dtypes"] == {torch.float32}
        assert report["losses"] == pytest.approx(oracle["losses"][:BF16_STEPS], rel=5e-3)
        assert report["losses"] != pytest.approx(oracle["losses"][:BF16_STEPS], rel=1e-6), "bf16 is not in force"
        assert report["norms"] == pytest.approx(oracle["norms"][:BF16_STEPS], rel=5e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_stops_all_ranks(ranks, stage):
    size = len(ranks)
    for rank in ranks:
        report = rank["poisoned", stage]
        assert report["message"] is not None
        # The samples of step 2 are 8 … 15, in micro-batches of two, dealt to the ranks in turn.
        last = " ".join(f"{8 + 2 * i}–{9 + 2 * i}" for i in range(size - 1, 4, size))
        assert f"rank {size - 1}: samples {last}" in report["message"]
        if stage < 3 and size == 2:
            assert "rank 0" not in report["message"]
        assert report["untouched"] and report["optimizer_step"] == 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_stops_all_ranks(ranks, stage):
    """Or the next checkpoint would be one of NaN. Before the update, where the norm is taken there."""
    for rank in ranks:
        found = rank["bad gradient", stage]
        assert "the norm of its gradient is" in found["message"]
        assert found["updated"] == (stage == 3) and (found["untouched"] or stage == 3)


def _uneven(topology, corpus):
    """Moments put in place and taken out again, on three ranks, which divide hardly any parameter."""
    config = tiny_config(corpus, parallel__zero_stage=3, train__global_batch_size=6)
    engine = make_engine(config, topology)
    draw = torch.Generator().manual_seed(5)
    moments = {
        f"{key}.{name}": torch.rand(shape, generator=draw)
        for name, shape in engine.state.shapes.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    engine.state.load_moments(moments, 4)
    again = full_state(engine)[1]
    weights = full_state(engine)[0]
    drawn = build_model(config).state_dict()
    engine.destroy()
    same = all(torch.equal(again[name], tensor) for name, tensor in moments.items())
    return same, all(torch.equal(tensor, drawn[name][: len(tensor)]) for name, tensor in weights.items())


def test_zero_3_on_ranks_that_do_not_divide_the_parameters(corpus):
    """DeepSpeed's own safe_set_full_optimizer_state fails on the last of them."""
    assert run_ranks(_uneven, 3, corpus) == [(True, True)] * 3
