"""``megameta plan``: valid proposals that fit, in the order of the cost model, which is checked by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megameta.config import RunConfig, apply_overrides, assume, build_config, load_raw
from megameta.config.validate import problems
from megameta.errors import UserError
from megameta.model.flops import forward_flops
from megameta.plan.cost import Evaluation, Hardware, evaluate, group_bandwidth
from megameta.plan.describe import check_config
from megameta.plan.layout import Layout
from megameta.plan.planner import HEADROOM, Plan, layouts, plan, smallest_batch
from megameta.plan.report import make_plan, parse_memory
from tests.support.commands import run_command
from tests.support.paths import ROOT

PAPER, SMALL_B, LARGE_B = (
    str(ROOT / "configs" / name) for name in ("paper/meta-rope.yaml", "scale/1.3b.yaml", "scale/7b.yaml")
)
#: Nothing waits for a host or a switch, so that times are plain quotients.
PURE = Hardware(memory_bandwidth=1e30, latency=0.0, launch=0.0)


def read(path: str, overrides: list[str] | None = None) -> RunConfig:
    raw = load_raw(path, overrides)
    raw["model"].setdefault("max_position_embeddings", raw["data"]["sequence_length"])
    return assume(build_config(raw), "cuda")


def planned(path: str, gpus: int, *overrides: str, memory: float = 80e9) -> tuple[RunConfig, Plan]:
    config = read(path, list(overrides))
    return config, plan(config, gpus, memory, Hardware())


@pytest.mark.parametrize("gpus", [1, 8, 64, 1024])
@pytest.mark.parametrize("path", [PAPER, SMALL_B, LARGE_B], ids=["152M", "1.3B", "7B"])
def test_proposals_are_valid_and_fit(path: str, gpus: int) -> None:
    _, found = planned(path, gpus)
    assert found.best or (path, gpus) == (LARGE_B, 1)
    times = [evaluation.time.total for evaluation in found.best]
    assert times == sorted(times)
    for evaluation in found.best:
        layout = evaluation.layout
        assert layout.world_size == gpus
        assert evaluation.memory <= 80e9 * (1 - HEADROOM)
        config = build_config(apply_overrides(load_raw(path), layout.overrides()))
        assert problems(config, world_size=gpus, device="cuda") == []
        assert Layout.of(config, gpus) == layout  # what is to be pasted means this layout


def best(found: Plan) -> Layout:
    return found.best[0].layout


def test_what_an_expert_expects() -> None:
    _, one_node = planned(PAPER, 8)
    assert (best(one_node).tensor, best(one_node).pipeline) == (1, 1), "152 M on a node: plain data parallelism"
    assert not best(one_node).checkpointing
    _, single = planned(PAPER, 1)
    assert best(single).zero_stage == 0
    _, large = planned(LARGE_B, 64)
    first = best(large)
    assert first.zero_stage == 3 or first.tensor * first.pipeline > 1, "8.8 B do not fit a GPU"
    for path, gpus in ((PAPER, 1024), (SMALL_B, 1024), (LARGE_B, 1024)):
        _, wide = planned(path, gpus)
        assert all(evaluation.layout.tensor <= 8 for evaluation in wide.best)


def test_less_memory_means_more_sharding_or_recomputation() -> None:
    _, roomy = planned(LARGE_B, 64)
    _, tight = planned(LARGE_B, 64, memory=24e9)
    assert tight.num_fitting < roomy.num_fitting
    assert tight.best[0].time.total >= roomy.best[0].time.total
    assert all(evaluation.memory <= 24e9 for evaluation in tight.best)


def test_only_what_can_be_divided_is_tried() -> None:
    config = read(PAPER, ["model.num_key_value_heads=3"])
    assert {layout.tensor for layout in layouts(config, 12, 6)} == {1, 3}
    for layout in layouts(read(PAPER), 64, 8):
        assert layout.micro_batch_size * layout.data * layout.accumulation == 480
        assert layout.pipeline <= 12
        assert (layout.zero_stage == 1) or layout.pipeline == 1
        assert layout.sequence_parallel == (layout.tensor > 1)


def timed(layout: Layout, hardware: Hardware = PURE) -> Evaluation:
    return evaluate(read(PAPER), layout, hardware)


def test_compute_is_flops_over_the_rate() -> None:
    config = read(PAPER)
    whole = 3 * 480 * forward_flops(config.model, 1024, 102)
    one = timed(Layout(1, 1, 1, 0, False, 12, 40, False))
    assert one.time.compute == pytest.approx(whole / (989e12 * 0.6))
    assert one.time.communication == one.time.bubble == 0
    again = timed(Layout(1, 1, 1, 0, False, 12, 40, True))
    head = 480 * 2 * 1024 * 768 * 50258
    assert again.time.compute == pytest.approx((4 / 3 * (whole - 3 * head) + 3 * head) / (989e12 * 0.6))


def test_blocks_without_the_branch_cost_less() -> None:
    overrides = ["model.meta_layers=[0, 1, 2]"]
    config = read(PAPER, overrides)
    whole = 3 * 480 * forward_flops(config.model, 1024, 102)
    one = evaluate(config, Layout(1, 1, 1, 0, False, 12, 40, False), PURE)
    assert one.time.compute == pytest.approx(whole / (989e12 * 0.6))
    assert one.time.compute < timed(Layout(1, 1, 1, 0, False, 12, 40, False)).time.compute
    first = config.model_copy(update={"model": replace(config.model, meta_layers=(0, 1))})
    last = config.model_copy(update={"model": replace(config.model, meta_layers=(10, 11))})
    layout = Layout(1, 2, 1, 1, False, 12, 40, False)
    # The stage with the head is the slower one; branches elsewhere cost the step nothing.
    none = evaluate(read(PAPER, ["model.meta_attention=false"]), layout, PURE).time.compute
    times = [evaluate(each, layout, PURE) for each in (first, last)]
    assert [each.stages[1].blocks for each in times] == [(6, 12), (6, 12)]
    assert times[0].time.compute == pytest.approx(none) and times[1].time.compute > 1.001 * none


def test_communication_is_bytes_over_the_link() -> None:
    parameters = 4 * 151_908_096
    inside = timed(Layout(1, 1, 8, 0, False, 12, 5, False))
    assert inside.time.communication == pytest.approx(2 * 7 / 8 * parameters / 300e9)
    across = timed(Layout(1, 1, 32, 1, False, 15, 1, False))
    assert across.time.communication == pytest.approx((2 + 1) * 31 / 32 * parameters / 300e9)  # eight ports of 40 GB/s
    slow = timed(Layout(1, 1, 32, 1, False, 15, 1, False), replace(PURE, inter_bandwidth=10e9))
    assert slow.time.communication == pytest.approx((2 + 1) * 31 / 32 * parameters / 80e9)


def test_links() -> None:
    hardware = Hardware()
    assert hardware.bandwidth(1, 8) == 300e9
    assert hardware.bandwidth(8, 2) == 40e9, "one member a node: one port"
    assert hardware.bandwidth(2, 8) == 160e9, "four members a node"
    wide = Layout(8, 2, 4, 1, True, 1, 8, False)
    assert group_bandwidth("tensor", wide, hardware) == 300e9
    assert group_bandwidth("pipeline", wide, hardware) == 40e9


def test_bubble() -> None:
    found = timed(Layout(1, 2, 1, 1, False, 4, 120, False))
    slowest = (found.time.compute + found.time.communication) / 120
    assert found.time.bubble == pytest.approx(slowest, rel=0.02)  # one of 120 micro-batches of the slowest stage


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("80GB", 80e9), ("80 gb", 80e9), ("80", 80e9), ("79.6GiB", 79.6 * 2**30), ("0.5TB", 5e11)]
)
def test_sizes_of_memory(text: str, num_bytes: float) -> None:
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize("text", ["80 potatoes", "", "-3GB", "0GB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match="80GB"):
        parse_memory(text)


def run_plan(path: str, gpus: int, *, memory: str = "80GB", limit: int = 10, json_path: str | None = None, **hardware):
    return make_plan(
        read(path), [path], gpus=gpus, gpu_memory=memory, hardware=hardware, limit=limit, json_path=json_path
    )


def test_printed_table_and_json(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    assert run_plan(PAPER, 8, limit=3, json_path=str(target)) == 0
    out = capsys.readouterr().out
    record = json.loads(target.read_text())
    assert [row["layout"]["data"] for row in record["layouts"][:1]] == [8]
    assert len(record["layouts"]) == 3
    first = record["layouts"][0]
    assert first["memory"]["total"] == pytest.approx(sum(v for k, v in first["memory"].items() if k != "total"))
    assert f"train {PAPER} {' '.join(first['overrides'])}" in out
    rows = [line for line in out.splitlines() if re.match(r"\s*[123] ", line)]
    assert len(rows) == 3
    assert f"{1e3 * first['seconds']['total']:,.1f}" in rows[0]
    assert "200,000 steps" in out


def test_the_command_is_of_the_run_that_was_asked_about(capsys: pytest.CaptureFixture) -> None:
    """What was given stays in it, it starts as many processes, and validate lets it start."""
    given = ["train.precision=fp16", "data.sequence_length=512"]
    for gpus, start in ((8, "megameta train"), (32, "torchrun --nnodes 4 --nproc-per-node 8")):
        make_plan(
            read(PAPER, given), [PAPER, *given], gpus=gpus, gpu_memory="80GB", hardware={}, limit=99, json_path=None
        )
        out = capsys.readouterr().out
        command = out.strip().splitlines()[-1]
        assert command.strip().startswith(start) and " ".join(given) in command
        assert ("--nproc-per-node 8" in command) and ("--nproc-per-node 32" not in command)
        layouts = [line.split()[1:5] for line in out.splitlines() if re.match(r"\s*\d+ +\d+ ", line)]
        assert layouts and all(pipeline == "1" for _, pipeline, *_ in layouts), "fp16 does not run in pipelines"
        assert not [row for row in layouts if int(row[0]) > 1 and row[3] == "0"]


def test_nothing_fits(capsys: pytest.CaptureFixture) -> None:
    assert run_plan(LARGE_B, 1) == 1
    out = capsys.readouterr().out
    need = re.search(r"a GPU of (\d+) GB", out)
    assert need is not None
    assert run_plan(LARGE_B, 1, memory=f"{int(need.group(1)) + 1}GB") == 0, "the size that is named is enough"


def test_no_division(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(f"base: {PAPER}\ntrain: {{global_batch_size: 9, micro_batch_size: 1}}\n")
    assert run_plan(str(file), 64, gpus_per_node=1) == 1
    assert "train.global_batch_size=16" in capsys.readouterr().out
    assert smallest_batch(read(PAPER), 8, 8) is None


def test_a_better_global_batch_is_named(capsys: pytest.CaptureFixture) -> None:
    assert run_plan(PAPER, 64) == 0
    assert "train.global_batch_size=512 with tp 1 pp 1 dp 64" in capsys.readouterr().out


def test_hardware_is_checked() -> None:
    with pytest.raises(UserError, match="--efficiency"):
        run_plan(PAPER, 8, efficiency=1.5)
    with pytest.raises(UserError, match="--intra-bandwidth"):
        run_plan(PAPER, 8, intra_bandwidth=0.0)
    with pytest.raises(UserError, match="--gpus"):
        run_plan(PAPER, 0)


def test_config_check_prints_the_layout(capsys: pytest.CaptureFixture) -> None:
    overrides = ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2", "train.micro_batch_size=4"]
    assert check_config(read(PAPER, overrides), PAPER, gpus=16) == 0
    out = capsys.readouterr().out
    assert "stage 0  embedding, blocks 0–5: ranks [0–1] [2–3] [4–5] [6–7]" in out
    assert "stage 1  blocks 6–11, head: ranks [8–9]" in out
    for group in ("tensor", "pipeline", "data", "embedding"):
        assert re.search(rf"stage 0\s+{group}\s+[0-9.]+", out), group
    assert "rope, meta-attention on\n" in out
    assert check_config(read(PAPER, [*overrides, "model.meta_layers=[5, 0]"]), PAPER, gpus=16) == 0
    assert "rope, meta-attention in layers 0, 5\n" in capsys.readouterr().out
    assert (
        check_config(read(PAPER, []), PAPER, gpus=1024) == 1
    )  # 480 sequences for 1024 ranks: a problem, and no layout
    assert "not a multiple" in capsys.readouterr().out


def test_command_line(tmp_path: Path) -> None:
    command = ["plan", PAPER, "--gpus", "8", "--gpu-memory", "40GB", "--limit", "2", "--intra-bandwidth", "100"]
    done = run_command(tmp_path, "megameta", *command, "train.micro_batch_size=6")
    assert done.returncode == 0, done.stderr
    assert "8 GPUs of 40 GB" in done.stdout and "inside a node 100" in done.stdout
