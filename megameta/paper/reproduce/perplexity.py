"""Held-out perplexity of the pre-trained twins, over the same text targets."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megameta.paper.reproduce import paper
from megameta.paper.reproduce.arms import ARMS, COMPARISONS
from megameta.paper.reproduce.figures import COLOURS, draw_lines
from megameta.paper.reproduce.results import read_json
from megameta.paper.reproduce.runs import Experiment, step_count, training_flops
from megameta.quickstart.report import table
from megameta.statistics import half_width
from megameta.train.metrics import read_metrics


@dataclass(frozen=True)
class Perplexity:
    """One evaluation of one model.

    Attributes:
        injected: meta-tokens stand in the text.
        loss: nats a text token.
        by_position: (first position, last position, loss) of each bucket.
    """

    arm: str
    seed: int
    injected: bool
    loss: float
    perplexity: float
    bits_per_byte: float | None
    targets: int
    by_position: tuple[tuple[int, int, float], ...]


def perplexity_values(experiment: Experiment) -> list[Perplexity]:
    found = []
    for seed in experiment.scale.seeds:
        for arm in experiment.scale.arms:
            if not experiment.has(f"ppl/{arm}/{seed}"):
                continue
            results = read_json(experiment.scores("ppl", arm, seed))["eval"]
            for name, result in results.items():
                injected = ARMS[arm].meta_tokens and not name.endswith("/no-meta")
                numbers = (result["loss"], result["perplexity"], result["bits_per_byte"], result["targets"])
                buckets = tuple((b["first"], b["last"], b["loss"]) for b in result["by_position"] if b["targets"])
                found.append(Perplexity(arm, seed, injected, *numbers, buckets))
    return found


def perplexity_parts(values: list[Perplexity], experiment: Experiment, directory: Path) -> list[str]:
    """Tables: perplexity by model, differences of losses by seed."""
    rows = [row for arm in experiment.scale.arms for row in _rows(values, experiment, arm)]
    for name, value in paper.PERPLEXITY.items():
        title = ARMS[name].title if name in ARMS else name.capitalize()
        rows.append([f"*{title}, the paper on PG19*", str(value), *[""] * 5])
    head = [
        "model",
        "perplexity",
        "loss (nats)",
        "bits per byte",
        "text tokens trained on (M)",
        "training flops",
        "targets",
    ]
    counts = {value.targets for value in values}
    same = "the same" if len(counts) == 1 else "**different**"
    listed = ", ".join(f"{count:,}" for count in sorted(counts))
    parts = [
        f"Held-out documents, text positions alone, {same} targets in all rows ({listed}). Models were trained on the"
        " same text in the same order, those of equal compute on more of it.",
        table(head, rows),
    ]
    differences = [line for first, second, cause in COMPARISONS if (line := _difference(values, first, second, cause))]
    if differences:
        note = (
            "Paired by seed, Student's t"
            if len({value.seed for value in values}) > 1
            else "One seed: no interval, and nothing is claimed"
        )
        head = ["what it is due to", "nats a token, 95 % interval over seeds", "seeds"]
        parts += ["## Differences of the loss", table(head, differences)]
        parts.append(f"Meta-tokens injected where the model has them; below 0 the first is better. {note}.")
    return [*parts, "## By position", *_positions(values, experiment, directory)]


def _rows(values: list[Perplexity], experiment: Experiment, arm: str) -> list[list[str]]:
    """Of one model: with meta-tokens in the text where it has them, and without."""
    seeds = [value.seed for value in values if value.arm == arm]
    if not seeds:
        return []
    raw = experiment.pretraining(ARMS[arm], seeds[0])
    seen, flops = _text_tokens(experiment, arm, seeds[0]), training_flops(raw, step_count(raw))
    rows = []
    for injected, note in ((True, ", meta-tokens injected"), (False, ", read without meta-tokens")):
        found = [value for value in values if value.arm == arm and value.injected == injected]
        if not found:
            continue
        bits = [value.bits_per_byte for value in found if value.bits_per_byte is not None]
        rows.append(
            [
                ARMS[arm].title + (note if ARMS[arm].meta_tokens else ""),
                _spread([value.perplexity for value in found], ".2f"),
                _spread([value.loss for value in found], ".4f"),
                _spread(bits, ".4f") if bits else "–",
                f"{seen / 1e6:.3f}",
                f"{flops:.3g}",
                f"{found[0].targets:,}",
            ]
        )
    return rows


def _positions(values: list[Perplexity], experiment: Experiment, directory: Path) -> list[str]:
    """Perplexity by the number of text tokens before the target: a table and a picture; means over seeds of losses."""
    rows, lines = [], []
    buckets = values[0].by_position
    for arm in experiment.scale.arms:
        found = [value for value in values if value.arm == arm and value.injected == ARMS[arm].meta_tokens]
        if not found:
            continue
        losses = [fmean(value.by_position[i][2] for value in found) for i in range(len(buckets))]
        rows.append([ARMS[arm].title, *[f"{math.exp(loss):.2f}" for loss in losses]])
        points = [((first + last) / 2, math.exp(loss)) for (first, last, _), loss in zip(buckets, losses, strict=True)]
        lines.append((ARMS[arm].title, COLOURS[arm], "-", points))
    title = "Held-out perplexity by position"
    draw_lines(directory / "by-position.png", title, "text tokens before the target", "perplexity", lines)
    head = ["perplexity at positions", *[f"{first} – {last}" for first, last, _ in buckets]]
    return ["![Perplexity by position](by-position.png)", table(head, rows)]


def _difference(values: list[Perplexity], first: str, second: str, cause: str) -> list[str] | None:
    def losses(arm: str) -> dict[int, float]:
        return {v.seed: v.loss for v in values if v.arm == arm and v.injected == ARMS[arm].meta_tokens}

    a, b = losses(first), losses(second)
    found = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if not found:
        return None
    shown = f"{fmean(found):+.4f}"
    if len(found) > 1:
        mean = fmean(found)
        half = half_width(found)
        shown += f" [{mean - half:+.4f}, {mean + half:+.4f}]"
    return [f"{cause}: {first} − {second}", shown, str(len(found))]


def _spread(values: list[float], form: str) -> str:
    if len(values) == 1:
        return format(values[0], form)
    return f"{format(fmean(values), form)} ({format(min(values), form)} – {format(max(values), form)})"


def _text_tokens(experiment: Experiment, arm: str, seed: int) -> float:
    records = read_metrics(experiment.run_dir("pretrain", arm, seed) / "metrics.jsonl")
    return sum(record.get("targets", 0) for record in records)
