"""What the meta branch adds to the residual stream, by layer, and what the loss loses without it.

Letters: B batch, N sequences, T slots, D model width, M meta columns, C layers.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megameta.data.dataset import IGNORE_INDEX
from megameta.data.loader import Batch
from megameta.paper.analysis.attention_numbers import is_meta_of
from megameta.paper.analysis.estimates import Estimate, estimate, mean_over
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.observe import PartName, observed_parts, switched_off
from megameta.paper.analysis.plots import BLACK, META, OTHER, TEXT, finish, line
from megameta.paper.analysis.registry import Options
from megameta.paper.analysis.subject import Subject

PARTS: tuple[PartName, ...] = ("meta", "causal", "mlp")
#: Logits that are held at once, (B, T, V).
_LOGITS = 1 << 26
TITLES = {"meta": "meta branch", "causal": "causal attention", "mlp": "MLP"}


def branch_layers(subject: Subject) -> list[int]:
    """Layers that have the branch."""
    model = subject.config.model
    return [layer for layer in range(model.num_layers) if model.layer_has_meta(layer)]


def part_numbers(subject: Subject, num_samples: int) -> dict[str, Tensor]:
    """At meta rows, layers that have the branch in order, float64 (C, N) by name:

    ``norm PART``: mean of the part's norm over that of the residual which the branch reads; ``cosine PART``: mean of
    the part's cosine to that residual; ``cosine meta causal``: of the branch's output to causal attention's.
    """
    parts: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for batch in subject.held_out(num_samples):
            parts.append(_parts_of_batch(subject, batch))
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


def _parts_of_batch(subject: Subject, batch: Batch) -> dict[str, Tensor]:
    context = subject.context(batch)
    rows = context.meta
    if rows is None:  # the registry lets no such model through
        raise ValueError("no meta-tokens, or no meta branch")
    sources: dict[int, Tensor] = {}
    added: dict[int, dict[str, Tensor]] = {}

    def see(layer: int, part: PartName, output: Tensor) -> None:
        added.setdefault(layer, {})[part] = output if part == "meta" else rows.take(output)[1]

    with observed_parts(subject.model, see, lambda layer, x_BMD: sources.update({layer: x_BMD})):
        subject.model.hidden_states(batch.token_BT, context)
    layers = []
    for layer, source_BMD in sources.items():
        found = {}
        for part in PARTS:
            value_BMD = added[layer][part]
            found[f"norm {part}"] = value_BMD.norm(dim=-1) / source_BMD.norm(dim=-1)
            found[f"cosine {part}"] = F.cosine_similarity(value_BMD, source_BMD, dim=-1)
        found["cosine meta causal"] = F.cosine_similarity(added[layer]["meta"], added[layer]["causal"], dim=-1)
        layers.append({name: mean_over(value[:, None], rows.is_real_BM)[:, 0] for name, value in found.items()})
    return {name: torch.stack([layer[name] for layer in layers]).cpu() for name in layers[0]}


def losses(subject: Subject, num_samples: int, off: Collection[int]) -> dict[str, Tensor]:
    """Mean next-token loss in nats with the branch of some layers switched off, float64 (N) by where the target is
    predicted from: "meta", "text", and "all" of them."""
    found: dict[str, list[Tensor]] = {"meta": [], "text": [], "all": []}
    slots = subject.form.sequence_length * subject.config.model.vocab_size
    size = max(1, min(8, _LOGITS // slots))
    with torch.no_grad(), switched_off(subject.model, off):
        for batch in subject.held_out(num_samples, batch_size=size):
            logit_BTV = subject.logits(subject.hidden_states(batch))
            loss_BT = F.cross_entropy(
                logit_BTV.transpose(1, 2), batch.label_BT, ignore_index=IGNORE_INDEX, reduction="none"
            )
            is_meta_BT, counts_BT = is_meta_of(subject, batch), batch.label_BT != IGNORE_INDEX
            for name, rows_BT in (
                ("meta", is_meta_BT & counts_BT),
                ("text", ~is_meta_BT & counts_BT),
                ("all", counts_BT),
            ):
                found[name].append(mean_over(loss_BT[:, None], rows_BT)[:, 0].cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def branch(subject: Subject, options: Options) -> list[Finding]:
    """What it adds; what is lost without it."""
    return [_adds(subject, options), _loses(subject, options)]


def _adds(subject: Subject, options: Options) -> Finding:
    found = {
        name: [estimate(value_N) for value_N in value_CN]
        for name, value_CN in part_numbers(subject, options.num_samples).items()
    }
    layers = branch_layers(subject)
    colours = {"meta": (META, "-", "s"), "causal": (TEXT, "-", "o"), "mlp": (OTHER, "--", "^")}

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for part in PARTS:
            line(left, layers, found[f"norm {part}"], TITLES[part], *colours[part])
            line(right, layers, found[f"cosine {part}"], f"{TITLES[part]} to the residual", *colours[part])
        line(right, layers, found["cosine meta causal"], "meta branch to causal attention", BLACK, ":", "x")
        left.set_yscale("log")
        right.axhline(0, color="black", linewidth=0.6)
        finish(left, "layer", "norm of what is added / norm of the residual (log scale)", ticks=layers)
        finish(right, "layer", "cosine similarity", ticks=layers)

    rows: list[dict[str, Any]] = []
    for place, layer in enumerate(layers):
        rows.append({"layer": layer})
        for name, curve in found.items():
            rows[-1] |= curve[place].columns(name)
    mean = sum(e.mean for e in found["norm meta"]) / len(layers)
    return Finding(
        name="branch-adds",
        section="Meta branch",
        title="What the meta branch adds at meta-tokens",
        caption=(
            "At meta-tokens of held-out sequences, by layer: the norm of what each part of the block adds over the norm"
            " of the residual that the branch reads (left), and its direction (right: cosine to that residual, and of"
            " the branch's output to causal attention's); means and 95 % intervals over sequences. Mean over layers:"
            f" the branch adds {mean:.3f} of the residual's norm. A long vector need not matter: the next figure"
            " switches it off."
        ),
        draw=draw,
        tables={"layers": rows},
        facts={"branch's norm over the residual's, mean over layers": mean},
        size=(9.0, 4.8),
    )


def _loses(subject: Subject, options: Options) -> Finding:
    layers = branch_layers(subject)
    whole = losses(subject, options.num_samples, ())
    cases = [*([layer] for layer in layers), layers]
    change: dict[str, list[Estimate]] = {"all": [], "meta": [], "text": []}
    for off in cases:
        without = losses(subject, options.num_samples, off)
        for name, values in change.items():
            values.append(estimate(without[name] - whole[name]))
    labels = [*map(str, layers), "all"]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        shown = (
            ("all", "all targets", BLACK, "o"),
            ("meta", "predicted at meta-tokens", META, "s"),
            ("text", "predicted at text tokens", TEXT, "^"),
        )
        for shift, (name, label, colour, marker) in enumerate(shown):
            x = [place + (shift - 1) * 0.18 for place in range(len(cases))]
            y = [e.mean for e in change[name]]
            bars = [[e.mean - e.low for e in change[name]], [e.high - e.mean for e in change[name]]]
            axes.errorbar(x, y, yerr=bars, fmt=marker, color=colour, label=label, markersize=5, capsize=2)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_xticks(range(len(labels)), labels)
        finish(axes, "layer whose meta branch is switched off", "rise of the loss (nats)")

    rows: list[dict[str, Any]] = []
    for place, label in enumerate(labels):
        rows.append({"switched off": label})
        for name, values in change.items():
            rows[-1] |= values[place].columns(f"rise of the loss, {name} (nats)")
    return Finding(
        name="branch-off",
        section="Meta branch",
        title="What is lost without the meta branch",
        caption=(
            "Next-token loss of the same held-out sequences with the branch of one layer, or of all, adding zero, minus"
            " the loss of the whole model; 95 % intervals over sequences of the paired differences. Above 0 the branch"
            f" helps. All layers off: {change['all'][-1]} nats over all targets, {change['meta'][-1]} where the"
            f" prediction is made at a meta-token, {change['text'][-1]} where it is made at a text token, which the"
            " branch reaches only through later attention. A model that was trained with the branch is damaged by"
            " losing it, whether or not a model trained without it is worse: that needs a twin."
        ),
        draw=draw,
        tables={"layers": rows},
        facts={
            "loss of the whole model (nats)": str(estimate(whole["all"])),
            "rise with all layers off (nats)": str(change["all"][-1]),
        },
        size=(7.5, 4.4),
    )
