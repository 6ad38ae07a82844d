"""What the figures share: colours that the colour-blind can tell apart, lines with intervals, maps with scales."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta.paper.analysis.estimates import Estimate

#: Okabe and Ito.
META, TEXT, OTHER, PALE, BLACK = "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#000000"
GREY = "#777777"

Floats = npt.NDArray[np.floating[Any]]


def line(
    axes: Any, x: Sequence[float], y: Sequence[Estimate], label: str, colour: str, style: str = "-", marker: str = "o"
) -> None:
    """Means with a band of their 95 % intervals."""
    axes.plot(x, [e.mean for e in y], linestyle=style, marker=marker, markersize=4, color=colour, label=label)
    axes.fill_between(x, [e.low for e in y], [e.high for e in y], color=colour, alpha=0.18, linewidth=0)


def finish(axes: Any, x_label: str, y_label: str, *, ticks: Sequence[int] | None = None, legend: bool = True) -> None:
    """Labels, grid, whole numbers at the x axis where it counts layers, legend above the data."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if ticks is not None:
        step = -(-len(ticks) // 12)
        axes.set_xticks(list(ticks)[::step])
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1)


def heat(
    figure: Any,
    axes: Any,
    value_YX: Floats,
    label: str,
    *,
    diverging: bool = False,
    limits: tuple[float, float] | None = None,
) -> None:
    """A map with a colour bar; a diverging one is centred on 0. NaN (nothing there) is light grey."""
    import matplotlib

    shown = np.ma.masked_invalid(value_YX)
    low, high = limits if limits is not None else (float(shown.min()), float(shown.max()))
    if diverging and limits is None:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    colours = matplotlib.colormaps["RdBu_r" if diverging else "cividis"].with_extremes(bad="#dddddd")
    image = axes.imshow(shown, aspect="auto", origin="lower", cmap=colours, vmin=low, vmax=high, interpolation="none")
    figure.colorbar(image, ax=axes, label=label)


def number_ticks(axis: Any, labels: Sequence[Any], most: int = 12) -> None:
    """Labels of the rows or columns of a map, some of them where there are many."""
    step = -(-len(labels) // most)
    axis.set_ticks(range(0, len(labels), step), [str(label) for label in labels[::step]])
