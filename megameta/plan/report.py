"""``megameta plan``: layouts that fit a number of GPUs, the fastest first by a stated cost model."""

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megameta.config import RunConfig, assume
from megameta.config.derived import step_flops
from megameta.errors import EXIT_FAILURE, EXIT_OK, UserError
from megameta.plan.cost import Evaluation, Hardware
from megameta.plan.estimate import worst
from megameta.plan.layout import Layout, stage_weights
from megameta.plan.planner import HEADROOM, Plan, plan, smallest_batch
from megameta.plan.traffic import GROUPS, by_group

#: Below this share of the peak a layout is called wasteful.
WASTEFUL = 0.2
#: How much faster a layout under another global batch must be to be worth a line.
CLEARLY = 1.1
_UNITS = {"": 1e9, "g": 1e9, "gb": 1e9, "gib": 2.0**30, "mb": 1e6, "mib": 2.0**20, "t": 1e12, "tb": 1e12}


def make_plan(
    config: RunConfig,
    words: list[str],
    *,
    gpus: int,
    gpu_memory: str,
    hardware: dict[str, float | None],
    limit: int,
    json_path: str | None,
) -> int:
    """Print the best layouts; returns an exit code.

    Args:
        words: configuration file and overrides, as the person gave them.
        hardware: values that replace the defaults of ``Hardware``, in its units; None leaves the default.
        json_path: also write the layouts there.
    """
    config = assume(config, "cuda")
    if gpus < 1 or limit < 1:
        raise UserError("--gpus and --limit: numbers of at least 1")
    memory = parse_memory(gpu_memory)
    machine = _hardware(config, hardware)
    found = plan(config, gpus, memory, machine)
    print(_heading(config, gpus, memory, machine))
    if json_path is not None:
        Path(json_path).write_text(json.dumps(_record(config, found, machine, gpus, memory, limit), indent=2) + "\n")
    if not found.best:
        print(why_nothing_fits(config, found, gpus, memory, machine))
        return EXIT_FAILURE
    print(_table(config, found.best[:limit], machine))
    print(_advice(config, words, found, machine, memory, limit))
    return EXIT_OK


