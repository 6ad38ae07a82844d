"""The training loss of a batch, and its sums over many."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megameta.data.dataset import IGNORE_INDEX
from megameta.data.loader import Batch
from megameta.model import GPT, make_context
from megameta.parallel.groups import TensorParallel
from megameta.parallel.losses import loss_functions
from megameta.parallel.tensor_parallel import shard_context


class LossModule(nn.Module):
    """The model and its loss in one forward pass, as DeepSpeed wants it.

    Args:
        fused: losses come from hidden states, and no logits of a whole batch exist (``fused_loss``).
        compiled: of ``fused_cross_entropy_sum``.
    """

    def __init__(
        self,
        gpt: GPT,
        tensor_parallel: TensorParallel | None = None,
        *,
        fused: bool = False,
        compiled: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.gpt = gpt
        self.tensor_parallel = tensor_parallel
        self.fused = fused
        self.cross_entropy, self.score = loss_functions(gpt.config, tensor_parallel, fused=fused, compiled=compiled)

    def forward(self, batch: Batch, score: bool = False, num_groups: int = 0) -> Tensor:
        """Sum of the batch's cross-entropies in nats, a scalar; with ``score``: of ``score_function``, (3 + G,)."""
        context = make_context(
            self.gpt.config,
            batch.token_BT,
            position_BT=batch.position_BT,
            document_BT=batch.document_BT,
            num_meta_columns=batch.num_meta_columns,
            document_runs=batch.document_runs,
        )
        context = shard_context(context, self.tensor_parallel)
        x_BTD = self.gpt.hidden_states(batch.token_BT, context)
        # Where loss is on answers alone most logits are for nothing. (Sharded sequences are not cut by columns.)
        first = batch.first_target if self.tensor_parallel is None else 0
        label_BT = batch.label_BT[:, first:]
        loss = partial(self.cross_entropy, label_BT=label_BT)
        if score:
            group_BT = batch.group_BT if batch.group_BT is None else batch.group_BT[:, first:]
            loss = partial(self.score, label_BT=label_BT, group_BT=group_BT, num_groups=num_groups)
        # What is fused is computed inside the head, where ZeRO 3 has its weights.
        x_BTD, weight_PD = x_BTD[:, first:], self.gpt.embedding.tokens.weight
        return self.gpt.head(x_BTD, weight_PD, loss) if self.fused else loss(self.gpt.head(x_BTD, weight_PD))


@dataclass(frozen=True)
class Scores:
    """Sums over batches: losses in nats; targets, the UTF-8 bytes they stand for, those that were the most likely
    token; rows with targets, those all of whose targets were."""

    loss_sum: float
    targets: int
    num_bytes: int
    correct: int
    rows: int
    exact: int
    by_group: tuple[tuple[float, int], ...] = ()
    """(loss in nats, targets) of each group of targets."""


def sum_scores(
    score: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    byte_counts: Tensor | None,
    device: str,
    num_groups: int = 0,
) -> tuple[Tensor, list[int]]:
    """(float64 (3 + G,) as of ``score_function``; targets, their bytes, rows, targets by group) over batches.

    Args:
        score: of one batch, (3 + G,).
        byte_counts: (V,) bytes that each token stands for; without it bytes are 0.
        num_groups: G, where batches have groups.
    """
    total = torch.zeros(3 + num_groups, dtype=torch.float64, device=device)
    counts = [0] * (3 + num_groups)
    for batch in batches:
        total += score(batch.to(device))
        counts = [a + b for a, b in zip(counts, count_targets(batch, byte_counts, num_groups), strict=True)]
    return total, counts


def make_scores(total: Sequence[float], counts: Sequence[int]) -> Scores:
    """From what ``sum_scores`` gives."""
    groups = tuple(zip(total[3:], counts[3:], strict=True))
    return Scores(total[0], counts[0], counts[1], round(total[1]), counts[2], round(total[2]), groups)


def count_targets(batch: Batch, byte_counts: Tensor | None, num_groups: int = 0) -> list[int]:
    """Targets, bytes that they stand for, rows that have any; then targets by group."""
    counts_BT = batch.label_BT != IGNORE_INDEX
    labels = batch.label_BT[counts_BT]
    num_bytes = int(byte_counts[labels].sum()) if byte_counts is not None else 0
    counts = [labels.numel(), num_bytes, int(counts_BT.any(dim=1).sum())]
    if batch.group_BT is None:
        return counts
    return counts + torch.bincount(batch.group_BT[counts_BT], minlength=num_groups).tolist()
