"""Parameters, memory and traffic as estimated, against modules that are built and steps that are run on gloo."""

from collections import defaultdict

import pytest
import torch

from megameta.config import RunConfig, load_config
from megameta.errors import UserError
from megameta.model import GPT, ModelConfig
from megameta.parallel.pipeline import Stage
from megameta.parallel.tensor_parallel import PARTIAL_BY_HEADS, PARTIAL_BY_ROWS, kind_of, shard_dim
from megameta.plan.activations import activations
from megameta.plan.estimate import StageEstimate, estimate, worst
from megameta.plan.layout import Layout, stage_blocks, stage_weights, zero_stage
from megameta.plan.traffic import Transfer
from tests.support.ranks import run_ranks
from tests.support.steps import observe, step_config

MODELS = {
    "paper": {},
    "bias, swiglu, grouped heads": {
        "bias": True,
        "activation": "swiglu",
        "num_key_value_heads": 2,
        "intermediate_size": 96,
    },
    "rmsnorm, qk_norm, untied": {"norm": "rmsnorm", "qk_norm": True, "tie_embeddings": False, "bias": True},
    "branch in two layers": {"meta_layers": (0, 3), "bias": True, "qk_norm": True},
    "ape, parallel, no branch": {"position": "ape", "parallel_residual": True, "meta_attention": False},
}
TINY = {"vocab_size": 700, "hidden_size": 64, "num_layers": 5, "num_heads": 4, "max_position_embeddings": 48}


def counted(model: ModelConfig, layout: Layout, blocks: tuple[int, int]) -> tuple[int, int, list[int]]:
    """(all, weights of linear layers, sizes of partial ones) of a stage that is built and sharded by the table."""
    with torch.device("meta"):
        part = GPT(model, 128 * layout.tensor) if layout.pipeline == 1 else Stage(model, blocks, 128 * layout.tensor)
    total, linear, partial = 0, 0, []
    for name, parameter in part.named_parameters():
        size = parameter.numel() // (layout.tensor if shard_dim(name) is not None else 1)
        total += size
        is_linear = kind_of(name.rpartition(".")[0]) is not None and "embedding" not in name
        linear += size if is_linear and name.endswith("weight") else 0
        by_rows = layout.sequence_parallel and PARTIAL_BY_ROWS.fullmatch(name)
        if layout.tensor > 1 and (by_rows or PARTIAL_BY_HEADS.fullmatch(name)):
            partial.append(size)
    return total, linear, sorted(partial)


@pytest.mark.parametrize(
    "sizes", [(1, 1, False), (2, 1, False), (2, 1, True), (1, 3, False), (2, 2, True), (4, 5, True)]
)
@pytest.mark.parametrize("case", MODELS)
def test_parameters_of_every_stage(case: str, sizes: tuple[int, int, bool]) -> None:
    tensor, pipeline, sequence_parallel = sizes
    values = {**TINY, **MODELS[case]}
    if tensor == 4:
        values.pop("num_key_value_heads", None)
    config = step_config(model=values, data__sequence_length=48)
    layout = Layout(tensor, pipeline, 1, 1, sequence_parallel, 1, 8, False)
    for blocks in stage_blocks(config, pipeline):
        weights = stage_weights(config.model, layout, blocks)
        total, linear, partial = counted(config.model, layout, blocks)
        assert (weights.count, weights.linear, sorted(weights.partial)) == (total, linear, partial)


@pytest.mark.parametrize(
    ("file", "millions"), [("paper/meta-rope", 151.9), ("scale/1.3b", 1713.8), ("scale/7b", 8796.4)]
)
def test_parameters_of_the_large_ones(file: str, millions: float, pytestconfig: pytest.Config) -> None:
    config = load_config(pytestconfig.rootpath / "configs" / f"{file}.yaml")
    with torch.device("meta"):
        built = sum(p.numel() for p in GPT(config.model).parameters())
    layout = Layout(1, 1, 1, 0, False, 1, 1, False)
    assert stage_weights(config.model, layout, (0, config.model.num_layers)).count == built
    assert built / 1e6 == pytest.approx(millions, abs=0.05)


def test_wire_bytes_of_a_ring() -> None:
    assert Transfer("data", "all_reduce", "", 100.0, 3, 4).wire == pytest.approx(2 * 3 / 4 * 300)
    assert Transfer("data", "all_gather", "", 100.0, 3, 4).wire == pytest.approx(3 / 4 * 300)
    assert Transfer("data", "reduce_scatter", "", 100.0, 1, 4).wire == pytest.approx(75)
    assert Transfer("pipeline", "send", "", 100.0, 2, 2).wire == 200


def test_memory_by_zero_stage() -> None:
    """Of a model of P parameters on 4 ranks, by DeepSpeed's rules."""
    config = step_config(train__global_batch_size=16)
    count = 0
    found = {}
    for zero in range(4):
        stage = estimate(config, Layout(1, 1, 4, zero, False, 2, 2, False))[0]
        count, found[zero] = stage.weights.count, stage.memory
    assert [m.gradients / count for m in found.values()] == [4, 4, 1, 1]
    assert [m.optimizer / count for m in found.values()] == [8, 3, 3, 3]
    assert [m.model / count for m in found.values()][:3] == [4, 4, 4]
    assert found[3].model == pytest.approx(count + 4 * count)  # its part, and all of it gathered: the model is small


