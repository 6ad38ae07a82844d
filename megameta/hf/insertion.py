"""Where meta-tokens stand in text that a trained model reads or writes; copied into exports.

Training puts M = k · T of them at random places among T slots. At inference there is a choice; these are the policies:

- ``none``: no meta-tokens; those that a prompt holds are taken out.
- ``given``: those that the prompt holds (``<|meta|>`` in its text), no others.
- ``every``: every n-th slot, that is one after each n − 1 text tokens (n = 10 is the share of k = 0.1).
- ``segments``: one after each token that ends a segment (a newline, say).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

PolicyName = Literal["none", "given", "every", "segments"]
POLICIES: tuple[PolicyName, ...] = ("none", "given", "every", "segments")


@dataclass(frozen=True)
class MetaPolicy:
    """One policy.

    Attributes:
        every: n of ``every``, 2 or more.
        segment_ends: ids after which ``segments`` puts a meta-token.

    Raises:
        ValueError: values that do not fit the policy.
    """

    name: PolicyName
    meta_token_id: int
    every: int = 10
    segment_ends: frozenset[int] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise ValueError(f"no policy {self.name!r} for meta-tokens; there are {', '.join(POLICIES)}")
        if self.name == "every" and self.every < 2:
            raise ValueError(f"a meta-token in every {self.every}th slot: at least 2, so that text stands between them")
        if self.name == "segments" and (not self.segment_ends or self.meta_token_id in self.segment_ends):
            raise ValueError("policy segments needs the ids of tokens that end segments, the meta-token not among them")

    def apply(self, ids: Sequence[int]) -> list[int]:
        """A sequence of ids as this policy has the model read it. The text in it stays as it is."""
        if self.name == "given":
            return list(ids)
        found: list[int] = []
        for token in ids:
            if token == self.meta_token_id:
                continue
            found.append(token)
            if self.inserts_after(len(found), token):
                found.append(self.meta_token_id)
        return found

    def inserts_after(self, length: int, last: int) -> bool:
        """Whether the slot after ``length`` slots, the last of which holds ``last``, is a meta-token."""
        if not length or last == self.meta_token_id:
            return False
        if self.name == "segments":
            return last in self.segment_ends
        return self.name == "every" and length % self.every == self.every - 1


class MetaTokenInserter(LogitsProcessor):
    """Has ``generate`` write the meta-tokens of a policy: at their slots nothing else can be chosen, elsewhere they
    cannot. It comes after all other processors (as those given to ``generate`` do), so that none forbids its choice.

    Rows of a batch have slots of their own: row b's slots are counted from its first one that is not padding.

    Args:
        prompt_mask_BT: 0 where the prompt is padded on the left; None: nowhere.
    """

    def __init__(self, policy: MetaPolicy, prompt_mask_BT: Tensor | None = None) -> None:
        self.policy = policy
        self._padding_B = None if prompt_mask_BT is None else (prompt_mask_BT == 0).sum(dim=1).tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, T) ids so far and (B, V) scores to scores."""
        policy, length = self.policy, input_ids.shape[1]
        padding = self._padding_B or [0]
        repeats = max(1, len(input_ids) // len(padding))  # beams, or several samples of a prompt
        lasts = input_ids[:, -1].tolist()
        forced = [policy.inserts_after(length - padding[row // repeats], last) for row, last in enumerate(lasts)]
        forced_B1 = torch.tensor(forced, device=scores.device)[:, None]
        scores = scores.clone()
        scores[:, policy.meta_token_id] = -torch.inf
        only_meta = torch.full_like(scores, -torch.inf)
        only_meta[:, policy.meta_token_id] = 0
        return torch.where(forced_B1, only_meta, scores)


def left_padded(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Rows of ids as a batch for ``generate``: (B, T) ids, padded on the left, and their mask, 0 at padding."""
    length = max(map(len, rows))
    tokens = torch.tensor([[pad_id] * (length - len(ids)) + list(ids) for ids in rows], device=device)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows], device=device)
    return tokens, mask


def segment_ends_of(spellings: Sequence[bytes], among: Collection[bytes] = (b"\n",)) -> frozenset[int]:
    """Ids of tokens whose bytes end with one of ``among`` (a newline)."""
    return frozenset(index for index, spelling in enumerate(spellings) if spelling.endswith(tuple(among)))
