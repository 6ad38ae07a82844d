"""How much attention meta-tokens receive, by layer and by distance, against their share of the keys.

Letters: B batch, N sequences, T query rows, S key rows, H heads, C layers, X bins of distance.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megameta.paper.analysis.attention_numbers import Rows, attention_numbers, batch_size, is_meta_of
from megameta.paper.analysis.distances import bin_labels, bin_of_pairs, num_bins, sum_by_bin
from megameta.paper.analysis.entropy import SECTION, by_layer, overall
from megameta.paper.analysis.estimates import Estimate, estimate
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.observe import Attended, observed_attention
from megameta.paper.analysis.plots import BLACK, GREY, META, finish, heat, line, number_ticks
from megameta.paper.analysis.registry import Options
from megameta.paper.analysis.subject import Subject


@dataclass(frozen=True)
class MassByDistance:
    """Of text queries that see a meta-token, float64 each.

    Attributes:
        meta_CNX: mean over queries and heads of the probability on meta keys at this distance. The bins add up to the
            whole mass.
        text_CNX: the same of text keys; the query's own key (distance 0) is in no bin.
        share_NX: mean over queries of meta keys at this distance over all visible keys: uniform attention.
        meta_keys_NX, text_keys_NX: keys at this distance a query, mean.
    """

    meta_CNX: Tensor
    text_CNX: Tensor
    share_NX: Tensor
    meta_keys_NX: Tensor
    text_keys_NX: Tensor


def mass_by_distance(subject: Subject, num_samples: int) -> MassByDistance:
    """Over held-out sequences, causal branch."""
    bins = num_bins(subject.form.sequence_length)
    parts: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for batch in subject.held_out(num_samples, batch_size=batch_size(subject)):
            is_meta_BT = is_meta_of(subject, batch)
            layers: list[dict[str, Tensor]] = []

            def see(seen: Attended, is_meta_BT: Tensor = is_meta_BT, layers: list = layers) -> None:
                layers.append(_of_layer(seen, is_meta_BT, bins))

            with observed_attention(subject.model, see):
                subject.hidden_states(batch)
            stacked = {name: torch.stack([layer[name] for layer in layers]).cpu() for name in ("meta", "text")}
            parts.append(stacked | {name: layers[0][name].cpu() for name in ("share", "meta_keys", "text_keys")})
    whole = {name: torch.cat([part[name] for part in parts], dim=-2) for name in parts[0]}
    return MassByDistance(whole["meta"], whole["text"], whole["share"], whole["meta_keys"], whole["text_keys"])


def _of_layer(seen: Attended, is_meta_BT: Tensor, bins: int) -> dict[str, Tensor]:
    rows = Rows.of(is_meta_BT, seen.visible_BTS)
    bin_TS = bin_of_pairs(is_meta_BT.shape[1], is_meta_BT.device)
    pairs_BTS = rows.sees_meta_BT[:, :, None] & seen.visible_BTS & (bin_TS >= 0)
    queries_B1 = rows.sees_meta_BT.sum(dim=1)[:, None]
    mean_BTS = seen.probability_BHTS.mean(dim=1)
    weight_BTS = (1 / seen.visible_BTS.sum(dim=-1, keepdim=True)).expand_as(mean_BTS)
    one_BTS = torch.ones_like(mean_BTS)
    meta_BTS, text_BTS = pairs_BTS & is_meta_BT[:, None], pairs_BTS & ~is_meta_BT[:, None]

    def a_query(value_BTS: Tensor, chosen_BTS: Tensor) -> Tensor:
        return sum_by_bin(value_BTS, chosen_BTS, bin_TS, bins) / queries_B1

    return {
        "meta": a_query(mean_BTS, meta_BTS),
        "text": a_query(mean_BTS, text_BTS),
        "share": a_query(weight_BTS, meta_BTS),
        "meta_keys": a_query(one_BTS, meta_BTS),
        "text_keys": a_query(one_BTS, text_BTS),
    }


def ratio_by_distance(found: MassByDistance) -> Tensor:
    """Attention that a meta key gets over what a text key gets at the same distance, (C, X); NaN where either has no
    keys. A mean over sequences of masses and keys first, then the ratio."""
    meta_CX = found.meta_CNX.nanmean(dim=1) / found.meta_keys_NX.nanmean(dim=0)
    text_CX = found.text_CNX.nanmean(dim=1) / found.text_keys_NX.nanmean(dim=0)
    return meta_CX / text_CX


def mass(subject: Subject, options: Options) -> list[Finding]:
    """By layer; by layer and distance."""
    numbers = attention_numbers(subject, options.num_samples)
    twin = None
    if subject.twin is not None and subject.twin.has_meta_tokens:
        twin = attention_numbers(subject.twin, options.num_samples)
    found = mass_by_distance(subject, options.num_samples)
    return [_by_layer(subject, numbers, twin, found), _by_distance(subject, found)]


def _by_layer(
    subject: Subject, numbers: dict[str, Tensor], twin: dict[str, Tensor] | None, found: MassByDistance
) -> Finding:
    layers = range(len(numbers["mass"]))
    masses, shares = by_layer(numbers["mass"]), by_layer(numbers["share"])
    labels = bin_labels(subject.form.sequence_length)
    distances: dict[str, list[Estimate]] = {
        "mass on meta keys": [estimate(value_N) for value_N in found.meta_CNX.mean(dim=0).T],
        "uniform attention": [estimate(value_N) for value_N in found.share_NX.T],
    }
    whole, share = overall(numbers["mass"]), overall(numbers["share"])

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        line(left, layers, masses, "mass on meta keys", META, "-", "s")
        if twin is not None:
            line(left, layers, by_layer(twin["mass"]), "twin", BLACK, ":", "x")
        line(left, layers, shares, "their share of the visible keys", GREY, "--")
        left.set_ylim(bottom=0)
        finish(left, "layer", "probability", ticks=layers)
        line(right, range(len(labels)), distances["mass on meta keys"], "mass on meta keys, all layers", META, "-", "s")
        line(right, range(len(labels)), distances["uniform attention"], "under uniform attention", GREY, "--")
        finish(right, "distance from query to key (slots)", "probability")
        right.set_xticks(range(len(labels)), labels, rotation=45, ha="right")

    return Finding(
        name="mass",
        section=SECTION,
        title="How much attention meta-tokens receive",
        caption=(
            "Probability that text queries which see a meta-token put on meta keys, causal branch, mean over heads and"
            f" queries of {numbers['mass'].shape[1]} held-out sequences, 95 % intervals over sequences. The grey line"
            " is what they would get if every visible key got the same. Right: the same by distance, mean over layers;"
            f" the bins double and add up to the mass. Over all layers {whole} against a share of {share}. More mass"
            " than the share does not make a meta-token special: near keys get more whatever they are, so compare at"
            " one distance (next figure)."
        ),
        draw=draw,
        tables={
            "layers": [
                {"layer": layer, **masses[layer].columns("mass"), **shares[layer].columns("share of the keys")}
                for layer in layers
            ],
            "distances": [
                {
                    "distance (slots)": label,
                    **{k: v for name in distances for k, v in distances[name][x].columns(name).items()},
                }
                for x, label in enumerate(labels)
            ],
        },
        facts={
            "sequences": numbers["mass"].shape[1],
            "mass on meta keys": str(whole),
            "their share of the keys": str(share),
        },
        size=(9.0, 4.6),
    )


def _by_distance(subject: Subject, found: MassByDistance) -> Finding:
    ratio_CX = ratio_by_distance(found)
    mass_CX = found.meta_CNX.nanmean(dim=1)
    labels = bin_labels(subject.form.sequence_length)
    layers = range(len(ratio_CX))

    def draw(figure: Any) -> None:
        shown = (
            (mass_CX.numpy(), "probability on meta keys", False),
            (ratio_CX.log2().numpy(), "log₂ (a meta key over a text key)", True),
        )
        for axes, (value, label, diverging) in zip(figure.subplots(1, 2), shown, strict=True):
            heat(figure, axes, value, label, diverging=diverging)
            axes.set_xlabel("distance from query to key (slots)")
            axes.set_ylabel("layer")
            axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
            number_ticks(axes.yaxis, layers)

    return Finding(
        name="mass-distance",
        section=SECTION,
        title="Attention to meta-tokens by layer and distance",
        caption=(
            "Left: probability on meta keys by layer and distance (sequences, queries and heads as in the figure by"
            " layer). Right: attention that one meta key gets over what one text key gets at the same distance, as a"
            " power of two: 0 is parity, +1 twice as much (red), −1 half (blue). The query's own key is left out."
        ),
        draw=draw,
        tables={
            "map": [
                {
                    "layer": layer,
                    "distance (slots)": label,
                    "mass on meta keys": float(mass_CX[layer, x]),
                    "mass on text keys": float(found.text_CNX.nanmean(dim=1)[layer, x]),
                    "meta keys a query": float(found.meta_keys_NX.nanmean(dim=0)[x]),
                    "text keys a query": float(found.text_keys_NX.nanmean(dim=0)[x]),
                    "meta key over text key": float(ratio_CX[layer, x]),
                }
                for layer in layers
                for x, label in enumerate(labels)
            ]
        },
        facts={"median ratio of a meta key to a text key": float(ratio_CX.nanmedian())},
        size=(9.0, 4.2),
    )
