"""Pictures of an experiment, the paper's numbers beside ours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megameta.paper.reproduce import paper
from megameta.paper.reproduce.arms import ARMS
from megameta.paper.reproduce.results import DURING, Scores
from megameta.paper.reproduce.scale import Scale

#: Apart for the colour-blind too (Okabe and Ito), by arm.
COLOURS = {
    "gpt2-ape": "#000000",
    "gpt2-rope": "#56b4e9",
    "gpt2-nope": "#999999",
    "gpt2-rnope": "#cc79a7",
    "gpt2-rope-compute": "#0072b2",
    "pause-ape": "#f0e442",
    "pause-rope": "#e69f00",
    "meta-ape": "#009e73",
    "meta-rope": "#d55e00",
}


def draw_figure1(scores: Scores, scale: Scale, path: Path) -> None:
    """A column a task: accuracy at the longest trained length after each phase, the paper's dashed; learning curves
    below. Bars are 95 % intervals over seeds, or over examples where there is one seed."""
    tasks = [task for task in scale.tasks.names if scores.pick(task=task)]
    figure, axes = _axes(2, len(tasks))
    last = scale.phases[-1]
    for column, task in enumerate(tasks):
        top, bottom = axes[0][column], axes[1][column]
        _after_phases(top, scores, scale, task)
        _paper_lines(top, task, len(scale.phases))
        for arm in scale.arms:
            _learning_curve(bottom, scores, arm, task, last)
        top.set_title(task.replace("_", " "))
        top.set_xticks(range(len(scale.phases)), [str(bound) for bound in scale.phases])
        top.set_xlim(-0.5, len(scale.phases) - 0.5)
        top.set_xlabel("fine-tuned up to (tokens)")
        bottom.set_xlabel("step of fine-tuning")
        for place in (top, bottom):
            place.set_ylim(-2, 102)
            place.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"accuracy at {last} tokens (%)")
    axes[1][0].set_ylabel(f"accuracy at {last} tokens (%)")
    _finish(figure, axes, path, f"Exact match of whole answers, {len(scale.seeds)} seed(s)")


def _after_phases(axes: Any, scores: Scores, scale: Scale, task: str) -> None:
    for number, arm in enumerate(scale.arms):
        shift = (number - (len(scale.arms) - 1) / 2) * 0.04
        points = []
        for place, bound in enumerate(scale.phases):
            found = scores.estimate(arm=arm, task=task, condition=DURING, phase=bound, bin=scale.phases[-1])
            if found is not None:
                points.append((place + shift, found))
        if points:
            x = [place for place, _ in points]
            y = [100 * found.mean for _, found in points]
            bars = [[100 * (f.mean - f.low) for _, f in points], [100 * (f.high - f.mean) for _, f in points]]
            axes.errorbar(x, y, yerr=bars, color=COLOURS[arm], marker="o", capsize=2, label=ARMS[arm].title)


def _paper_lines(axes: Any, task: str, phases: int) -> None:
    """The paper's last phases over ours."""
    for arm, values in paper.FIGURE1.get(task, {}).items():
        shown = values[-phases:]
        x = range(phases - len(shown), phases)
        label = f"{ARMS[arm].title}: the paper at 512, fine-tuned up to 128, 256, 512"
        axes.plot(x, shown, linestyle="--", marker="x", color=COLOURS[arm], alpha=0.6, linewidth=1, label=label)


def _learning_curve(axes: Any, scores: Scores, arm: str, task: str, bound: int) -> None:
    found = scores.pick(arm=arm, task=task, condition=DURING, bin=bound)
    for seed in sorted({score.seed for score in found}):
        curve = sorted((score.step, 100 * score.accuracy) for score in found if score.seed == seed)
        axes.plot(*zip(*curve, strict=True), color=COLOURS[arm], alpha=0.8, linewidth=1.2)


def draw_lines(
    path: Path, title: str, x_label: str, y_label: str, lines: Sequence[tuple[str, str, str, Sequence[tuple[Any, ...]]]]
) -> None:
    """One panel. ``lines``: label, colour, style, points (x, y) or (x, y, low, high)."""
    figure, axes = _axes(1, 1)
    place = axes[0][0]
    for label, colour, style, points in lines:
        x, y = [p[0] for p in points], [p[1] for p in points]
        bars = [[p[1] - p[2] for p in points], [p[3] - p[1] for p in points]] if len(points[0]) > 2 else None
        place.errorbar(x, y, yerr=bars, color=colour, linestyle=style, marker="o", markersize=4, capsize=2, label=label)
    place.set_xlabel(x_label)
    place.set_ylabel(y_label)
    place.grid(alpha=0.3)
    _finish(figure, axes, path, title)


def _axes(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(8.6, 3.6 * columns + 1), 3.4 * rows + 1.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    return figure, figure.subplots(rows, columns, squeeze=False)


def _finish(figure: Any, axes: Any, path: Path, title: str) -> None:
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.suptitle(title)
    work = path.with_name(f".{path.name}.writing")
    figure.savefig(work, format="png")
    work.replace(path)
