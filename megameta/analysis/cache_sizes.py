"""What a model loses when its cache keeps few rows: meta-tokens, a window and sinks, against rules of the same size.

For each window W the meta-token cache (``megameta.model.KeepRule``) is run, and beside it two rules that keep as many
rows as it does, on average over the targets that count: a longer window with the same sinks (Xiao et al. 2024, but rows
keep their positions), and the same window with random earlier rows in place of the meta-tokens'. Dropped rows are
dropped in both branches. Only targets in the second half of a sequence count, where rows have been dropped.

Letters: B batch, T slots, S rows of a cache, N sequences.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megameta.analysis.estimates import Estimate, estimate
from megameta.analysis.findings import Finding
from megameta.analysis.plots import BLACK, META, OTHER, TEXT, finish
from megameta.analysis.registry import Options
from megameta.analysis.subject import Subject
from megameta.data.dataset import IGNORE_INDEX
from megameta.data.loader import Batch
from megameta.model import GPT, DecodingCache, KeepRule, PruningCache

SECTION = "Meta-token cache"
SINKS = 4
#: Windows as shares of the sequence.
SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
FULL, WITH_META, WINDOW, RANDOM = "all rows", "meta-tokens", "longer window", "random rows"
_STYLES = {WITH_META: (META, "s", "-"), WINDOW: (TEXT, "o", "--"), RANDOM: (OTHER, "^", ":")}


@dataclass(frozen=True)
class Scored:
    """What a rule gives on sequences.

    Attributes:
        loss_N: mean loss in nats of each sequence's targets that count.
        exact_N: 1 where all of them were the likeliest token, else 0.
        rows_N: mean number of rows that the slots that predict them see, themselves included.
        peak_bytes: of keys and values, the most that were held at once while a batch was read slot by slot (one sequence).
    """

    loss_N: Tensor
    exact_N: Tensor
    rows_N: Tensor

    @property
    def rows(self) -> float:
        return float(self.rows_N.mean())


def second_half(batch: Batch) -> Batch:
    """The batch with the targets of the first half of its slots taken out."""
    label_BT = batch.label_BT.clone()
    label_BT[:, : label_BT.shape[1] // 2] = IGNORE_INDEX
    return replace(batch, label_BT=label_BT)


def read(model: GPT, batch: Batch, cache: DecodingCache, chunk: int | None = None) -> Tensor:
    """Logits (B, T, V) of a batch read through a cache, ``chunk`` slots a pass (all at once by default)."""
    length = batch.token_BT.shape[1]
    logits = []
    for start in range(0, length, chunk or length):
        part = slice(start, start + (chunk or length))
        logits.append(
            model(
                batch.token_BT[:, part],
                position_BT=None if batch.position_BT is None else batch.position_BT[:, part],
                document_BT=None if batch.document_BT is None else batch.document_BT[:, part],
                cache=cache,
            )
        )
    return torch.cat(logits, dim=1)


def make_cache(rule: KeepRule | None) -> DecodingCache:
    """A cache of the rule; None: all rows."""
    return DecodingCache() if rule is None else PruningCache(rule)


def rows_seen(batch: Batch, rule: KeepRule | None, is_meta_BT: Tensor) -> Tensor:
    """How many rows each slot sees, itself included: int64 (B, T)."""
    cache = PruningCache(rule or KeepRule(batch.token_BT.shape[1], 0))
    cache.extend_rows(batch.document_BT, is_meta_BT)
    seen_BTS = cache.seen_rows()
    assert seen_BTS is not None  # noqa: S101
    return seen_BTS.sum(dim=2)


@torch.no_grad()
def score(model: GPT, batches: Iterable[Batch], rule: KeepRule | None) -> Scored:
    """Losses, exact matches and rows under a rule. One pass a batch: a pass sees what slot by slot it would see."""
    losses, exact, rows = [], [], []
    for batch in batches:
        logits_BTV = read(model, batch, make_cache(rule))
        counts_BT = batch.label_BT != IGNORE_INDEX
        loss_BT = F.cross_entropy(
            logits_BTV.transpose(1, 2), batch.label_BT, ignore_index=IGNORE_INDEX, reduction="none"
        )
        right_BT = (logits_BTV.argmax(dim=-1) == batch.label_BT) | ~counts_BT
        seen_BT = rows_seen(batch, rule, batch.token_BT == model.config.meta_token_id)
        targets_B = counts_BT.sum(dim=1)
        kept_B = targets_B > 0
        losses.append((loss_BT.sum(dim=1) / targets_B)[kept_B].double().cpu())
        rows.append(((seen_BT * counts_BT).sum(dim=1) / targets_B)[kept_B].double().cpu())
        exact.append(right_BT.all(dim=1)[kept_B].double().cpu())
    return Scored(torch.cat(losses), torch.cat(exact), torch.cat(rows))


@torch.no_grad()
def peak_bytes(model: GPT, batch: Batch, rule: KeepRule | None) -> int:
    """Bytes of the storages of keys and values after the slot at which they are most, one sequence read slot by slot."""
    one = Batch(
        batch.token_BT[:1],
        batch.label_BT[:1],
        None if batch.document_BT is None else batch.document_BT[:1],
        None if batch.position_BT is None else batch.position_BT[:1],
        None,
        batch.sample_ids[:1],
    )
    cache, most = make_cache(rule), 0
    for slot in range(one.token_BT.shape[1]):
        part = replace(
            one,
            token_BT=one.token_BT[:, slot : slot + 1],
            document_BT=None if one.document_BT is None else one.document_BT[:, slot : slot + 1],
            position_BT=None if one.position_BT is None else one.position_BT[:, slot : slot + 1],
        )
        read(model, part, cache)
        most = max(most, cache.allocated_bytes())
    return most


def matched_rules(rule: KeepRule, rows: float, rows_of_window: float, rows_before: float) -> dict[str, KeepRule]:
    """Rules that keep as many rows as a meta-token rule did.

    Args:
        rows: that it kept, on average.
        rows_of_window: those of its window and sinks alone.
        rows_before: those that it could have kept beside these.
    """
    extra = max(0.0, rows - rows_of_window)
    share = min(1.0, extra / rows_before) if rows_before > 0 else 0.0
    return {
        WINDOW: replace(rule, window=rule.window + round(extra), pinned="none"),
        RANDOM: replace(rule, pinned="random", share=share),
    }


def run_rules(
    model: GPT, batches: Sequence[Batch], windows: Sequence[int], seed: int, sinks: int = SINKS
) -> list[tuple[str, KeepRule | None, Scored, int]]:
    """All rows; then for each window the meta-token rule and those that are matched to it: (name, rule, scores, peak
    bytes)."""
    longest = max(batches, key=lambda batch: batch.token_BT.shape[1])
    full = score(model, batches, None)
    found: list[tuple[str, KeepRule | None, Scored, int]] = [(FULL, None, full, peak_bytes(model, longest, None))]
    for window in windows:
        rule = KeepRule(window, sinks, seed=seed)
        scored = score(model, batches, rule)
        alone = _mean_rows(model, batches, replace(rule, pinned="none"))
        rules = matched_rules(rule, scored.rows, alone, full.rows - alone)
        found.append((WITH_META, rule, scored, peak_bytes(model, longest, rule)))
        for name, other in rules.items():
            found.append((name, other, score(model, batches, other), peak_bytes(model, longest, other)))
    return found


def _mean_rows(model: GPT, batches: Sequence[Batch], rule: KeepRule) -> float:
    """As ``Scored.rows``, without running the model."""
    means = []
    for batch in batches:
        counts_BT = batch.label_BT != IGNORE_INDEX
        seen_BT = rows_seen(batch, rule, batch.token_BT == model.config.meta_token_id)
        targets_B = counts_BT.sum(dim=1)
        means.append(((seen_BT * counts_BT).sum(dim=1) / targets_B)[targets_B > 0].double())
    return float(torch.cat(means).mean())


def cache_sizes(subject: Subject, options: Options) -> list[Finding]:
    """Loss on held-out text against the rows that are kept."""
    batches = [second_half(batch) for batch in subject.held_out(options.num_samples, batch_size=8)]
    length = subject.form.sequence_length
    windows = sorted({max(1, round(share * length)) for share in SHARES})
    found = run_rules(subject.model, batches, windows, options.seed)
    return [_loss_finding(subject, options, found, len(found[0][2].loss_N))]


def rule_rows(found: Sequence[tuple[str, KeepRule | None, Scored, int]]) -> list[dict[str, Any]]:
    """A row a rule: what it keeps, its loss, and the loss over that of all rows, paired by sequence."""
    full = found[0][2]
    rows = []
    for name, rule, scored, size in found:
        loss, more = estimate(scored.loss_N), estimate(scored.loss_N - full.loss_N)
        rows.append(
            {
                "rule": name,
                "window": "" if rule is None else rule.window,
                "sinks": "" if rule is None else rule.sinks,
                "share": rule.share if rule is not None and rule.pinned == "random" else "",
                "rows": scored.rows,
                **loss.columns("loss (nats)"),
                "perplexity": math.exp(loss.mean),
                **more.columns("above all rows (nats)"),
                "peak bytes": size,
            }
        )
    return rows


def comparison(found: Sequence[tuple[str, KeepRule | None, Scored, int]], other: str) -> str:
    """By rule: at how many sizes the meta-token cache loses less than another rule of the same size."""
    ours = [scored for name, _, scored, _ in found if name == WITH_META]
    theirs = [scored for name, _, scored, _ in found if name == other]
    differences = [estimate(a.loss_N - b.loss_N) for a, b in zip(ours, theirs, strict=True)]
    better = sum(value.high < 0 for value in differences)
    worse = sum(value.low > 0 for value in differences)
    extreme = max(differences, key=lambda value: abs(value.mean))
    return (
        f"Against {'a longer window' if other == WINDOW else 'random rows'} of the same size it loses less at {better},"
        f" more at {worse} of {len(differences)} sizes (largest difference {extreme} nats), and the rest are not resolved."
    )


def _loss_finding(
    subject: Subject, options: Options, found: list[tuple[str, KeepRule | None, Scored, int]], sequences: int
) -> Finding:
    full = estimate(found[0][2].loss_N)
    shown = {
        name: [
            (scored.rows, estimate(scored.loss_N - found[0][2].loss_N), size)
            for rule, _, scored, size in found
            if rule == name
        ]
        for name in _STYLES
    }

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for name, points in shown.items():
            colour, marker, style = _STYLES[name]
            label = {
                WITH_META: "sinks, window, meta-tokens",
                WINDOW: "sinks, longer window",
                RANDOM: "sinks, window, random rows",
            }[name]
            for axes, x in ((left, [p[0] for p in points]), (right, [p[2] / 2**10 for p in points])):
                axes.plot(x, [p[1].mean for p in points], color=colour, marker=marker, linestyle=style, label=label)
                axes.fill_between(
                    x, [p[1].low for p in points], [p[1].high for p in points], color=colour, alpha=0.18, linewidth=0
                )
        left.axvline(found[0][2].rows, color=BLACK, linewidth=1, linestyle=":", label="all rows")
        right.axvline(found[0][3] / 2**10, color=BLACK, linewidth=1, linestyle=":", label="all rows")
        for axes in (left, right):
            axes.axhline(0, color=BLACK, linewidth=1)
            axes.set_xscale("log")
        finish(left, "rows seen (mean over targets)", "loss above that with all rows (nats)")
        finish(right, "largest size of keys and values (KiB a sequence)", "")

    said = f"{comparison(found, WINDOW)} {comparison(found, RANDOM)}"
    return Finding(
        name="cache-loss",
        section=SECTION,
        title="What is lost when the cache keeps few rows",
        caption=(
            f"{sequences} held-out sequences of {subject.form.sequence_length} slots with"
            f" {subject.form.num_meta_tokens} meta-tokens; targets of their second halves. With all rows the loss is"
            f" {full} nats. The meta-token cache keeps {SINKS} first rows, a window, and every meta-token's row in both"
            " branches; the two others keep as many rows on average, so that a meta-token's row, which has keys and"
            " values in both branches, is dearer in bytes (right). Bytes are of allocated storages, one sequence read"
            f" slot by slot. Bands are 95 % intervals over sequences, paired. {said} Kept rows keep their positions."
        ),
        draw=draw,
        tables={"rules": rule_rows(found)},
        facts={"sequences": sequences, "loss with all rows": full.mean, "seed": options.seed},
        size=(11.0, 5.0),
    )


def task_finding(subject: Subject, tasks: Mapping[str, Sequence[Batch]], seed: int) -> Finding:
    """Accuracy on task examples, by name, against the rows that are kept. The batches are those of a task evaluator."""
    found = {}
    for name, batches in tasks.items():
        length = max(batch.token_BT.shape[1] for batch in batches)
        windows = sorted({max(1, round(share * length)) for share in SHARES})
        found[name] = run_rules(subject.model, batches, windows, seed)

    def draw(figure: Any) -> None:
        columns = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
        for axes, (task, results) in zip(columns, found.items(), strict=True):
            for name, (colour, marker, style) in _STYLES.items():
                points = [(scored.rows, accuracy(scored)) for rule, _, scored, _ in results if rule == name]
                x, y = [p[0] for p in points], [100 * p[1].mean for p in points]
                axes.plot(x, y, color=colour, marker=marker, linestyle=style, label=name)
                axes.fill_between(
                    x,
                    [100 * p[1].low for p in points],
                    [100 * p[1].high for p in points],
                    color=colour,
                    alpha=0.18,
                    linewidth=0,
                )
            axes.axhline(
                100 * float(results[0][2].exact_N.mean()), color=BLACK, linewidth=1, linestyle=":", label="all rows"
            )
            axes.set_xscale("log")
            axes.set_ylim(-2, 102)
            axes.set_title(task, pad=60)
            finish(axes, "rows seen (mean over targets)", "accuracy (%)" if axes is columns[0] else "")

    examples = {name: len(results[0][2].exact_N) for name, results in found.items()}
    return Finding(
        name="cache-tasks",
        section=SECTION,
        title="Task accuracy when the cache keeps few rows",
        caption=(
            "Exact match of whole answers on test examples ("
            + ", ".join(f"{name}: {count}" for name, count in examples.items())
            + f"), under the rules of the figure before: {SINKS} first rows, a window, and the meta-tokens, a longer window,"
            " or random rows. Bands are 95 % intervals over examples."
        ),
        draw=draw,
        tables={
            "accuracy": [
                {
                    "task": task,
                    "rule": name,
                    "window": "" if rule is None else rule.window,
                    "rows": scored.rows,
                    **accuracy(scored).columns("accuracy"),
                    "peak bytes": size,
                }
                for task, results in found.items()
                for name, rule, scored, size in results
            ]
        },
        facts={"examples": examples, "seed": seed},
        size=(4.0 * len(found) + 1, 4.8),
    )


def accuracy(scored: Scored) -> Estimate:
    """Share of sequences all of whose targets were the likeliest token; Wilson's 95 % interval."""
    count, share, z = len(scored.exact_N), float(scored.exact_N.mean()), 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))
