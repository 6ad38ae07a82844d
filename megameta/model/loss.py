"""The loss as a sum, to be divided by the step's count of valid targets (spec §1)."""

import torch.nn.functional as F
from torch import Tensor

#: Label of a position that has no loss.
IGNORE_INDEX = -100


def cross_entropy_sum(logits_BTV: Tensor, label_BT: Tensor) -> Tensor:
    """Sum of next-token cross-entropies, in nats, over labels that are not IGNORE_INDEX; at least float32, a scalar."""
    logits = logits_BTV.flatten(0, -2)
    logits = logits if logits.itemsize >= 4 else logits.float()
    return F.cross_entropy(logits, label_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
