"""Reports of an experiment as Markdown: tables, differences with intervals, what was run on what."""

import datetime
from collections.abc import Iterable, Sequence

from megameta.cluster.machine import machine_facts
from megameta.paper.reproduce import paper
from megameta.paper.reproduce.arms import ARMS, COMPARISONS
from megameta.paper.reproduce.results import DURING, Scores
from megameta.paper.reproduce.runs import Experiment
from megameta.paper.reproduce.scale import Scale
from megameta.paper.tasks.definitions import DIFFICULTIES
from megameta.quickstart.report import table
from megameta.statistics import Estimate


def percent(found: Estimate | None) -> str:
    """``62.1 [55.0, 68.7]`` in per cent, or a dash."""
    return "–" if found is None else f"{100 * found.mean:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def points(found: Estimate | None) -> str:
    """A difference in percentage points."""
    return "–" if found is None else f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def document(title: str, command: str, experiment: Experiment, seconds: float, parts: Iterable[str]) -> str:
    """The whole report."""
    scale = experiment.scale
    facts = machine_facts() | {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seeds": ", ".join(map(str, scale.seeds)),
        "time of all runs, one after another": _hours(seconds),
    }
    return (
        "\n\n".join(
            [
                f"# {title}",
                f"Scale: {scale.description}.",
                f"    {command}",
                *parts,
                "## Machine and versions",
                table(["what", "value"], [[name, value] for name, value in facts.items()]),
                f"Configurations of all runs: `{experiment.output}/configs/`; logs: `{experiment.output}/logs/`.",
            ]
        )
        + "\n"
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def intervals_note(seeds: int) -> str:
    """What the brackets mean, where there are so many seeds."""
    if seeds > 1:
        return f"Means over {seeds} seeds with 95 % intervals (Student's t; differences are paired by seed)."
    return (
        "One seed; brackets are 95 % intervals over test examples alone (Wilson, Newcombe). Another seed can differ by"
        " much more: no difference here says anything about the method."
    )


def figure1_parts(scores: Scores, experiment: Experiment) -> list[str]:
    """What figure 1 shows, in numbers."""
    scale = experiment.scale
    parts = ["![Accuracy after each phase, and learning curves](figure1.png)", intervals_note(scores.count_seeds())]
    for task in scale.tasks.names:
        if not scores.pick(task=task):
            continue
        parts += [f"## {task.replace('_', ' ').capitalize()}", _phases(scores, scale, task)]
        parts += [_by_length(scores, scale, task), _differences(scores, scale, task)]
        parts += _by_difficulty(scores, scale, task)
    verdicts = _verdicts(scores, scale)
    return [*parts, *(["## What that says", verdicts] if verdicts else [])]


def _phases(scores: Scores, scale: Scale, task: str) -> str:
    last, count = scale.phases[-1], len(scale.phases)
    rows = []
    for arm in scale.arms:
        found = [scores.estimate(arm=arm, task=task, condition=DURING, phase=bound, bin=last) for bound in scale.phases]
        if any(found):
            rows.append([ARMS[arm].title, *map(percent, found)])
    for arm, values in paper.FIGURE1.get(task, {}).items():
        shown = [str(value) for value in values[-count:]]
        rows.append(
            [f"*{ARMS[arm].title}, the paper at 512 after 128, 256, 512*", *[""] * (count - len(shown)), *shown]
        )
    return table([f"accuracy at {last} tokens (%), fine-tuned up to", *map(str, scale.phases)], rows)


def _by_length(scores: Scores, scale: Scale, task: str) -> str:
    rows = []
    for arm in scale.arms:
        for condition in _conditions(scores):
            cells = _cells(scores, scale, arm=arm, task=task, condition=condition)
            if set(cells) != {"–"}:
                rows.append([f"{ARMS[arm].title}, {condition}", *cells])
    head = ["accuracy at the end (%), by tokens at most", *[_length(bound, scale) for bound in scale.tasks.bins]]
    return table(head, rows)


def _by_difficulty(scores: Scores, scale: Scale, task: str) -> list[str]:
    """The same accuracies by difficulty, where a bin has several."""
    found = {(s.bin, s.difficulty) for level in DIFFICULTIES for s in scores.pick(task=task, difficulty=level)}
    columns = sorted(found, key=lambda cell: (cell[0], DIFFICULTIES.index(cell[1])))
    if len({bound for bound, _ in columns}) == len(columns):
        return []
    rows = []
    for arm in scale.arms:
        for condition in _conditions(scores):
            wanted = {"arm": arm, "task": task, "condition": condition}
            cells = [percent(scores.estimate(**wanted, bin=bound, difficulty=level)) for bound, level in columns]
            if set(cells) != {"–"}:
                rows.append([f"{ARMS[arm].title}, {condition}", *cells])
    head = ["by difficulty (%)", *[f"{_length(bound, scale)}: {level}" for bound, level in columns]]
    return [table(head, rows)]


def _conditions(scores: Scores) -> list[str]:
    """Of the evaluations at the end, "as trained" first."""
    return sorted({score.condition for score in scores.all} - {DURING}, key=_condition_order)


def _cells(scores: Scores, scale: Scale, **wanted: str) -> list[str]:
    return [percent(scores.estimate(**wanted, bin=bound)) for bound in scale.tasks.bins]


def _condition_order(name: str) -> tuple[int, str]:
    return (0 if name == "as trained" else 1, name)


def _length(bound: int, scale: Scale) -> str:
    return f"{bound} (not trained)" if bound not in scale.phases else str(bound)


def _differences(scores: Scores, scale: Scale, task: str) -> str:
    rows = []
    for first, second, cause in COMPARISONS:
        found = [
            scores.difference(first, second, task=task, condition="as trained", bin=bound) for bound in scale.tasks.bins
        ]
        if any(found):
            rows.append([f"{cause}: {first} − {second}", *[points(estimate) for estimate in found]])
    if not rows:
        return "(No two of these arms are compared.)"
    return table(["differences (points)", *[_length(bound, scale) for bound in scale.tasks.bins]], rows)


def _verdicts(scores: Scores, scale: Scale) -> str:
    """Sentences that follow from the numbers, by rules: an interval that holds 0 shows no difference."""
    lines = []
    last = scale.phases[-1]
    for task in scale.tasks.names:
        for first, second, cause in COMPARISONS:
            found = scores.difference(first, second, task=task, condition="as trained", bin=last)
            if found is not None:
                claim = f"{cause} ({first} − {second}): {points(found)} points: {verdict(found)}"
                lines.append(f"- {task}, {last} tokens, {claim}.")
    return "\n".join(lines)


def verdict(found: Estimate) -> str:
    """In words."""
    if found.over == "examples":
        return "one seed, so nothing is claimed"
    if found.low > 0:
        return "higher"
    return "lower" if found.high < 0 else "no difference shown"


def table2_parts(scores: Scores, experiment: Experiment, conditions: Sequence[str]) -> list[str]:
    """Accuracy with and without positions at meta-tokens."""
    scale = experiment.scale
    parts = [
        f"Up to {scale.test_examples:,} test examples a cell (the paper's cells hold about 18). The same models and"
        " examples in all rows; only what they get at meta-tokens differs.",
        intervals_note(scores.count_seeds()),
    ]
    for task in scale.tasks.names:
        if not scores.pick(task=task):
            continue
        rows = []
        for arm in scale.arms:
            for condition in conditions:
                cells = _cells(scores, scale, arm=arm, task=task, condition=condition)
                if set(cells) != {"–"}:
                    rows.append([f"{ARMS[arm].title}, {condition}", *cells])
        head = ["accuracy (%), by tokens at most", *[_length(bound, scale) for bound in scale.tasks.bins]]
        parts += [f"## {task.replace('_', ' ').capitalize()}", table(head, rows)]
        counts = {s.bin: s.examples for s in scores.pick(task=task)}
        parts.append("Examples a cell: " + ", ".join(f"{bound}: {counts[bound]:,}" for bound in sorted(counts)) + ".")
    return parts
