"""Attention maps of one held-out sequence, by layer and head, with meta-tokens marked.

Letters: W rows and columns that are shown, M meta-tokens among them, H heads, C layers.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megameta.paper.analysis.attention_numbers import is_meta_of
from megameta.paper.analysis.entropy import SECTION
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.observe import Attended, observed_attention
from megameta.paper.analysis.plots import META
from megameta.paper.analysis.registry import Options
from megameta.paper.analysis.subject import Subject

#: Slots that are shown: more could not be told apart.
WINDOW = 64
#: Smallest probability of the colour scale.
FAINT = 1e-3
_MOST_LAYERS, _MOST_HEADS = 4, 8


def shown_layers(subject: Subject, options: Options) -> list[int]:
    """Those asked for, else some, spread over all with both ends."""
    layers = subject.config.model.num_layers
    if options.layers:
        return list(options.layers)
    return sorted({round(x) for x in np.linspace(0, layers - 1, min(layers, _MOST_LAYERS))})


def attention_maps(subject: Subject, options: Options) -> list[Finding]:
    """Of both branches, by layer (mean over heads) and by layer and head."""
    batch = next(subject.held_out(1, batch_size=1))
    causal: list[Tensor] = []
    meta: dict[int, Tensor] = {}

    def see(seen: Attended) -> None:
        if seen.branch == "causal":
            causal.append(seen.probability_BHTS[0, :, :WINDOW, :WINDOW].cpu())
        else:
            meta[seen.layer] = seen.probability_BHTS[0].cpu()

    with torch.no_grad(), observed_attention(subject.model, see, ("causal", "meta")):
        subject.hidden_states(batch)
    is_meta_T = is_meta_of(subject, batch)[0].cpu()
    slots = is_meta_T[:WINDOW].nonzero().flatten().tolist()
    sample = batch.sample_ids[0]
    where = f"the first {min(WINDOW, len(is_meta_T))} slots of one held-out sequence (sample {sample})"
    layers = shown_layers(subject, options)
    found = [_means(causal, slots, where), _heads(causal, layers, slots, where)]
    chosen = [layer for layer in layers if layer in meta] or sorted(meta)[:_MOST_LAYERS]
    if chosen and is_meta_T.sum() > 1:
        found.append(_branch(meta, chosen, is_meta_T.nonzero().flatten().tolist(), sample))
    return found


def _panel(axes: Any, map_WW: Tensor, slots: list[int]) -> Any:
    """One map; meta-tokens have marks at both axes and a thin line at their column."""
    from matplotlib.colors import LogNorm

    value = np.ma.masked_less_equal(map_WW.numpy(), 0)
    image = axes.imshow(value, cmap="viridis", norm=LogNorm(FAINT, 1.0, clip=True), interpolation="none")
    size = len(map_WW)
    if slots:  # an empty line would upset the layout
        axes.plot(slots, [-1.6] * len(slots), "v", color=META, markersize=3, clip_on=False)
        axes.plot([-1.6] * len(slots), slots, ">", color=META, markersize=3, clip_on=False)
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.tick_params(labelsize="x-small")
    axes.set_facecolor("#eeeeee")
    return image


def _grid(
    figure: Any, maps: list[tuple[str, Tensor]], columns: int, slots: list[int], x_label: str, y_label: str
) -> None:
    rows = -(-len(maps) // columns)
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for place, axes in enumerate(grid.flatten()):
        if place >= len(maps):
            axes.set_axis_off()
            continue
        title, value = maps[place]
        image = _panel(axes, value, slots)
        axes.set_title(title, fontsize="small", pad=9)
    figure.colorbar(image, ax=grid.tolist()[0] if rows == 1 else list(grid.flatten()), label="attention probability")
    figure.supxlabel(x_label, fontsize="medium")
    figure.supylabel(y_label, fontsize="medium")


def _rows_of(maps: dict[str, Tensor], labels: list[int] | None = None) -> list[dict[str, Any]]:
    """A row a visible pair."""
    size = len(next(iter(maps.values())))
    names = labels or list(range(size))
    return [
        {
            "query": names[t],
            "key": names[s],
            **{name: float(f"{float(value[t, s]):.4g}") for name, value in maps.items()},
        }
        for t in range(size)
        for s in range(t + 1)
    ]


def _marks() -> str:
    return (
        "Orange triangles mark meta-tokens, as keys (top) and as queries (left). Rows are queries and add up to 1; grey"
        " is what a query may not see; the colour is logarithmic, and all below 0.001 looks alike."
    )


def _means(causal: list[Tensor], slots: list[int], where: str) -> Finding:
    maps = [(f"layer {layer}", map_HWW.mean(dim=0)) for layer, map_HWW in enumerate(causal)]
    columns = min(4, len(maps))

    def draw(figure: Any) -> None:
        _grid(figure, maps, columns, slots, "key (slot)", "query (slot)")

    return Finding(
        name="attention-layers",
        section=SECTION,
        title="Causal attention by layer, mean over heads",
        caption=f"Attention of {where}. {_marks()} One example: the figures below average over many.",
        draw=draw,
        tables={"maps": _rows_of(dict(maps))},
        facts={"meta-tokens at slots": " ".join(map(str, slots))},
        size=(2.5 * columns + 1.3, 2.6 * -(-len(maps) // columns) + 0.8),
    )


def _heads(causal: list[Tensor], layers: list[int], slots: list[int], where: str) -> Finding:
    heads = min(_MOST_HEADS, len(causal[0]))
    maps = [(f"layer {layer}, head {head}", causal[layer][head]) for layer in layers for head in range(heads)]
    left_out = len(causal[0]) - heads

    def draw(figure: Any) -> None:
        _grid(figure, maps, heads, slots, "key (slot)", "query (slot)")

    return Finding(
        name="attention-heads",
        section=SECTION,
        title="Causal attention by layer and head",
        caption=f"Attention of {where}. {_marks()}"
        + (f" The last {left_out} heads of each layer are not drawn." if left_out else ""),
        draw=draw,
        tables={"maps": _rows_of(dict(maps))},
        facts={"layers": " ".join(map(str, layers))},
        size=(max(6.0, 2.2 * heads + 1.3), 2.4 * len(layers) + 0.8),
    )


def _branch(meta: dict[int, Tensor], layers: list[int], slots: list[int], sample: int) -> Finding:
    heads = min(_MOST_HEADS, len(meta[layers[0]]))
    count = len(slots)
    maps = [
        (f"layer {layer}, head {head}", meta[layer][head, :count, :count]) for layer in layers for head in range(heads)
    ]

    def draw(figure: Any) -> None:
        _grid(figure, maps, heads, [], "key (number of the meta-token)", "query (number of the meta-token)")

    return Finding(
        name="attention-branch",
        section=SECTION,
        title="Meta branch by layer and head",
        caption=(
            f"Attention of the meta branch over the {count} meta-tokens of one held-out sequence (sample {sample}):"
            " rows and columns are meta-tokens alone, in their order, and what lies between them is text that the"
            " branch does not see. Rows add up to 1; the first meta-token sees itself alone. The colour is logarithmic."
        ),
        draw=draw,
        tables={"maps": _rows_of(dict(maps), slots)},
        facts={"meta-tokens at slots": " ".join(map(str, slots))},
        size=(max(6.0, 2.2 * heads + 1.3), 2.4 * len(layers) + 0.8),
    )
