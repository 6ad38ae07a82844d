"""The quickstart's report: Markdown and the loss curves of both models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta.config import RunConfig
from megameta.quickstart.claims import Claim
from megameta.quickstart.stages import StageTime, duration

Floats = npt.NDArray[np.float64]

#: Colours of the two models, apart for the colour-blind as well.
COLOURS = ("#0072b2", "#d55e00")


@dataclass(frozen=True)
class ModelResult:
    """One model: what it is called, its run's records and evaluation after the last step, its export's samples."""

    title: str
    config: RunConfig
    records: list[dict[str, Any]]
    evaluation: dict[str, dict[str, Any]]
    export_class: str
    samples: list[dict[str, str]]


@dataclass(frozen=True)
class Results:
    """All that the report says. ``entropy``: of the held-out targets' own frequencies, in nats."""

    facts: dict[str, str]
    models: dict[str, ModelResult]
    entropy: float
    claims: list[Claim]
    times: list[StageTime]
    commands: list[str]
    output: Path


def smooth(values: Floats, window: int) -> Floats:
    """Mean of each value with up to ``window`` - 1 before it, so that no point knows of later ones."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_losses(results: Results, path: Path) -> None:
    """Training loss (raw and smoothed) and evaluations of both models, and the unigram entropy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    axes = figure.add_subplot()
    text = 0
    for model, colour in zip(results.models.values(), COLOURS, strict=False):
        steps = [record for record in model.records if "loss" in record]
        x = np.array([record["step"] for record in steps])
        y = np.array([record["loss"] for record in steps])
        window = max(1, len(y) // 15)
        axes.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(x, smooth(y, window), color=colour, label=f"{model.title}: training (mean of {window} steps)")
        held_out = [(record["step"], record["eval"]["valid"]["loss"]) for record in model.records if "eval" in record]
        axes.plot(*zip(*held_out, strict=True), "o", color=colour, markeredgecolor="black", label="held out")
        text = model.config.train.global_batch_size * model.config.data.text_per_sample
    axes.axhline(results.entropy, color="grey", linestyle="--", label="unigram entropy of the held-out text")
    axes.set_xlabel(f"optimiser step ({text:,} text tokens each)")
    axes.set_ylabel("loss (nats per text token)")
    axes.set_title("Quickstart: with meta-attention and its twin without")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    work = path.with_name(f".{path.name}.writing")
    figure.savefig(work, format="png")
    work.replace(path)


def render_report(results: Results) -> str:
    """The report as Markdown; loss.png lies beside it."""
    parts = [
        "# Quickstart report",
        _summary(results),
        "![Loss of both models](loss.png)",
        "## What is claimed",
        "\n".join(f"- {'holds' if claim.holds else '**does not hold**'}: {claim.text}" for claim in results.claims),
        "## Held-out documents",
        _evaluations(results),
        "## Training",
        _training(results),
        "## What they write",
        _samples(results),
        "## Where the time went",
        _times(results.times),
        "## Machine and versions",
        table(["what", "value"], [[name, value] for name, value in results.facts.items()]),
        "## Commands",
        "```\n" + "\n".join(results.commands) + "\n```",
        "## Next steps",
        _next_steps(results),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the columns after the first are to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _summary(results: Results) -> str:
    failed = sum(not claim.holds for claim in results.claims)
    state = "All claims below hold." if not failed else f"**{failed} of {len(results.claims)} claims do not hold.**"
    return (
        f"{state} Two small models were trained on the Python standard library's own text: one with meta-tokens and"
        " meta-attention, and its twin for quality, which has neither and reads the same text in the same order.\n\n"
        "This shows that everything works from text to HuggingFace. Models this small, trained this briefly and with"
        " one seed, say nothing about whether meta-attention helps."
    )


def _evaluations(results: Results) -> str:
    rows = [["unigram entropy of the targets", f"{results.entropy:.4f}", f"{np.exp(results.entropy):.1f}", "", "", ""]]
    for model in results.models.values():
        for part, result in model.evaluation.items():
            note = ""
            if model.config.data.num_meta_tokens:
                note = ", read without meta-tokens" if part.endswith("/no-meta") else ", meta-tokens injected"
            bits = result["bits_per_byte"]
            rows.append(
                [
                    model.title + note,
                    f"{result['loss']:.4f}",
                    f"{result['perplexity']:.1f}",
                    "" if bits is None else f"{bits:.4f}",
                    f"{results.entropy - result['loss']:.3f}",
                    f"{result['targets']:,}",
                ]
            )
    head = ["model", "loss (nats)", "perplexity", "bits per byte", "nats below unigram", "targets"]
    return table(head, rows) + "\n\nDocuments that no model was trained on; every row is over the same targets."


def _training(results: Results) -> str:
    rows = []
    for model in results.models.values():
        config = model.config
        steps = [record for record in model.records if "loss" in record]
        last = steps[-min(10, len(steps)) :]
        rows.append(
            [
                model.title,
                f"{config.model.num_layers} × {config.model.hidden_size}",
                f"{config.data.text_per_sample} + {config.data.num_meta_tokens}",
                f"{len(steps)}",
                f"{sum(record['targets'] for record in steps):,}",
                f"{np.mean([record['loss'] for record in last]):.3f}",
                f"{np.median([record['tokens_per_second'] for record in steps]):,.0f}",
            ]
        )
    head = ["model", "layers × width", "text + meta per sequence", "steps", "targets", "last training loss"]
    return table([*head, "slots/s (median)"], rows)


def _samples(results: Results) -> str:
    parts = []
    for model in results.models.values():
        parts.append(f"**{model.title}** (`{model.export_class.rpartition('.')[2]}`)")
        parts += [f"{sample['kind']}:\n\n{_quoted(sample['text'])}" for sample in model.samples]
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    """A code block, which shows the text as it is."""
    return "\n".join("    " + line for line in text.splitlines()) or "    "


def _times(times: list[StageTime]) -> str:
    rows = [[time.title, duration(time.seconds)] for time in times]
    rows.append(["together", duration(sum(time.seconds for time in times))])
    return table(["stage", "m:ss"], rows)


def _next_steps(results: Results) -> str:
    output = results.output
    prompt = "--prompt 'def '"
    return "\n".join(
        [
            f"- Look at the runs: `tensorboard --logdir {output}/runs`; every step is a line in"
            f" `{output}/runs/*/metrics.jsonl`.",
            f"- Write with the model: `megameta generate {output}/hf/meta {prompt}`.",
            "- Train both longer, from the start: `python tools/quickstart.py train.num_steps=1000`.",
            "- A run of your own: `tools/preprocess_data.py --help`, then copy `configs/quickstart.yaml` and say what"
            " differs; `megameta config show FILE` shows every value. See docs/data.md and docs/training.md.",
            "- The paper's runs: `configs/paper/`, and `megameta config check FILE --gpus 8` before the queue.",
        ]
    )
