"""``megameta config check``: every problem before anything is started, and what the run would be."""

import contextlib
import os

from megameta.config import RunConfig, assume
from megameta.config.deepspeed import zero_stage
from megameta.config.derived import data_parallel_size, step_flops
from megameta.config.validate import problems
from megameta.data.indexed import dataset_exists
from megameta.errors import EXIT_FAILURE, EXIT_OK, UserError
from megameta.model import GPT, ModelConfig
from megameta.model.shapes import on_meta_device, without_kernels
from megameta.plan.estimate import StageEstimate, estimate
from megameta.plan.layout import Layout
from megameta.plan.traffic import GROUPS, by_group


def check_config(config: RunConfig, path: str, *, gpus: int | None) -> int:
    """Print the run in a few lines, its problems and missing files; returns an exit code.

    Missing files are told but are no failure: a configuration is often checked far from its data.
    """
    world_size, device = (gpus, "cuda") if gpus else (1, "cpu")
    config = assume(config, device)
    found = problems(config, world_size=world_size, device=device)
    print("\n".join(describe(config, world_size)))
    with contextlib.suppress(UserError):  # a division that fails is among the problems
        print("\n".join(describe_layout(config, Layout.of(config, world_size))))
    for missing in missing_files(config):
        print(f"not there yet: {missing}")
    for problem in found:
        print(f"problem: {problem}")
    print(f"{path}: {'ok' if not found else f'{len(found)} problem(s)'} for {world_size} {device} process(es)")
    return EXIT_FAILURE if found else EXIT_OK


def describe(config: RunConfig, world_size: int) -> list[str]:
    """The run in a few lines."""
    with on_meta_device():
        model = GPT(without_kernels(config.model))
    parameters = sum(p.numel() for p in model.parameters())
    data, train = config.data, config.train
    ranks = data_parallel_size(config, world_size)
    text = train.global_batch_size * data.text_per_sample
    slots = train.global_batch_size * data.sequence_length
    return [
        f"model      {parameters / 1e6:,.1f} M parameters, {config.model.num_layers} layers of width"
        f" {config.model.hidden_size}, {config.model.position}, meta-attention {_branch(config.model)}",
        f"sequence   {data.sequence_length} slots: {data.text_per_sample} of text, {data.num_meta_tokens} meta-tokens",
        f"step       {train.global_batch_size} sequences = {train.micro_batch_size} ×"
        f" {train.global_batch_size / (train.micro_batch_size * ranks):g} accumulation × {ranks} ranks;"
        f" {slots:,} slots, {text:,} of text, {step_flops(config) / 1e12:,.1f} TFLOP",
        f"run        {train.num_steps:,} steps, {train.num_steps * slots / 1e9:,.2f} B slots,"
        f" {train.num_steps * text / 1e9:,.2f} B of text; {train.precision}, ZeRO {zero_stage(config, ranks)}",
    ]


def describe_layout(config: RunConfig, layout: Layout) -> list[str]:
    """Who sits where; parameters, memory and traffic of a rank, by stage. Estimated: docs/planning.md says how."""
    if layout.pipeline > config.model.num_layers:
        return []
    stages = estimate(config, layout)
    lines = [
        f"layout     {layout.world_size} ranks = pipeline {layout.pipeline} × data {layout.data}"
        f" × tensor {layout.tensor}, tensor fastest",
        *(_places(layout, stage) for stage in stages),
    ]
    if layout.pipeline > 1:
        lines.append(f"  bubble   {layout.bubble:.1%} of a step: {layout.accumulation} micro-batches, 1F1B")
    lines.append("memory     of a rank, estimated: parameters in M, the rest in GB")
    names = ["", "parameters", "model", "gradients", "optimizer", "activations", "workspace", "total"]
    rows = [names, *(_memory(stage) for stage in stages)]
    lines += ["  " + row[0].ljust(9) + " ".join(cell.rjust(11) for cell in row[1:]) for row in rows]
    lines.append("traffic    of a rank in a step, estimated, in GB: entering collectives; on the wire (ring)")
    return lines + [line for stage in stages for line in _traffic(stage)]


def _places(layout: Layout, stage: StageEstimate) -> str:
    """The ranks of a stage, those that share layers in one bracket; a replica each."""
    first = stage.stage * layout.data * layout.tensor
    groups = [range(first + d * layout.tensor, first + (d + 1) * layout.tensor) for d in range(layout.data)]
    shown = [str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}" for group in groups]
    if len(shown) > 10:
        shown = [*shown[:8], "…", shown[-1]]
    last = stage.stage == layout.pipeline - 1
    parts = ["embedding"] * (stage.stage == 0) + [_range(stage.blocks)] + ["head"] * last
    return f"  stage {stage.stage:<3}{', '.join(parts)}: ranks {' '.join(f'[{text}]' for text in shown)}"


def _range(blocks: tuple[int, int]) -> str:
    return f"block {blocks[0]}" if blocks[1] - blocks[0] == 1 else f"blocks {blocks[0]}–{blocks[1] - 1}"


def _memory(stage: StageEstimate) -> list[str]:
    memory = stage.memory
    parts = [memory.model, memory.gradients, memory.optimizer, memory.activations, memory.workspace, memory.total]
    return [f"stage {stage.stage}", f"{stage.weights.count / 1e6:,.2f}", *(f"{part / 1e9:,.3f}" for part in parts)]


def _traffic(stage: StageEstimate) -> list[str]:
    sums = by_group(stage.transfers)
    lines = []
    for group in (group for group in GROUPS if group in sums):
        payload, wire = sums[group]
        parts: dict[str, float] = {}
        for transfer in stage.transfers:
            if transfer.group == group:
                parts[transfer.kind] = parts.get(transfer.kind, 0.0) + transfer.payload
        kinds = ", ".join(f"{kind.replace('_', '-')} {size / 1e9:,.3f}" for kind, size in parts.items())
        lines.append(f"  stage {stage.stage:<3}{group:<10} {payload / 1e9:,.3f}; {wire / 1e9:,.3f}   ({kinds})")
    return lines or [f"  stage {stage.stage:<3}none"]


def missing_files(config: RunConfig) -> list[str]:
    """Datasets and tokenizer that the configuration names and that are not there."""
    prefixes = [
        (f"data.train.{name}" if name else "data.train", prefix)
        for name, part in config.data.sources.items()
        for prefix in part
    ]
    prefixes += [(f"data.valid.{name}", prefix) for name, part in config.data.valid.items() for prefix in part]
    missing = [f"{key}: {prefix}.bin and .idx" for key, prefix in prefixes if not dataset_exists(prefix)]
    if config.data.tokenizer and not os.path.exists(config.data.tokenizer):
        missing.append(f"data.tokenizer: {config.data.tokenizer}")
    return missing


def _branch(model: ModelConfig) -> str:
    if model.meta_layers is not None:
        layers = ", ".join(map(str, model.meta_layers))
        return f"in layer{'s' * (len(model.meta_layers) > 1)} {layers}"
    return "on" if model.meta_attention else "off"