@pytest.mark.parametrize("case", MODELS)
def test_linear_layers_are_fetched_one_by_one(case: str) -> None:
    deepspeed = {"zero_optimization": NOTHING_KEPT}
    config = step_config(model={**TINY, **MODELS[case]}, data__sequence_length=48, deepspeed=deepspeed)
    stage = estimate(config, Layout(1, 1, 2, 3, False, 2, 2, False))[0]
    with torch.device("meta"):
        linear = [m for m in GPT(config.model).blocks.modules() if isinstance(m, torch.nn.Linear)]
    assert {t.calls for t in stage.transfers if t.what == "parameters, forward"} == {2 * len(linear)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_is_charged_for_its_own_branches(precision: str, checkpointing: bool) -> None:
    """Of three models on two stages, the one with the branch on the first stage alone is like either of the others."""
    layout = Layout(2, 2, 1, 1, True, 2, 4, checkpointing)
    whole, first, none = (
        estimate(step_config(model={**TINY, "num_layers": 4, **branch}, train__precision=precision), layout)
        for branch in ({}, {"meta_layers": (0, 1)}, {"meta_attention": False})
    )
    assert [stage.blocks for stage in whole] == [stage.blocks for stage in first] == [(0, 2), (2, 4)]
    for own, like, unlike in ((first[0], whole[0], none[0]), (first[1], none[1], whole[1])):
        assert own == like
        assert own.memory.activations != unlike.memory.activations or checkpointing
        assert own.weights != unlike.weights and own.transfers != unlike.transfers


def test_micro_batches_in_flight() -> None:
    layout = Layout(1, 4, 1, 1, False, 1, 3, False)
    assert [layout.in_flight(stage) for stage in range(4)] == [3, 3, 2, 1]
    assert layout.bubble == pytest.approx(3 / 6)
    config = step_config(model__num_layers=8)
    stages = estimate(config, Layout(1, 4, 1, 1, False, 2, 8, False))
    inner = [stage.memory.activations for stage in stages[1:3]]
    assert inner[0] / inner[1] == pytest.approx(3 / 2, rel=0.1)
    assert worst(stages).memory.total == max(stage.memory.total for stage in stages)


def test_layout_of_a_configuration() -> None:
    config = step_config(parallel__tensor_parallel_size=2, train__global_batch_size=24)
    assert Layout.of(config, 8) == Layout(2, 1, 4, 1, False, 2, 3, False)
    with pytest.raises(UserError, match="replicas of 2"):
        Layout.of(config, 5)
    with pytest.raises(UserError, match="not a multiple"):
        Layout.of(config, 10)


@pytest.mark.parametrize(
    ("options", "ranks", "stage"),
    [
        ({}, 1, 0),
        ({}, 2, 1),
        ({"parallel__tensor_parallel_size": 2}, 1, 0),
        ({"parallel__pipeline_parallel_size": 2}, 1, 1),
        ({"train__precision": "fp16"}, 1, 1),
        ({"deepspeed__zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, 1, 1),
        ({"deepspeed__zero_optimization": {"reduce_bucket_size": 1000}}, 1, 0),
        ({"deepspeed__zero_optimization": {"stage": 1}}, 1, 1),
        ({"deepspeed__zero_optimization": 3}, 1, 0),  # refused elsewhere, with a message
        ({"deepspeed__data_types": {"grad_accum_dtype": "bf16"}}, 1, 1),
        *(({"parallel__zero_stage": stage}, ranks, stage) for stage in range(4) for ranks in (1, 2)),
    ],
)
def test_stage_of_zero_that_is_left_out(options: dict, ranks: int, stage: int) -> None:
    """A lone data-parallel rank has nobody to share with; what is asked for is done."""
    config = step_config(train__global_batch_size=4 * ranks, **{"parallel__zero_stage": None} | options)
    assert zero_stage(config, ranks) == stage
    world = ranks * config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
    assert Layout.of(config, world).zero_stage == stage


# --- against steps on gloo --------------------------------------------------------------------------------------------

OPTIONS = {
    "vocab_size": 700,
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "activation": "swiglu",
    "bias": True,
    "qk_norm": True,
}
CHOSEN = {**OPTIONS, "meta_layers": (0, 1)}
ONE_LAYER = {"vocab_size": 700, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "meta_layers": (1,)}
TENSOR = {"parallel__tensor_parallel_size": 2}
SEQUENCE = {**TENSOR, "parallel__sequence_parallel": True}
STAGES = {"parallel__pipeline_parallel_size": 2}
DOCUMENTS = {"data__document_mask": True, "data__reset_positions": True}
BUCKET = {"reduce_bucket_size": 200_000}
NOTHING_KEPT = {
    **BUCKET,
    "stage3_param_persistence_threshold": 100,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
LAYOUTS: dict[str, tuple[int, dict]] = {
    "tp2": (2, {**TENSOR, "train__precision": "bf16"}),
    "tp2, sequence": (2, SEQUENCE),
    "tp2, sequence, options, bf16": (2, {**SEQUENCE, "model": OPTIONS, "train__precision": "bf16"}),
    "pp2": (2, STAGES),
    "pp2, documents, bf16": (2, {**STAGES, **DOCUMENTS, "train__precision": "bf16"}),
    "tp2, branch in two layers, bf16": (2, {**TENSOR, "model": CHOSEN, "train__precision": "bf16"}),
    "pp2, branch on the first stage": (2, {**STAGES, **DOCUMENTS, "model": CHOSEN}),
    "dp2, ZeRO 3, branch in one layer": (
        2,
        {"parallel__zero_stage": 3, "model": ONE_LAYER, "deepspeed": {"zero_optimization": NOTHING_KEPT}},
    ),
    "dp2, ZeRO 3, branch in one layer, some kept": (
        2,
        {
            "parallel__zero_stage": 3,
            "model": ONE_LAYER,
            "deepspeed": {"zero_optimization": {**NOTHING_KEPT, "stage3_param_persistence_threshold": 5000}},
        },
    ),
    "tp2, pp2, sequence, branch in one layer": (4, {**SEQUENCE, **STAGES, "model": ONE_LAYER}),
    "dp2, ZeRO 0": (2, {"parallel__zero_stage": 0}),
    "dp2, ZeRO 1": (2, {"parallel__zero_stage": 1}),
    "dp2, ZeRO 2": (2, {"parallel__zero_stage": 2}),
    "dp2, ZeRO 3": (2, {"parallel__zero_stage": 3, "deepspeed": {"zero_optimization": NOTHING_KEPT}}),
    "dp2, ZeRO 3, all kept, bf16": (
        2,
        {
            "parallel__zero_stage": 3,
            "train__precision": "bf16",
            "deepspeed": {"zero_optimization": {**BUCKET, "stage3_param_persistence_threshold": 100}},
        },
    ),
    "tp2, dp2, ZeRO 2": (4, {**TENSOR, "parallel__zero_stage": 2}),
    "tp2, pp2, sequence, recomputed": (4, {**SEQUENCE, **STAGES, "train__activation_checkpointing": True}),
}
QUICK = (
    "tp2, sequence, options, bf16",
    "pp2, documents, bf16",
    "dp2, ZeRO 1",
    "dp2, ZeRO 3",
    "pp2, branch on the first stage",
)


def _config(changes: dict) -> RunConfig:
    changes = {"deepspeed": {"zero_optimization": BUCKET}, **changes}
    return step_config(train__micro_batch_size=4, train__global_batch_size=16, **changes)


def _payloads(stage: StageEstimate) -> dict[tuple[str, str], float]:
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for transfer in stage.transfers:
        sums[transfer.group, transfer.kind] += transfer.payload
    return dict(sums)


def _allocated_in_a_step(config: RunConfig, layout: Layout, stage: StageEstimate) -> float:
    """The part of the estimate that a step allocates; the rest is there before."""
    memory = stage.memory
    if layout.zero_stage < 3:
        return memory.gradients + memory.activations + memory.workspace
    gathered = memory.model - 4 * stage.weights.count / layout.data
    bucket = 4 * config.deepspeed["zero_optimization"]["reduce_bucket_size"] if config.deepspeed else 0
    return gathered + memory.activations + memory.workspace - bucket


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else (pytest.mark.slow, pytest.mark.grid)) for c in LAYOUTS]
)
def test_steps_on_gloo(case: str) -> None:
    """Bytes by group and collective to the byte; activations and the peak of a step within 15 %."""
    world_size, changes = LAYOUTS[case]
    config = _config(changes)
    layout = Layout.of(config, world_size)
    stages = estimate(config, layout)
    per_micro_batch = activations(config, layout)
    steps = run_ranks(observe, world_size, config)
    for rank, step in enumerate(steps):
        stage = stages[rank // (layout.data * layout.tensor)]
        assert step.traffic == pytest.approx(_payloads(stage), rel=1e-6), f"rank {rank}"
        last = stage.stage == layout.pipeline - 1
        counts = stage.blocks[1] - stage.blocks[0], config.model.count_meta_layers(*stage.blocks)
        kept = per_micro_batch.kept(*counts, last=last, recompute=layout.checkpointing)
        peak = _allocated_in_a_step(config, layout, stage)
        print(f"{case}, rank {rank}: kept {kept:.0f} / {step.saved:.0f}, peak {peak:.0f} / {step.peak}")
        if not layout.checkpointing and layout.zero_stage < 3:  # ZeRO 3 saves gathered parameters, which come and go
            assert kept == pytest.approx(step.saved, rel=0.05)
        assert peak == pytest.approx(step.peak, rel=0.15)
