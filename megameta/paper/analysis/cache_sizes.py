"""What a model loses when its cache keeps few rows: meta-tokens, a window and sinks, against rules of the same size.

For each window W the meta-token cache (``megameta.model.KeepRule``) is run, and beside it two rules that keep as many
rows as it does, on average over the targets that count: a longer window with the same sinks (Xiao et al. 2024, but rows
keep their positions), and the same window with random earlier rows in place of the meta-tokens'. Dropped rows are
dropped in both branches. Only targets in the second half of a sequence count, where rows have been dropped.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megameta.data.loader import Batch
from megameta.paper.analysis.cache_rules import (
    FULL,
    RANDOM,
    SINKS,
    WINDOW,
    WITH_META,
    RuleResult,
    Scored,
    run_rules,
    second_half,
)
from megameta.paper.analysis.estimates import Estimate, estimate
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.plots import BLACK, META, OTHER, TEXT, finish, line
from megameta.paper.analysis.registry import Options
from megameta.paper.analysis.subject import Subject
from megameta.statistics import wilson

SECTION = "Meta-token cache"
#: Windows as shares of the sequence.
SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
_STYLES = {
    WITH_META: ("sinks, window, meta-tokens", META, "-", "s"),
    WINDOW: ("sinks, longer window", TEXT, "--", "o"),
    RANDOM: ("sinks, window, random rows", OTHER, ":", "^"),
}


def windows_of(length: int) -> list[int]:
    """The windows that are tried on sequences of so many slots."""
    return sorted({max(1, round(share * length)) for share in SHARES})


def cache_sizes(subject: Subject, options: Options) -> list[Finding]:
    """Loss on held-out text against the rows and bytes that are kept."""
    batches = [second_half(batch) for batch in subject.held_out(options.num_samples, batch_size=4)]
    found = run_rules(subject.model, batches, windows_of(subject.form.sequence_length), options.seed)
    return [_loss_finding(subject, options, found)]


def task_finding(subject: Subject, tasks: Mapping[str, Sequence[Batch]], options: Options) -> Finding:
    """Accuracy on test examples, by name of the task, against the rows that are kept."""
    found = {}
    for name, batches in tasks.items():
        windows = windows_of(max(batch.token_BT.shape[1] for batch in batches))
        found[name] = run_rules(subject.model, batches, windows, options.seed)
    return _task_finding(options, found)


def above_full(found: Sequence[RuleResult], result: RuleResult) -> Estimate:
    """Loss over that with all rows (the first result), paired by sequence."""
    return estimate(result.scored.loss_N - found[0].scored.loss_N)


def rule_columns(result: RuleResult) -> dict[str, Any]:
    """What a table says of a rule."""
    rule = result.rule
    return {
        "rule": result.name,
        "window": "" if rule is None else rule.window,
        "sinks": "" if rule is None else rule.sinks,
        "share of random rows": rule.share if rule is not None and rule.pinned == "random" else "",
        "rows seen": result.scored.rows,
        "peak bytes": result.peak_bytes,
    }


def comparison(found: Sequence[RuleResult], other: str) -> str:
    """By rule: at how many sizes the meta-token cache has less loss than another rule of the same size."""
    ours, theirs = ([result.scored for result in found if result.name == name] for name in (WITH_META, other))
    differences = [estimate(a.loss_N - b.loss_N) for a, b in zip(ours, theirs, strict=True)]
    better = sum(value.high < 0 for value in differences)
    worse = sum(value.low > 0 for value in differences)
    extreme = max(differences, key=lambda value: abs(value.mean))
    against = {WINDOW: "a longer window", RANDOM: "random rows"}[other]
    return (
        f"Against {against} of the same size its loss is lower at {better} and higher at {worse} of {len(differences)}"
        f" sizes, not resolved at the others; the largest difference is {extreme} nats."
    )


def _loss_finding(subject: Subject, options: Options, found: list[RuleResult]) -> Finding:
    full = estimate(found[0].scored.loss_N)
    curves = {name: [result for result in found if result.name == name] for name in _STYLES}

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for name, results in curves.items():
            losses = [above_full(found, result) for result in results]
            line(left, [result.scored.rows for result in results], losses, *_STYLES[name])
            line(right, [result.peak_bytes / 2**10 for result in results], losses, *_STYLES[name])
        for axes, whole in ((left, found[0].scored.rows), (right, found[0].peak_bytes / 2**10)):
            axes.axvline(whole, color=BLACK, linewidth=1, linestyle=":", label=FULL)
            axes.axhline(0, color=BLACK, linewidth=1)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        finish(left, "rows seen (mean over targets)", "loss above that with all rows (nats)")
        finish(right, "largest size of keys and values (KiB a sequence)", "loss above that with all rows (nats)")

    rows = [
        {
            **rule_columns(result),
            **(loss := estimate(result.scored.loss_N)).columns("loss (nats)"),
            "perplexity": math.exp(min(loss.mean, 700.0)),
            **above_full(found, result).columns("above all rows (nats)"),
        }
        for result in found
    ]
    return Finding(
        name="cache-loss",
        section=SECTION,
        title="What is lost when the cache keeps few rows",
        caption=(
            f"{len(found[0].scored.loss_N)} held-out sequences of {subject.form.sequence_length} slots with"
            f" {subject.form.num_meta_tokens} meta-tokens; targets of their second halves. With all rows the loss is"
            f" {full} nats, perplexity {math.exp(min(full.mean, 700.0)):.1f}. The meta-token cache keeps {SINKS} first"
            " rows, a window, and every meta-token's row in both branches. The two others keep as many rows on"
            " average; a meta-token's row has keys and values in both branches, so it costs more bytes (right). Bytes"
            " are of allocated storages, one sequence read by 32 slots. Bands are 95 % intervals over sequences,"
            f" paired. {comparison(found, WINDOW)} {comparison(found, RANDOM)} Kept rows keep their positions."
        ),
        draw=draw,
        tables={"rules": rows},
        facts={"sequences": len(found[0].scored.loss_N), "loss with all rows": full.mean, "seed": options.seed},
        size=(11.0, 5.0),
    )


def _task_finding(options: Options, found: dict[str, list[RuleResult]]) -> Finding:
    def draw(figure: Any) -> None:
        columns = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
        for axes, (task, results) in zip(columns, found.items(), strict=True):
            for name, style in _STYLES.items():
                mine = [result.scored for result in results if result.name == name]
                line(axes, [scored.rows for scored in mine], [accuracy(scored) for scored in mine], *style)
            whole = float(results[0].scored.exact_N.mean())
            axes.axhline(whole, color=BLACK, linewidth=1, linestyle=":", label=FULL)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_ylim(-0.02, 1.02)
            finish(axes, f"{task}: rows seen (mean over answer tokens)", "accuracy (share of examples)")

    examples = {name: len(results[0].scored.exact_N) for name, results in found.items()}
    said = ", ".join(f"{name}: {count}" for name, count in examples.items())
    return Finding(
        name="cache-tasks",
        section=SECTION,
        title="Task accuracy when the cache keeps few rows",
        caption=(
            f"Exact match of whole answers on test examples ({said}), as greedy decoding would give it, under the rules"
            f" of the figure before: {SINKS} first rows, a window, and the meta-tokens, a longer window, or random"
            " rows. Bands are 95 % intervals over examples (Wilson)."
        ),
        draw=draw,
        tables={
            "accuracy": [
                {"task": task, **rule_columns(result), **accuracy(result.scored).columns("accuracy")}
                for task, results in found.items()
                for result in results
            ]
        },
        facts={"examples": examples, "seed": options.seed},
        size=(4.0 * len(found) + 1.5, 5.0),
    )


def accuracy(scored: Scored) -> Estimate:
    """Share of sequences all of whose targets were the likeliest token; Wilson's 95 % interval."""
    right = scored.exact_N.sum()
    return Estimate(float(scored.exact_N.mean()), *wilson(int(right), len(scored.exact_N)))
