"""Rules of what a cache keeps, run on batches: losses, exact matches, rows that are seen, bytes that are held.

Letters: B batch, T slots, S rows of a cache, D model width, N sequences with targets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megameta.data.dataset import IGNORE_INDEX
from megameta.data.loader import Batch
from megameta.model import GPT, DecodingCache, KeepRule, PruningCache, make_context

SINKS = 4
FULL, WITH_META, WINDOW, RANDOM = "all rows", "meta-tokens", "longer window", "random rows"


@dataclass(frozen=True)
class Scored:
    """What a rule gives.

    Attributes:
        loss_N: mean loss in nats of each sequence's targets.
        exact_N: 1 where all of them were the likeliest token, else 0.
        rows_N: mean number of rows that the slots which predict them see, themselves included.
    """

    loss_N: Tensor
    exact_N: Tensor
    rows_N: Tensor

    @property
    def rows(self) -> float:
        """Mean over sequences."""
        return float(self.rows_N.mean())


@dataclass(frozen=True)
class RuleResult:
    """One rule (None: all rows are kept), its scores, and the most bytes of keys and values (``peak_bytes``)."""

    name: str
    rule: KeepRule | None
    scored: Scored
    peak_bytes: int


def second_half(batch: Batch) -> Batch:
    """The batch with the targets of the first half of its slots taken out."""
    middle = batch.label_BT.shape[1] // 2
    label_BT = batch.label_BT.clone()
    label_BT[:, :middle] = IGNORE_INDEX
    return replace(batch, label_BT=label_BT, first_target=middle)


def make_cache(rule: KeepRule | None) -> DecodingCache:
    """A cache of the rule; None: all rows."""
    return DecodingCache() if rule is None else PruningCache(rule)


def read(model: GPT, batch: Batch, cache: DecodingCache) -> Tensor:
    """Hidden states (B, T, D) of a batch read in one pass through a cache."""
    context = make_context(
        model.config, batch.token_BT, position_BT=batch.position_BT, document_BT=batch.document_BT, cache=cache
    )
    return model.hidden_states(batch.token_BT, context, cache)


def rows_seen(model: GPT, batch: Batch, rule: KeepRule | None) -> Tensor:
    """Of each sequence with targets: rows that the slots which predict them see, themselves included, on average;
    float64 (N,). The model is not run."""
    cache = PruningCache(rule or KeepRule(batch.token_BT.shape[1], 0))
    cache.extend_rows(batch.document_BT, batch.token_BT == model.config.meta_token_id)
    seen_BTS = cache.seen_rows()
    if seen_BTS is None:
        raise RuntimeError("a cache with a rule always says what is seen")
    counts_BT = batch.label_BT != IGNORE_INDEX
    mean_B = (seen_BTS.sum(dim=2) * counts_BT).sum(dim=1) / counts_BT.sum(dim=1)
    return mean_B[counts_BT.any(dim=1)].double().cpu()


@torch.no_grad()
def score(model: GPT, batches: Iterable[Batch], rule: KeepRule | None) -> Scored:
    """Scores under a rule. One pass a batch: a pass sees what would be seen slot by slot."""
    losses, exact, rows = [], [], []
    for number, batch in enumerate(batches):
        drawn = None if rule is None else replace(rule, seed=rule.seed + number)  # random rows: others in each batch
        first = batch.first_target  # logits of earlier slots are for nothing
        x_BTD = read(model, batch, make_cache(drawn))[:, first:]
        logits_BTV = model.head(x_BTD, model.embedding.tokens.weight)
        label_BT = batch.label_BT[:, first:]
        counts_BT = label_BT != IGNORE_INDEX
        kept_B = counts_BT.any(dim=1)
        loss_BT = F.cross_entropy(logits_BTV.transpose(1, 2), label_BT, ignore_index=IGNORE_INDEX, reduction="none")
        right_BT = (logits_BTV.argmax(dim=-1) == label_BT) | ~counts_BT
        losses.append((loss_BT.double().sum(dim=1) / counts_BT.sum(dim=1))[kept_B].cpu())
        exact.append(right_BT.all(dim=1)[kept_B].double().cpu())
        rows.append(rows_seen(model, batch, drawn))
    return Scored(torch.cat(losses), torch.cat(exact), torch.cat(rows))


@torch.no_grad()
def peak_bytes(model: GPT, batch: Batch, rule: KeepRule | None, chunk: int = 32) -> int:
    """Bytes of the storages of keys and values, the most after any pass, the batch's first sequence read by chunks.

    While a pass runs, one layer at a time holds the chunk's rows, too.
    """
    cache, most = make_cache(rule), 0
    for start in range(0, batch.token_BT.shape[1], chunk):
        part = (slice(1), slice(start, start + chunk))
        document_BT = None if batch.document_BT is None else batch.document_BT[part]
        position_BT = None if batch.position_BT is None else batch.position_BT[part]
        read(model, Batch(batch.token_BT[part], batch.label_BT[part], document_BT, position_BT, None, ()), cache)
        most = max(most, cache.allocated_bytes())
    return most


def matched_rules(rule: KeepRule, rows: float, rows_alone: float, rows_of_all: float) -> dict[str, KeepRule]:
    """Rules that keep as many rows as a meta-token rule, on average over targets.

    Args:
        rows: that a target's slot sees under it.
        rows_alone: that it sees of window and sinks.
        rows_of_all: that it sees where all are kept.
    """
    extra, others = max(0.0, rows - rows_alone), rows_of_all - rows_alone
    share = min(1.0, extra / others) if others > 0 else 0.0
    return {
        WINDOW: replace(rule, window=rule.window + round(extra), pinned="none"),
        RANDOM: replace(rule, pinned="random", share=share),
    }


def run_rules(model: GPT, batches: Sequence[Batch], windows: Sequence[int], seed: int) -> list[RuleResult]:
    """All rows; then for each window the meta-token rule and those that are matched to it."""
    longest = max(batches, key=lambda batch: batch.token_BT.shape[1])

    def run(name: str, rule: KeepRule | None) -> RuleResult:
        return RuleResult(name, rule, score(model, batches, rule), peak_bytes(model, longest, rule))

    found = [run(FULL, None)]
    for window in windows:
        rule = KeepRule(window, SINKS, seed=seed)
        found.append(run(WITH_META, rule))
        parts = [rows_seen(model, batch, replace(rule, pinned="none")) for batch in batches]
        alone = float(torch.cat(parts).mean())
        others = matched_rules(rule, found[-1].scored.rows, alone, found[0].scored.rows)
        found += [run(name, other) for name, other in others.items()]
    return found
