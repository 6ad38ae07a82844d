"""What a model card says of a run: from its configuration, its records and the audit of its data."""

import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megameta.checkpoint import Checkpoint
from megameta.config import RunConfig
from megameta.errors import UserError

#: What of the run's configuration stands in the model card.
_CARD_KEYS = {
    "model": ("meta_layers",),
    "data": ("sequence_length", "meta_token_fraction", "meta_token_placement", "document_mask", "reset_positions"),
    "train": ("num_steps", "global_batch_size", "precision"),
    "optimizer": ("lr", "min_lr", "warmup_steps", "schedule", "weight_decay"),
}
_AUDIT_SCHEMA = "megameta.audit.manifest/1"
#: Rows of the table of losses.
_ROWS = 10
CURVES_FILE = "loss.png"


def card_from_run(
    checkpoint: Checkpoint, source: Path, audit: Path | None = None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The card's sections and the files that they show; no paths but the last parts of the data's.

    Args:
        source: what the user named: the run's directory, or a checkpoint in it. metrics.jsonl is looked for there.
        audit: directory of tools/audit_corpus.py, or its manifest.json.

    Raises:
        UserError: the audit is none.
    """
    config = checkpoint.config
    trainer = checkpoint.trainer() if checkpoint.has_trainer else None
    records = list(_records(source, trainer.step if trainer is not None else None))
    losses = [record for record in records if _is_number(record.get("loss"))]
    evaluations = [record for record in records if record.get("eval")]
    card: dict[str, Any] = {"training": _training(config, checkpoint, losses)}
    limits = []
    prefixes = [Path(prefix).name for part in config.data.sources.values() for prefix in part]
    if prefixes:
        card["training_data"] = prefixes
    if audit is not None:
        card["audit_of_the_data"], found = _audit(audit)
        limits += found
    elif prefixes:
        limits.append(
            "No audit of the training data was given (`to-hf --audit`): copies, personal data and overlap with"
            " evaluation sets are unknown."
        )
    files = {}
    if len(losses) > 1:
        card["loss"] = f"![Loss by step]({CURVES_FILE})\n\n{_loss_table(losses, evaluations)}"
        files[CURVES_FILE] = _curves(losses, evaluations)
    if evaluations:
        card["evaluation"] = _evaluation(evaluations[-1])
    else:
        limits.append("It has not been evaluated on held-out text during training.")
    card["limits"] = limits
    return card, files


def _training(config: RunConfig, checkpoint: Checkpoint, losses: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if config.init.from_hf is not None:
        values["started from"] = f"{Path(config.init.from_hf).name} (HuggingFace)"
    elif config.init.from_checkpoint is not None:
        values["started from"] = f"{Path(config.init.from_checkpoint).name} (checkpoint)"
    if checkpoint.has_trainer:
        state = checkpoint.trainer()
        values |= {"steps": state.step, "slots seen, meta-tokens included": state.tokens}
        values["targets that counted"] = state.targets
        if config.finetune.directory is None:
            share = config.data.text_per_sample / config.data.sequence_length
            values["text tokens seen"] = round(state.tokens * share)
    if losses:
        values["training loss of the last step (nats)"] = losses[-1]["loss"]
    values |= {
        f"{section}.{key}": value
        for section, keys in _CARD_KEYS.items()
        for key in keys
        if (value := getattr(getattr(config, section), key)) is not None
    }
    return values


def _records(source: Path, last_step: int | None) -> Iterator[dict[str, Any]]:
    """Records of the run's metrics.jsonl up to the checkpoint's step; none where there is no such file."""
    candidates = [folder / "metrics.jsonl" for folder in (source, source.parent, source.parent.parent)]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if last_step is None or path is None:
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed while writing
        if record["step"] <= last_step:
            yield record


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# --- the audit ------------------------------------------------------------------------------------------------------


def _audit(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A table of what was audited, and what it leaves open."""
    directory = path if path.is_dir() else path.parent
    manifest = _read_json(directory / "manifest.json" if path.is_dir() else path)
    if manifest.get("schema") != _AUDIT_SCHEMA:
        raise UserError(f"{path} is no audit of tools/audit_corpus.py that this version reads ({_AUDIT_SCHEMA})")
    report = directory / "report.json"
    try:
        return _audit_table(manifest, _read_json(report) if report.is_file() else None)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is a damaged audit: {error!r}") from error


def _audit_table(manifest: dict[str, Any], found: dict[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    rows: dict[str, Any] = {}
    for entry in manifest["inputs"]:
        size = sum(file["bytes"] for file in entry["files"])
        rows[f"{entry['source']}: {Path(entry['path']).name}"] = f"{entry['documents']:,} documents, {size:,} bytes"
    rows["hash of all texts"] = manifest["corpus_hash"]
    limits = []
    if found is not None:
        copies = found["duplicates"]
        rows |= {f"copies, {kind}": copies[kind]["copies"] for kind in ("exact", "normalised", "near")}
        for name, told in (("secrets", "secrets"), ("personal", "personal data")):
            rows[f"documents with {told}"] = found["documents_with"][name]
        if found["filter"] is not None:
            rows["dropped by the filter"] = f"{found['filter']['dropped']:,} of {found['filter']['read']:,} documents"
        for name, result in (found["contamination"] or {}).get("sets", {}).items():
            rows[f"contaminated examples of {name}"] = f"{result['contaminated']:,} of {result['examples']:,}"
        if found["contamination"] is None:
            limits.append("The audit of the data looked for no overlap with evaluation sets (`--against`).")
    return rows, limits


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the audit {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


# --- losses ---------------------------------------------------------------------------------------------------------


def _loss_table(losses: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> str:
    """Mean training loss of as many equal parts of the run, and the held-out losses that fell into each."""
    sets = sorted({name for record in evaluations for name in record["eval"] if "loss" in record["eval"][name]})
    lines = [" | ".join(["| steps", "slots seen", "training loss", *sets]) + " |", "|---|" + "---:|" * (2 + len(sets))]
    rows = min(_ROWS, len(losses))
    for row in range(rows):
        part = losses[len(losses) * row // rows : len(losses) * (row + 1) // rows]
        first, last = part[0]["step"], part[-1]["step"]
        mean = sum(record["loss"] for record in part) / len(part)
        cells = [f"{first}–{last}" if first < last else f"{first}", f"{part[-1].get('tokens', 0):,}", f"{mean:.4f}"]
        for name in sets:
            found = [
                record["eval"][name]["loss"]
                for record in evaluations
                if first <= record["step"] <= last and _is_number(record["eval"].get(name, {}).get("loss"))
            ]
            cells.append(f"{found[-1]:.4f}" if found else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Losses in nats a target; training losses are means over the steps of a row."])


def _evaluation(record: dict[str, Any]) -> str:
    measures = list(dict.fromkeys(measure for result in record["eval"].values() for measure in result))
    paired = any(name.endswith("/no-meta") for name in record["eval"])
    without = " `/no-meta` is the same text without meta-tokens." if paired else ""
    lines = [
        f"On held-out text, at step {record['step']}.{without}\n",
        "| set | " + " | ".join(measure.replace("_", " ") for measure in measures) + " |",
        "|---|" + "---:|" * len(measures),
    ]
    for name, result in record["eval"].items():
        cells = [_shown(result.get(measure)) for measure in measures]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if _is_number(value) else "–"


def _curves(losses: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> bytes:
    """A small PNG: training loss by step, its mean of the last fiftieth of the run, held-out losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    axes = figure.add_subplot()
    steps, values = [record["step"] for record in losses], [record["loss"] for record in losses]
    window = max(1, len(values) // 50)
    means = [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]
    axes.plot(steps, values, color="#0072b2", alpha=0.3, linewidth=0.8)
    axes.plot(steps, means, color="#0072b2", linewidth=1.4, label="training")
    colours = ("#d55e00", "#009e73", "#cc79a7", "#e69f00")
    for name, colour in zip(sorted({name for record in evaluations for name in record["eval"]}), colours, strict=False):
        points = [
            (record["step"], record["eval"][name]["loss"])
            for record in evaluations
            if _is_number(record["eval"].get(name, {}).get("loss"))
        ]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1, label=name)
    axes.set(xlabel="step", ylabel="loss (nats a target)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
