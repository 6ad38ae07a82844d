"""Checks across fields, each with the keys and a remedy."""

import pytest

from megameta.config import apply_overrides, build_config
from megameta.config.derived import data_parallel_size
from megameta.config.validate import problems, validate
from megameta.errors import UserError

GOOD = {"optimizer": {"warmup_steps": 10}, "train": {"num_steps": 100}}


def config(*overrides):
    return build_config(apply_overrides(GOOD, list(overrides)))


def test_the_good_one_is_good():
    assert problems(config(), world_size=1, device="cpu") == []
    assert problems(config(), world_size=1, device="cuda") == []
    validate(config(), world_size=1, device="cpu")


@pytest.mark.parametrize(
    ("overrides", "world_size", "device", "words"),
    [
        (["model.position=ape", "model.max_position_embeddings=512"], 1, "cpu", ["512", "sequence_length 1024"]),
        (["data.reset_positions=true"], 1, "cpu", ["data.reset_positions", "data.document_mask=true"]),
        (["data.skip=[[3, 3]]"], 1, "cpu", ["data.skip [3, 3]"]),
        (["data.skip=[[-1, 3]]"], 1, "cpu", ["data.skip [-1, 3]"]),
        (["train.micro_batch_size=3"], 1, "cpu", ["global_batch_size 8", "micro_batch_size 3 × 1"]),
        ([], 3, "cpu", ["micro_batch_size 8 × 3", "= 24"]),
        (["train.num_steps=10"], 1, "cpu", ["warmup_steps 10", "train.num_steps 10"]),
        (["optimizer.min_lr=1"], 1, "cpu", ["optimizer.min_lr 1.0", "optimizer.lr 0.0006"]),
        (["optimizer.schedule=wsd", "optimizer.decay_steps=91"], 1, "cpu", ["warmup_steps 10", "decay_steps 91"]),
        (["optimizer.schedule=wsd", "optimizer.warmup_steps=95"], 1, "cpu", ["warmup_steps 95", "decay_steps 10"]),
        (
            ["train.precision=fp16", "parallel.tensor_parallel_size=2", "parallel.zero_stage=0"],
            2,
            "cuda",
            ["fp16", "zero_stage 0", "zero_stage=1"],
        ),
        (
            ["checkpoint.async_save=true", "deepspeed.zero_optimization.offload_optimizer.device=nvme"],
            1,
            "cuda",
            ["zero_optimization.offload_optimizer.device nvme", "async_save=false"],
        ),
        ([], 16, "cpu", ["= 128", "global_batch_size=128 would do"]),
        (["train.micro_batch_size=4"], 4, "cpu", ["= 16", "global_batch_size=16", "micro_batch_size=2"]),
        (["train.precision=fp16"], 1, "cpu", ["fp16 needs a CUDA device", "bf16"]),
        (["parallel.sequence_parallel=true"], 1, "cpu", ["sequence_parallel", "tensor_parallel_size"]),
        (
            ["parallel.tensor_parallel_size=8", "train.micro_batch_size=1"],
            8,
            "cpu",
            ["num_heads 12", "size 8", "1 or 2 or 3"],
        ),
        (["model.num_key_value_heads=2", "parallel.tensor_parallel_size=4"], 4, "cpu", ["num_key_value_heads 2"]),
        (["model.intermediate_size=9", "parallel.tensor_parallel_size=2"], 2, "cpu", ["intermediate_size 9"]),
        (
            ["parallel.tensor_parallel_size=3", "parallel.sequence_parallel=true"],
            3,
            "cpu",
            ["sequence_length 1024", "tensor_parallel_size 3"],
        ),
        (["parallel.pipeline_parallel_size=13"], 13, "cpu", ["pipeline_parallel_size 13", "num_layers 12"]),
        (["parallel.pipeline_parallel_size=2", "parallel.zero_stage=0"], 2, "cpu", ["clips", "zero_stage=1"]),
        (["parallel.pipeline_parallel_size=2", "parallel.zero_stage=3"], 2, "cpu", ["zero_stage 3", "zero_stage=1"]),
        (["parallel.pipeline_parallel_size=2", "train.precision=fp16"], 2, "cuda", ["fp16", "bf16"]),
        (["deepspeed.bf16.enabled=true"], 1, "cpu", ["deepspeed.bf16", "train.precision"]),
        (["deepspeed.gradient_accumulation_steps=3"], 1, "cpu", ["3 contradicts 1", "other sections"]),
    ],
)
def test_each_problem(overrides, world_size, device, words):
    (found,) = problems(config(*overrides), world_size=world_size, device=device)
    for word in words:
        assert word in found


def test_model_parallel_sizes_must_divide_the_world():
    found = problems(config("parallel.tensor_parallel_size=2"), world_size=3, device="cuda")
    assert any("3 processes cannot be divided" in problem for problem in found)
    assert data_parallel_size(config("parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"), 8) == 2


def test_fp16_on_a_gpu_and_boundaries_are_fine():
    assert problems(config("train.precision=fp16"), world_size=1, device="cuda") == []
    wsd = config("optimizer.schedule=wsd", "optimizer.decay_steps=90")
    assert problems(wsd, world_size=1, device="cpu") == []
    four = config("train.micro_batch_size=2")
    assert problems(four, world_size=4, device="cpu") == []


def test_all_at_once():
    with pytest.raises(UserError, match=r"(?s)has 3 problem.*reset_positions.*micro_batch_size.*warmup_steps"):
        validate(
            config("data.reset_positions=true", "train.micro_batch_size=3", "train.num_steps=5"),
            world_size=1,
            device="cpu",
        )


def test_what_deepspeed_is_told_follows_from_the_number_of_ranks():
    """Two of eight sequences a rank are accumulated twice on two ranks."""
    told = config("train.micro_batch_size=2", "deepspeed.gradient_accumulation_steps=2")
    assert problems(told, world_size=2, device="cpu") == []
    assert "2 contradicts 4" in problems(told, world_size=1, device="cuda")[0]
