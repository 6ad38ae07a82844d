"""Loss on a fixed held-out set: the same samples, and the same targets with and without meta-tokens."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megameta.config import RunConfig
from megameta.data.dataset import IGNORE_INDEX, Dataset, SampleFormat
from megameta.data.loader import Batch, collate
from megameta.data.sources import TEST, held_out_samples
from megameta.engine.engine import Engine
from megameta.engine.loss_module import Scores
from megameta.errors import UserError
from megameta.parallel.topology import Topology
from megameta.tokenizers import load_tokenizer


@dataclass(frozen=True)
class EvalResult:
    """Loss in nats a target; perplexity; bits per byte of the targets' text (None without a tokenizer)."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    targets: int

    @classmethod
    def of(cls, scores: Scores) -> "EvalResult":
        """From sums over the set."""
        loss = scores.loss_sum / max(1, scores.targets)
        bits = scores.loss_sum / math.log(2) / scores.num_bytes if scores.num_bytes else None
        return cls(loss, math.exp(min(loss, 700.0)), bits, scores.targets)

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}{bits} ({self.targets:,} targets)"


@dataclass(frozen=True)
class PositionResult:
    """Loss in nats a target and perplexity over the targets at positions ``first`` … ``last``; None without any.

    A target at position j is predicted from j tokens of text in its sequence (``Evaluator``)."""

    first: int
    last: int
    loss: float | None
    perplexity: float | None
    targets: int

    @classmethod
    def of(cls, scores: Scores, length: int) -> list["PositionResult"]:
        """From sums by bucket, of ``length`` positions."""
        count, found = len(scores.by_group), []
        for bucket, (loss_sum, targets) in enumerate(scores.by_group):
            first, end = (-(-b * length // count) for b in (bucket, bucket + 1))
            loss = loss_sum / targets if targets else None
            perplexity = None if loss is None else math.exp(min(loss, 700.0))
            found.append(cls(first + 1, end, loss, perplexity, targets))
        return found


def evenly_spread(wanted: int, count: int) -> list[int]:
    """``wanted`` of ``count`` numbers, evenly spread; all of them where there are fewer."""
    return [int(i) for i in np.linspace(0, count, min(wanted, count), endpoint=False)]


def evaluated_samples(config: RunConfig, dataset: Dataset) -> list[int]:
    """Which samples of a held-out set are evaluated: eval.num_samples of them, evenly spread."""
    return evenly_spread(config.eval.num_samples or len(dataset), len(dataset))


class Evaluator:
    """Evaluates an engine on the configured sets.

    A set's samples are L-token windows of its text in the order on disk, evenly spread; the same windows are read with
    meta-tokens injected and without, and by a twin with the same L. The first token of a window never counts, because a
    model without meta-tokens has nothing to predict it from. So every number is over the same targets (spec §4).

    Args:
        position_buckets: batches have groups, as many: the L targets that a window may have are numbered j = 1 … L by
            the text tokens before them (meta-tokens do not count, so that a twin's positions are the same), and target
            j is in group (j − 1) · buckets // L.

    Raises:
        UserError: more buckets than positions.
    """

    def __init__(self, config: RunConfig, topology: Topology, position_buckets: int = 0) -> None:
        self.config = config
        self.position_buckets = position_buckets
        if not 0 <= position_buckets <= config.data.text_per_sample:
            raise UserError(
                f"{position_buckets} buckets of positions: a sequence has {config.data.text_per_sample} tokens of text"
                " (data.sequence_length without its meta-tokens); give a number from 1 to that"
            )
        self.topology = topology
        form = replace(
            SampleFormat.of(config.data, config.model.meta_token_id, config.run.seed, config.model.vocab_size),
            skip_first_target=True,
        )
        forms = {"": form}
        if form.num_meta_tokens and config.eval.without_injection:
            forms["/no-meta"] = replace(form, num_meta_tokens=0)
        self.sets = {
            name + suffix: Dataset(samples, form)
            for name, samples in held_out_samples(config).items()
            for suffix, form in forms.items()
        }
        self.byte_counts: Tensor | None = None
        if config.data.tokenizer is not None:
            self.byte_counts = torch.from_numpy(load_tokenizer(config.data.tokenizer).token_bytes()).long()

    def names(self, *, final: bool) -> list[str]:
        """The sets to evaluate: all at the end of a run, all but those of ``data.split``'s test share before."""
        split = self.config.data.split is not None
        return [name for name in self.sets if final or not split or name.partition("/")[0] != TEST]

    def run(self, engine: Engine, names: list[str] | None = None) -> dict[str, EvalResult]:
        """Results by set name; "NAME/no-meta" is the same text without meta-tokens. Collective."""
        wanted = list(self.sets) if names is None else names
        return {name: EvalResult.of(engine.evaluate(self.batches(name), self.byte_counts)) for name in wanted}

    def batches(self, name: str) -> Iterator[Batch]:
        """This rank's batches of a set."""
        dataset = self.sets[name]
        micro, ranks = self.config.train.micro_batch_size, self.topology.data_parallel_size
        chosen = evaluated_samples(self.config, dataset)
        wanted = len(chosen)
        padded = -(-wanted // (micro * ranks)) * micro * ranks
        for first in range(self.topology.data_parallel_rank * micro, padded, micro * ranks):
            # Every rank must run as many passes (ZeRO 3 gathers in each): past the end, samples without targets.
            samples = [dataset[chosen[i] if i < wanted else chosen[0]] for i in range(first, first + micro)]
            batch = collate(samples, dataset.form.num_meta_tokens)
            batch.label_BT[max(0, wanted - first) :] = IGNORE_INDEX
            yield replace(batch, group_BT=self._buckets(batch, dataset.form)) if self.position_buckets else batch

    def _buckets(self, batch: Batch, form: SampleFormat) -> Tensor:
        """The bucket of each slot's target, int64 (B, T)."""
        is_text_BT = torch.ones_like(batch.token_BT)
        if form.num_meta_tokens:  # otherwise the id may be that of a word
            is_text_BT = (batch.token_BT != form.meta_token_id).long()
        position_BT = is_text_BT.cumsum(dim=1).clamp(min=1)  # leading meta-tokens have no target that counts
        return (position_BT - 1) * self.position_buckets // form.text_per_sample
