"""The logit boost: what the embedding of the meta-token does to attention, embedding zeroed against not (spec §6)."""

from typing import Any

from torch import Tensor

from megameta.paper.analysis.attention_numbers import attention_numbers
from megameta.paper.analysis.entropy import (
    PAPER_ENTROPY_DROP,
    PAPER_LARGEST_RISE,
    SECTION,
    by_head,
    by_layer,
    head_rows,
    layer_rows,
    overall,
)
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.observe import zeroed_meta_embedding
from megameta.paper.analysis.plots import BLACK, GREY, META, OTHER, TEXT, finish, line
from megameta.paper.analysis.registry import Options
from megameta.paper.analysis.subject import Subject

#: Name in ``reduce_attention`` → what its change is called.
CHANGES = {
    "meta_logit": "logit at meta keys",
    "text_logit": "logit at text keys",
    "largest": "largest logit of a query",
    "boosted_entropy": "entropy (nats)",
    "mass": "mass on meta keys",
}


def changes(subject: Subject, num_samples: int) -> dict[str, Tensor]:
    """As it is minus with the embedding zeroed, same sequences: (C, N, H) by name."""
    normal = attention_numbers(subject, num_samples)
    zeroed = attention_numbers(subject, num_samples, changed=zeroed_meta_embedding)
    return {name: normal[name] - zeroed[name] for name in CHANGES}


def boost(subject: Subject, options: Options) -> list[Finding]:
    """By layer, and by head against the change of entropy."""
    found = changes(subject, options.num_samples)
    twin = None
    if subject.twin is not None and subject.twin.has_meta_tokens:
        twin = changes(subject.twin, options.num_samples)
    return [_by_layer(subject, found, twin), _by_head(found)]


def _by_layer(subject: Subject, found: dict[str, Tensor], twin: dict[str, Tensor] | None) -> Finding:
    relative = found["meta_logit"] - found["text_logit"]
    layers = range(len(relative))
    per_layer = {name: by_layer(value) for name, value in found.items()}
    drop = by_layer(-found["boosted_entropy"])
    boosts = {
        "boost": overall(found["meta_logit"]),
        "relative": overall(relative),
        "largest": overall(found["largest"]),
        "drop": overall(-found["boosted_entropy"]),
    }
    top = int(found["largest"].mean(dim=(1, 2)).argmax())

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        line(left, layers, per_layer["meta_logit"], "at meta keys (boost Δ)", META, "-", "s")
        line(left, layers, per_layer["text_logit"], "at text keys", TEXT)
        line(left, layers, per_layer["largest"], "largest logit of the query", OTHER, "--", "^")
        left.axhline(PAPER_LARGEST_RISE, color=GREY, linestyle=":", label=f"the paper, largest: {PAPER_LARGEST_RISE}")
        line(right, layers, drop, "this model", META, "-", "s")
        right.axhline(PAPER_ENTROPY_DROP, color=GREY, linestyle=":", label=f"the paper: {PAPER_ENTROPY_DROP:.2f}")
        if twin is not None:
            line(left, layers, by_layer(twin["meta_logit"]), "twin, at meta keys", BLACK, ":", "x")
            line(right, layers, by_layer(-twin["boosted_entropy"]), "twin", BLACK, ":", "x")
        for axes, label in ((left, "change of the logit q·k/√K"), (right, "drop of entropy (nats)")):
            axes.axhline(0, color="black", linewidth=0.6)
            finish(axes, "layer", label, ticks=layers)

    named = {f"change of {label}": per_layer[name] for name, label in CHANGES.items()}
    named["boost relative to text keys"] = by_layer(relative)
    return Finding(
        name="boost",
        section=SECTION,
        title="The logit boost of meta-tokens",
        caption=(
            f"The same {relative.shape[1]} held-out sequences twice, as they are and with the token embedding of"
            " meta-tokens set to zero; as they are minus zeroed, causal branch, text queries that see a meta-token,"
            " mean over heads, bands are 95 % intervals over sequences. Left: logits. Adding one number to all logits"
            " of a query changes nothing, so that only the distance between meta and text keys counts:"
            f" {boosts['relative']} over all layers (at meta keys alone {boosts['boost']}). Right: how far the entropy"
            f" of the same queries falls. Mean over layers: largest logit {boosts['largest']}, entropy drop"
            f" {boosts['drop']} nats; the paper reports {PAPER_LARGEST_RISE} and {PAPER_ENTROPY_DROP:.2f} for its 152 M"
            " model. A model never saw zeros in that place: what is zeroed is not what is absent (the entropy figure"
            " takes meta-tokens away)."
        ),
        draw=draw,
        tables={"layers": layer_rows(named)},
        facts={
            "sequences": relative.shape[1],
            "boost at meta keys": str(boosts["boost"]),
            "boost relative to text keys": str(boosts["relative"]),
            "rise of the largest logit": str(boosts["largest"]),
            "rise of the largest logit, layer where it is largest": f"{per_layer['largest'][top]} (layer {top})",
            "rise of the largest logit of the paper": PAPER_LARGEST_RISE,
            "entropy drop (nats)": str(boosts["drop"]),
            "entropy drop of the paper (nats)": PAPER_ENTROPY_DROP,
        },
        size=(9.0, 4.6),
    )


def _by_head(found: dict[str, Tensor]) -> Finding:
    relative_CH = by_head(found["meta_logit"] - found["text_logit"])
    drop_CH = by_head(-found["boosted_entropy"])
    boosted, sharper = relative_CH > 0, drop_CH > 0
    counts = {
        "boosted and sharper": int((boosted & sharper).sum()),
        "boosted and flatter": int((boosted & ~sharper).sum()),
        "not boosted and sharper": int((~boosted & sharper).sum()),
        "not boosted and flatter": int((~boosted & ~sharper).sum()),
    }

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        layers, heads = relative_CH.shape
        layer_of_point = [layer for layer in range(layers) for _ in range(heads)]
        points = axes.scatter(
            relative_CH.flatten(), drop_CH.flatten(), c=layer_of_point, cmap="cividis", edgecolors="black", s=45
        )
        bar = figure.colorbar(points, ax=axes, label="layer")
        bar.set_ticks(range(0, layers, -(-layers // 12)))
        axes.axhline(0, color="black", linewidth=0.6)
        axes.axvline(0, color="black", linewidth=0.6)
        finish(axes, "boost: change of the logit at meta keys − at text keys", "drop of entropy (nats)", legend=False)

    return Finding(
        name="boost-heads",
        section=SECTION,
        title="Does a boosted head sharpen?",
        caption=(
            "One point a head: how much its logits at meta keys rise over those at text keys when the embedding is"
            " there and not zeroed, against how far its entropy falls; means over the sequences and queries of the"
            " figure by layer. A boost lowers entropy where attention already concentrates on the boosted keys and"
            f" raises it elsewhere (spec §6). Of {relative_CH.numel()} heads: "
            + ", ".join(f"{count} {name}" for name, count in counts.items())
            + "."
        ),
        draw=draw,
        tables={
            "heads": head_rows(
                {
                    "boost relative to text keys": relative_CH,
                    "entropy drop (nats)": drop_CH,
                    **{f"change of {label}": by_head(found[name]) for name, label in CHANGES.items()},
                }
            )
        },
        facts=counts,
        size=(6.5, 4.5),
    )
