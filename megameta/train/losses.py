"""The training loss of a batch, and its sums over many."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megameta.data.dataset import IGNORE_INDEX
from megameta.data.loader import Batch
from megameta.model import GPT, make_context
from megameta.parallel.groups import TensorParallel
from megameta.parallel.pipeline import loss_function
from megameta.parallel.tensor_parallel import shard_context


class LossModule(nn.Module):
    """The model and its loss in one forward pass, as DeepSpeed wants it."""

    def __init__(self, gpt: GPT, tensor_parallel: TensorParallel | None = None) -> None:
        super().__init__()
        self.gpt = gpt
        self.tensor_parallel = tensor_parallel
        self.cross_entropy = loss_function(gpt.config, tensor_parallel)

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the batch's cross-entropies in nats: a scalar."""
        context = make_context(
            self.gpt.config,
            batch.token_BT,
            position_BT=batch.position_BT,
            document_BT=batch.document_BT,
            num_meta_columns=batch.num_meta_columns,
        )
        context = shard_context(context, self.tensor_parallel)
        x_BTD = self.gpt.hidden_states(batch.token_BT, context)
        return self.cross_entropy(self.gpt.head(x_BTD, self.gpt.embedding.tokens.weight), batch.label_BT)


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
        counts = count_targets(batch, byte_counts)
        targets, num_bytes = targets + counts[0], num_bytes + counts[1]
    return total, targets, num_bytes


def count_targets(batch: Batch, byte_counts: Tensor | None) -> tuple[int, int]:
    """(targets, bytes that they stand for) of a batch."""
    labels = batch.label_BT[batch.label_BT != IGNORE_INDEX]
    return labels.numel(), int(byte_counts[labels].sum()) if byte_counts is not None else 0
