"""DeepSpeed's dictionary follows from the run's configuration; the pass-through section adds and never contradicts."""

import pytest

from megameta.config.deepspeed import deepspeed_config, overlaps_reduction
from megameta.errors import UserError
from tests.support.training import tiny_config


def test_derived():
    config = tiny_config("x", parallel__zero_stage=2, train__precision="bf16")
    assert deepspeed_config(config, 4, 2) == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2, "compute_grad_norm": False},
        "timers": {"throughput": {"enabled": False}},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
    assert "torch_autocast" not in deepspeed_config(tiny_config("x"), 4, 0)
    staged = deepspeed_config(tiny_config("x", parallel__pipeline_parallel_size=2), 4, 1)
    assert staged["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}
    half = tiny_config("x", train__precision="fp16", parallel__zero_stage=0)
    assert deepspeed_config(half, 1, 0)["torch_autocast"]["dtype"] == "float16"


def test_who_clips():
    """DeepSpeed where its gradients are scaled, elsewhere, spread over stages, or of another type."""
    whole, offloaded = {"stage": 1}, {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    for stage, changes in (
        (3, {}),
        (1, {"parallel__pipeline_parallel_size": 2}),
        (0, {"train__precision": "fp16"}),
        (1, {"train__precision": "fp16"}),
        (1, {"deepspeed__zero_optimization": offloaded}),
        (1, {"deepspeed__data_types": {"grad_accum_dtype": "bf16"}}),
    ):
        derived = deepspeed_config(tiny_config("x", **changes), 4, stage)
        assert derived["gradient_clipping"] == 0.5 and "compute_grad_norm" not in derived["zero_optimization"]
    for stage, changes in ((0, {}), (1, {"deepspeed__zero_optimization": whole}), (2, {"train__precision": "bf16"})):
        derived = deepspeed_config(tiny_config("x", **changes), 4, stage)
        assert derived["gradient_clipping"] == 0.0
        assert derived["zero_optimization"].get("compute_grad_norm", True) == (stage == 0)


def test_sums_overlap_the_backward_pass_where_that_gains():
    """On GPUs, where gradients fill several buckets; or as the configuration says."""

    def found(device="cuda", stage=1, pipeline=1, data=2, count=1_000_001, **zero):
        config = tiny_config("x", deepspeed__zero_optimization={"reduce_bucket_size": 1_000_000, **zero})
        sizes = {"zero_stage": stage, "pipeline": pipeline, "data": data, "num_parameters": count}
        return overlaps_reduction(config, device, **sizes)

    assert found() and found(stage=2)
    for other in ({"device": "cpu"}, {"stage": 0}, {"stage": 3}, {"pipeline": 2}, {"data": 1}, {"count": 1_000_000}):
        assert not found(**other), other
    assert not found(overlap_comm=False) and found(device="cpu", count=1, overlap_comm=True)
    assert not found(pipeline=2, overlap_comm=True)
    config = tiny_config("x", parallel__zero_stage=1)
    assert deepspeed_config(config, 4, 1, overlap=True)["zero_optimization"]["overlap_comm"]
    assert "overlap_comm" not in deepspeed_config(config, 4, 1)["zero_optimization"]
    chosen = tiny_config("x", deepspeed__zero_optimization={"stage": 1, "overlap_comm": True})
    assert deepspeed_config(chosen, 4, 1, overlap=True)["zero_optimization"]["overlap_comm"]


def test_pass_through_adds_and_may_repeat():
    config = tiny_config("x", deepspeed__zero_optimization={"stage": 1, "overlap_comm": False}, deepspeed__dump_state=1)
    merged = deepspeed_config(config, 4, 1)
    assert merged["zero_optimization"] == {"stage": 1, "compute_grad_norm": False, "overlap_comm": False}
    assert merged["dump_state"] == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gradient_clipping", 0.5, r"deepspeed\.gradient_clipping: set optimizer\.clip_grad_norm instead"),
        ("zero_optimization", {"stage": 3}, r"deepspeed\.zero_optimization\.stage: 3 contradicts 1"),
        ("train_batch_size", 1, r"deepspeed\.train_batch_size"),
        ("zero_optimization", 3, r"deepspeed\.zero_optimization: 3 contradicts"),
        ("fp16", {"enabled": True}, r"deepspeed\.fp16: set train\.precision instead"),
        ("bf16", {"enabled": True}, r"deepspeed\.bf16: set train\.precision instead"),
        ("optimizer", {"type": "Adam"}, r"deepspeed\.optimizer: set optimizer\.\* instead"),
        ("scheduler", {"type": "WarmupLR"}, r"deepspeed\.scheduler: set optimizer\.schedule instead"),
    ],
)
def test_contradictions_are_errors(key, value, message):
    with pytest.raises(UserError, match=message):
        deepspeed_config(tiny_config("x", **{f"deepspeed__{key}": value}), 4, 1)
