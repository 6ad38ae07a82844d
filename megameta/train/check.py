"""``megameta config check``: every problem before anything is started, and what the run would be."""

import os

import torch

from megameta.config import RunConfig
from megameta.data.indexed import dataset_exists
from megameta.errors import EXIT_FAILURE, EXIT_OK, UserError
from megameta.model import GPT
from megameta.train.deepspeed_config import deepspeed_config
from megameta.train.metrics import step_flops
from megameta.train.setup import load_run_config
from megameta.validate import data_parallel_size, problems


def check_config(path: str, overrides: list[str], *, gpus: int | None) -> int:
    """Print the run in a few lines, its problems and missing files; returns an exit code.

    Missing files are told but are no failure: a configuration is often checked far from its data.
    """
    config = load_run_config(path, overrides, need_files=False)
    world_size, device = (gpus, "cuda") if gpus else (1, "cpu")
    found = problems(config, world_size=world_size, device=device)
    try:
        deepspeed_config(config, 1)
    except UserError as error:
        found.append(str(error))
    print("\n".join(describe(config, world_size)))
    for missing in missing_files(config):
        print(f"not there yet: {missing}")
    for problem in found:
        print(f"problem: {problem}")
    print(f"{path}: {'ok' if not found else f'{len(found)} problem(s)'} for {world_size} {device} process(es)")
    return EXIT_FAILURE if found else EXIT_OK


def describe(config: RunConfig, world_size: int) -> list[str]:
    """The run in a few lines."""
    with torch.device("meta"):
        model = GPT(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    data, train = config.data, config.train
    ranks = data_parallel_size(config, world_size)
    text = train.global_batch_size * data.text_per_sample
    slots = train.global_batch_size * data.sequence_length
    return [
        f"model      {parameters / 1e6:,.1f} M parameters, {config.model.num_layers} layers of width"
        f" {config.model.hidden_size}, {config.model.position}, meta-attention {_on(config.model.meta_attention)}",
        f"sequence   {data.sequence_length} slots: {data.text_per_sample} of text, {data.num_meta_tokens} meta-tokens",
        f"step       {train.global_batch_size} sequences = {train.micro_batch_size} ×"
        f" {train.global_batch_size / (train.micro_batch_size * ranks):g} accumulation × {ranks} ranks;"
        f" {slots:,} slots, {text:,} of text, {step_flops(config) / 1e12:,.1f} TFLOP",
        f"run        {train.num_steps:,} steps, {train.num_steps * slots / 1e9:,.2f} B slots,"
        f" {train.num_steps * text / 1e9:,.2f} B of text; {train.precision}, ZeRO {config.parallel.zero_stage}",
    ]


def missing_files(config: RunConfig) -> list[str]:
    """Datasets and tokenizer that the configuration names and that are not there."""
    prefixes = [("data.train", prefix) for prefix in config.data.train]
    prefixes += [(f"data.valid.{name}", prefix) for name, part in config.data.valid.items() for prefix in part]
    missing = [f"{key}: {prefix}.bin and .idx" for key, prefix in prefixes if not dataset_exists(prefix)]
    if config.data.tokenizer and not os.path.exists(config.data.tokenizer):
        missing.append(f"data.tokenizer: {config.data.tokenizer}")
    return missing


def _on(flag: bool) -> str:
    return "on" if flag else "off"
