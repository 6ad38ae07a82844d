"""Entropy of the same text queries with and without meta-tokens in the sequence (spec §6, sharpening)."""

import math
from typing import Any

from torch import Tensor

from megameta.paper.analysis.attention_numbers import attention_numbers
from megameta.paper.analysis.estimates import Estimate, estimate
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.plots import BLACK, GREY, META, OTHER, TEXT, finish, heat, line, number_ticks
from megameta.paper.analysis.registry import Options
from megameta.paper.analysis.subject import Subject

#: What the paper reports for its 152 M model (spec §6): mean drop of entropy (nats), mean rise of the largest logit.
PAPER_ENTROPY_DROP, PAPER_LARGEST_RISE = 1.40, 1.26
SECTION = "Attention"


def by_layer(value_CNH: Tensor) -> list[Estimate]:
    """Mean over heads, then over sequences with an interval, of every layer."""
    return [estimate(value_NH.mean(dim=-1)) for value_NH in value_CNH]


def overall(value_CNH: Tensor) -> Estimate:
    """Mean over layers and heads, then over sequences."""
    return estimate(value_CNH.mean(dim=(0, 2)))


def by_head(value_CNH: Tensor) -> Tensor:
    """Mean over sequences, (C, H)."""
    return value_CNH.nanmean(dim=1)


def layer_rows(named: dict[str, list[Estimate]]) -> list[dict[str, Any]]:
    """A row a layer of estimates by layer."""
    rows: list[dict[str, Any]] = [{"layer": layer} for layer in range(len(next(iter(named.values()))))]
    for name, values in named.items():
        for row, value in zip(rows, values, strict=True):
            row.update(value.columns(name))
    return rows


