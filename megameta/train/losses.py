"""The training loss of a batch, and its sums over many."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megameta.data.dataset import IGNORE_INDEX
from megameta.data.loader import Batch
from megameta.model import GPT, cross_entropy_sum


class LossModule(nn.Module):
    """The model and its loss in one forward pass, as DeepSpeed wants it."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the batch's cross-entropies in nats: a scalar."""
        logits_BTV = self.gpt(
            batch.token_BT,
            position_BT=batch.position_BT,
            document_BT=batch.document_BT,
            num_meta_columns=batch.num_meta_columns,
        )
        return cross_entropy_sum(logits_BTV, batch.label_BT)


def sum_losses(
    loss_sum: Callable[[Batch], Tensor], batches: Iterable[Batch], byte_counts: Tensor | None, device: str
) -> tuple[Tensor, int, int]:
    """(sum of losses in nats, float64; targets; bytes of the targets) over batches.

    Args:
        loss_sum: the sum of a batch's losses.
        byte_counts: (V,) bytes that each token stands for; without it bytes are 0.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    targets = num_bytes = 0
    for batch in batches:
        total += loss_sum(batch.to(device)).double()
        labels = batch.label_BT[batch.label_BT != IGNORE_INDEX]
        targets += labels.numel()
        num_bytes += int(byte_counts[labels].sum()) if byte_counts is not None else 0
    return total, targets, num_bytes