def parse_memory(text: str) -> float:
    """Bytes of "80GB" (10⁹), "80GiB" (2³⁰) or "80".

    Raises:
        UserError: something else.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None or float(match.group(1)) == 0:
        raise UserError(f"--gpu-memory {text!r}: write it as 80GB (10⁹ bytes) or 80GiB (2³⁰)")
    return float(match.group(1)) * unit


def _hardware(config: RunConfig, given: dict[str, float | None]) -> Hardware:
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if "peak_flops" not in values:
        own = config.train.peak_tflops
        values["peak_flops"] = own * 1e12 if own is not None else Hardware.default_peak(config)
    for name, value in values.items():
        if value <= 0:
            raise UserError(f"--{name.replace('_', '-')}: more than 0")
    if values.get("efficiency", 1.0) > 1.0:
        raise UserError("--efficiency: a share of the peak, at most 1")
    return Hardware(**values)


def _heading(config: RunConfig, gpus: int, memory: float, machine: Hardware) -> str:
    model, train = config.model, config.train
    count = stage_weights(model, _single(config), (0, model.num_layers)).count
    return (
        f"{count / 1e6:,.1f} M parameters, {model.num_layers} layers of width {model.hidden_size},"
        f" {config.data.sequence_length} slots, {train.global_batch_size} sequences a step, {train.precision}\n"
        f"{gpus} GPUs of {memory / 1e9:g} GB, {machine.gpus_per_node} a node; {HEADROOM:.0%} of the memory left free\n"
        f"cost model: {machine.peak_flops / 1e12:g} TFLOP/s at {machine.efficiency:g},"
        f" memory {machine.memory_bandwidth / 1e9:g}, inside a node {machine.intra_bandwidth / 1e9:g},"
        f" between nodes {machine.inter_bandwidth / 1e9:g} GB/s a GPU; nothing overlaps (docs/planning.md)"
    )


def _single(config: RunConfig) -> Layout:
    return Layout(1, 1, 1, 0, False, 1, config.train.global_batch_size, False)


_COLUMNS = [
    *("#", "tp", "pp", "dp", "ZeRO", "micro", "accum", "recompute", "|"),
    *("GB", "=", "model", "grads", "optim", "activ", "work", "|"),
    *("ms/step", "compute", "comm", "bubble", "|", "tokens/s/GPU", "%", "days"),
]


def _table(config: RunConfig, best: list[Evaluation], machine: Hardware) -> str:
    rows = [_COLUMNS]
    for number, found in enumerate(best, 1):
        layout, memory, time = found.layout, worst(found.stages).memory, found.time
        places = [number, layout.tensor, layout.pipeline, layout.data, layout.zero_stage, layout.micro_batch_size]
        row = [*map(str, places), str(layout.accumulation), "yes" if layout.checkpointing else "no"]
        parts = [memory.model, memory.gradients, memory.optimizer, memory.activations, memory.workspace]
        row += ["|", f"{memory.total / 1e9:.1f}", "=", *(f"{part / 1e9:.1f}" for part in parts), "|"]
        row += [f"{1e3 * t:,.1f}" for t in (time.total, time.compute, time.communication, time.bubble)]
        row += ["|", f"{_speed(config, found):,.0f}", f"{100 * utilisation(config, found, machine):.0f}"]
        rows.append([*row, f"{_days(config, found):.2f}"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(" ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def _speed(config: RunConfig, found: Evaluation) -> float:
    """Slots a second and GPU."""
    step = config.train.global_batch_size * config.data.sequence_length
    return step / found.time.total / found.layout.world_size


def utilisation(config: RunConfig, found: Evaluation, machine: Hardware) -> float:
    """Model flops over what the peak allows in the time of a step."""
    return step_flops(config) / (found.time.total * found.layout.world_size * machine.peak_flops)


def _days(config: RunConfig, found: Evaluation) -> float:
    return config.train.num_steps * found.time.total / 86400


def _advice(config: RunConfig, given: list[str], found: Plan, machine: Hardware, memory: float, limit: int) -> str:
    best = found.best[0]
    more = len(found.best) - limit
    lines = [
        f"{found.num_fitting:,} of {found.num_considered:,} layouts fit; shown: the fastest of each tp, pp and ZeRO"
        + (f"; {more} more with --limit" if more > 0 else ""),
        f"% is of the GPUs' peak; days: {config.train.num_steps:,} steps; recompute: activation checkpointing;"
        + " tp > 1 runs sequence parallel" * any(e.layout.sequence_parallel for e in found.best[:limit]),
    ]
    if (note := _other_batch(config, best, machine, memory)) is not None:
        lines.append(note)
    elif utilisation(config, best, machine) < WASTEFUL:
        lines.append(
            f"note: {config.train.global_batch_size} sequences a step are few for {best.layout.world_size} GPUs: larger"
            " steps (and a schedule to match) or fewer GPUs would use them better"
        )
    return "\n".join([*lines, "for number 1:", f"  {_command(given, best.layout, int(machine.gpus_per_node))}"])


def _command(given: list[str], layout: Layout, per_node: int) -> str:
    """A shell command that trains under the layout; what was given stays in it."""
    words = shlex.join(["train", *given, *layout.overrides()])
    if layout.world_size <= per_node:
        return f"megameta {words} --nproc-per-node {layout.world_size}"
    nodes = f"--nnodes {-(-layout.world_size // per_node)} --nproc-per-node {per_node}"
    return f"torchrun {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m megameta {words}"


def _other_batch(config: RunConfig, best: Evaluation, machine: Hardware, memory: float) -> str | None:
    """Whether the next multiple of the number of GPUs as global batch allows a layout that is clearly faster a GPU."""
    gpus, batch = best.layout.world_size, config.train.global_batch_size
    rounded = -(-batch // gpus) * gpus
    if rounded == batch:
        return None
    train = config.train.model_copy(update={"global_batch_size": rounded})
    other = config.model_copy(update={"train": train})
    found = plan(other, gpus, memory, machine).best
    if not found or _speed(other, found[0]) < CLEARLY * _speed(config, best):
        return None
    layout = found[0].layout
    return (
        f"note: {batch} sequences cannot be shared by {gpus} data-parallel ranks; train.global_batch_size={rounded}"
        f" with tp {layout.tensor} pp {layout.pipeline} dp {layout.data} ZeRO {layout.zero_stage} would give"
        f" {_speed(other, found[0]):,.0f} tokens/s/GPU ({100 * utilisation(other, found[0], machine):.0f} %)"
    )


def why_nothing_fits(config: RunConfig, found: Plan, gpus: int, memory: float, machine: Hardware) -> str:
    """What is in the way, and the nearest thing that would do."""
    batch = config.train.global_batch_size
    if found.leanest is None:
        nearest = smallest_batch(config, gpus, machine.gpus_per_node)
        return (
            f"no layout: train.global_batch_size {batch} cannot be shared by any division of {gpus} GPUs;"
            f" {nearest} can: train.global_batch_size={nearest}"
        )
    need = found.leanest.memory
    return (
        f"no layout fits {memory / 1e9:g} GB: of {found.num_considered:,} the leanest needs {need / 1e9:.1f} GB a GPU,"
        f" so a GPU of {need / (1 - HEADROOM) / 1e9:.0f} GB, or more GPUs; it is\n"
        f"  {' '.join(found.leanest.layout.overrides())}"
    )


def _record(config: RunConfig, found: Plan, machine: Hardware, gpus: int, memory: float, limit: int) -> dict[str, Any]:
    shown = found.best[:limit]
    return {
        "gpus": gpus,
        "gpu_memory": memory,
        "headroom": HEADROOM,
        "hardware": asdict(machine),
        "layouts_considered": found.num_considered,
        "layouts_fitting": found.num_fitting,
        "leanest_bytes": found.leanest.memory if found.leanest is not None else None,
        "layouts": [_layout_record(config, evaluation, machine) for evaluation in shown],
    }


def _layout_record(config: RunConfig, found: Evaluation, machine: Hardware) -> dict[str, Any]:
    stage = worst(found.stages)
    traffic = by_group(stage.transfers)
    return {
        "layout": asdict(found.layout),
        "overrides": found.layout.overrides(),
        "memory": {**asdict(stage.memory), "total": stage.memory.total},
        "seconds": {**asdict(found.time), "total": found.time.total},
        "bytes_a_step": {g: {"payload": traffic[g][0], "wire": traffic[g][1]} for g in GROUPS if g in traffic},
        "utilisation": utilisation(config, found, machine),
        "days": _days(config, found),
    }