def head_rows(columns: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A row a layer and head of (C, H) columns."""
    layers, heads = next(iter(columns.values())).shape
    return [
        {"layer": layer, "head": head, **{name: float(value[layer, head]) for name, value in columns.items()}}
        for layer in range(layers)
        for head in range(heads)
    ]


def entropy(subject: Subject, options: Options) -> list[Finding]:
    """Entropy by layer, and its drop by head."""
    inside = attention_numbers(subject, options.num_samples)
    alone = attention_numbers(subject, options.num_samples, meta_tokens=False)
    twin = None
    if subject.twin is not None:
        twin = attention_numbers(subject.twin, options.num_samples, meta_tokens=False)
    return [_by_layer(subject, inside, alone, twin), _by_head(subject, inside, alone)]


def _by_layer(
    subject: Subject, inside: dict[str, Tensor], alone: dict[str, Tensor], twin: dict[str, Tensor] | None
) -> Finding:
    curves = {
        "without meta-tokens": (by_layer(alone["entropy"]), TEXT, "-", "o"),
        "with meta-tokens": (by_layer(inside["entropy"]), META, "-", "s"),
        "with them, text keys alone": (by_layer(inside["text_entropy"]), OTHER, "--", "^"),
    }
    normalised = {
        "without meta-tokens": (by_layer(alone["normalised"]), TEXT, "-", "o"),
        "with meta-tokens": (by_layer(inside["normalised"]), META, "-", "s"),
    }
    if twin is not None:
        curves["twin, without meta-tokens"] = (by_layer(twin["entropy"]), BLACK, ":", "x")
        normalised["twin, without meta-tokens"] = (by_layer(twin["normalised"]), BLACK, ":", "x")
    uniform = {"without": float(alone["uniform"].nanmean()), "with": float(inside["uniform"].nanmean())}
    drop_CNH = alone["entropy"] - inside["entropy"]
    drop = overall(drop_CNH)
    normalised_drop = overall(alone["normalised"] - inside["normalised"])

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for axes, shown in ((left, curves), (right, normalised)):
            for label, (values, colour, style, marker) in shown.items():
                line(axes, range(len(values)), values, label, colour, style, marker)
        layers = range(subject.config.model.num_layers)
        left.axhline(uniform["with"], color=GREY, linewidth=1, label="uniform attention, with meta-tokens")
        finish(left, "layer", "entropy of a text query (nats)", ticks=layers)
        finish(right, "layer", "entropy / ln(number of visible keys)", ticks=layers)

    named = {f"{name} (nats)": values for name, (values, *_) in curves.items()}
    named |= {f"{name} (normalised)": values for name, (values, *_) in normalised.items()}
    named["drop (nats)"] = by_layer(drop_CNH)
    return Finding(
        name="entropy",
        section=SECTION,
        title="Entropy of text queries, with and without meta-tokens",
        caption=(
            f"Causal attention of the same text tokens of {inside['entropy'].shape[1]} held-out sequences, read with"
            f" {subject.form.num_meta_tokens} meta-tokens among {subject.form.text_per_sample} tokens of text and"
            " without; mean over heads and queries that see at least two text keys, bands are 95 % intervals over"
            " sequences. With meta-tokens a query has more keys, so that its entropy may rise for that alone: the right"
            " panel divides by the logarithm of the number of keys, and the dashed line is the entropy of the attention"
            f" to text keys alone, renormalised. Drop, mean over layers: {drop} nats (positive: meta-tokens sharpen);"
            f" normalised {normalised_drop}. The paper reports {PAPER_ENTROPY_DROP:.2f} nats for its 152 M model, by"
            " another comparison (see the boost figure)."
        ),
        draw=draw,
        tables={"layers": layer_rows(named)},
        facts={
            "sequences": inside["entropy"].shape[1],
            "entropy drop (nats)": str(drop),
            "entropy drop, normalised": str(normalised_drop),
            "entropy drop of the paper (nats)": PAPER_ENTROPY_DROP,
            "uniform attention, without meta-tokens (nats)": uniform["without"],
            "uniform attention, with meta-tokens (nats)": uniform["with"],
            "rise from more keys alone, at most (nats)": math.log(
                subject.form.sequence_length / subject.form.text_per_sample
            ),
        },
        size=(9.0, 4.6),
    )


def _by_head(subject: Subject, inside: dict[str, Tensor], alone: dict[str, Tensor]) -> Finding:
    drop_CH = by_head(alone["entropy"] - inside["entropy"])
    normalised_CH = by_head(alone["normalised"] - inside["normalised"])
    layers, heads = drop_CH.shape
    most = divmod(int(drop_CH.argmax()), heads)

    def draw(figure: Any) -> None:
        for axes, value, label in zip(
            figure.subplots(1, 2),
            (drop_CH, normalised_CH),
            ("drop of entropy (nats)", "drop of entropy / ln(keys)"),
            strict=True,
        ):
            heat(figure, axes, value.T.numpy(), label, diverging=True)
            axes.set_xlabel("layer")
            axes.set_ylabel("head")
            number_ticks(axes.xaxis, range(layers))
            number_ticks(axes.yaxis, range(heads))

    return Finding(
        name="entropy-heads",
        section=SECTION,
        title="Which heads sharpen",
        caption=(
            "Entropy of text queries without meta-tokens minus with them, by layer and head; the sequences and queries"
            " are those of the figure by layer. Red: the head is sharper with meta-tokens; blue: flatter. The largest"
            f" drop is {float(drop_CH.max()):.3f} nats (layer {most[0]}, head {most[1]}); {int((drop_CH > 0).sum())} of"
            f" {drop_CH.numel()} heads are sharper, {int((normalised_CH > 0).sum())} after normalisation."
        ),
        draw=draw,
        tables={
            "heads": head_rows(
                {
                    "without (nats)": by_head(alone["entropy"]),
                    "with (nats)": by_head(inside["entropy"]),
                    "drop (nats)": drop_CH,
                    "drop (normalised)": normalised_CH,
                }
            )
        },
        facts={"heads": drop_CH.numel(), "heads that are sharper": int((drop_CH > 0).sum())},
        size=(9.0, 3.8),
    )
