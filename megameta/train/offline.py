"""``megameta evaluate``: held-out loss of a checkpoint or a HuggingFace export, in one process without DeepSpeed."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megameta.checkpoint import open_checkpoint
from megameta.cluster.launch import pick_device
from megameta.config import RunConfig, apply_overrides, build_config
from megameta.config.validate import validate
from megameta.engine.build import build_model
from megameta.engine.loss_module import LossModule, make_scores, sum_scores
from megameta.errors import UserError
from megameta.files import write_text_atomically
from megameta.parallel.topology import Topology
from megameta.train.evaluation import EvalResult, Evaluator, PositionResult


def evaluate(source: str, overrides: list[str], *, json_path: str | None = None, buckets: int = 0) -> int:
    """Print loss, perplexity and bits per byte on the sets of data.valid, with and without meta-tokens.

    Args:
        source: checkpoint, run directory, or HuggingFace export. A checkpoint brings its configuration; of an export
            data.valid and data.sequence_length must be given.
        overrides: values that replace those of the configuration, evaluation-time switches of the model included.
        buckets: also print loss and perplexity by position, in as many buckets (``Evaluator``); 0: not.
    """
    config, weights = load_source(source, overrides)
    if not config.data.valid and config.data.split is None:
        raise UserError("no held-out set is named: give data.valid=PREFIX, or data.valid={name: [PREFIX]}")
    device = pick_device(config.run.device)
    validate(config, world_size=1, device=device)
    module = LossModule(build_model(config, weights)).to(device).eval()
    evaluator = Evaluator(config, Topology(device=device), buckets)
    console = Console()
    results: dict[str, EvalResult] = {}
    positions: dict[str, list[PositionResult]] = {}
    score = partial(module, score=True, num_groups=buckets)
    with torch.no_grad(), console.status("evaluating"):
        for name in evaluator.sets:
            total, counts = sum_scores(score, evaluator.batches(name), evaluator.byte_counts, device, buckets)
            scores = make_scores(total.tolist(), counts)
            results[name] = EvalResult.of(scores)
            positions[name] = PositionResult.of(scores, config.data.text_per_sample)
    console.print(_table(source, results))
    if buckets:
        console.print(_position_table(source, positions))
    if json_path is not None:
        record: dict[str, Any] = {
            "source": source,
            "eval": {name: {**vars(result)} for name, result in results.items()},
        }
        for name in positions if buckets else ():
            record["eval"][name]["by_position"] = [vars(row) for row in positions[name]]
        write_text_atomically(Path(json_path), json.dumps(record, indent=1) + "\n")
    return 0


def load_source(source: str, overrides: list[str]) -> tuple[RunConfig, Mapping[str, torch.Tensor]]:
    """Configuration (with overrides) and weights of a checkpoint, a run or an export."""
    if (Path(source) / "config.json").is_file():
        from megameta.hf.importer import import_from_hf

        imported = import_from_hf(source)
        raw: dict[str, Any] = {
            "model": imported.config.to_dict(),
            "data": {"sequence_length": imported.config.max_position_embeddings, "tokenizer": imported.tokenizer_dir},
            "train": {"num_steps": 1},
            "optimizer": {"warmup_steps": 0},
        }
        weights: Mapping[str, torch.Tensor] = imported.tensors
    else:
        checkpoint = open_checkpoint(source)
        raw, weights = checkpoint.config.to_dict(), checkpoint.weights()
    # One process evaluates whatever layout the run had.
    raw["parallel"] = {}
    raw["analysis"] = {}
    raw.setdefault("train", {}).update(micro_batch_size=8, global_batch_size=8, precision="fp32")
    return build_config(apply_overrides(raw, overrides), source), weights


def _table(source: str, results: dict[str, EvalResult]) -> Table:
    table = Table(title=f"{source}: held-out text", caption="the same targets in every row of a set")
    for column in ("set", "loss (nats/token)", "perplexity", "bits/byte", "targets"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for name, result in results.items():
        bits = "–" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        table.add_row(name, f"{result.loss:.4f}", f"{result.perplexity:.2f}", bits, f"{result.targets:,}")
    return table


def _position_table(source: str, positions: dict[str, list[PositionResult]]) -> Table:
    caption = "position: tokens of text before the target"
    table = Table(title=f"{source}: by position in the sequence", caption=caption)
    for column in ("set", "positions", "loss (nats/token)", "perplexity", "targets"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for name, rows in positions.items():
        for number, row in enumerate(rows):
            loss = "–" if row.loss is None else f"{row.loss:.4f}"
            perplexity = "–" if row.perplexity is None else f"{row.perplexity:.2f}"
            places = f"{row.first:,}–{row.last:,}"
            table.add_row("" if number else name, places, loss, perplexity, f"{row.targets:,}")
    return table
