"""Entropy, logits and mass of attention, by layer, head and sequence.

Letters: B batch, N sequences, T query rows, S key rows (= T), H heads, C layers.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from megameta.data.loader import Batch
from megameta.model import GPT
from megameta.paper.analysis.estimates import mean_over
from megameta.paper.analysis.observe import Attended, observed_attention
from megameta.paper.analysis.subject import Subject

#: Numbers that an analysis may hold at once: logits of a layer, (B, H, T, T).
_LOGITS = 1 << 26


@dataclass(frozen=True)
class Rows:
    """Which rows of a batch are looked at: text queries that see at least two text keys (an entropy of one key is 0
    whatever the model does), and of these those that see a meta-token. Both sets are the same text tokens with and
    without meta-tokens in the sequence, the second one aside, which is empty without."""

    is_meta_BT: Tensor
    query_BT: Tensor
    sees_meta_BT: Tensor

    @classmethod
    def of(cls, is_meta_BT: Tensor, visible_BTS: Tensor) -> "Rows":
        """From what a batch holds and who sees whom."""
        text_keys_BT = (visible_BTS & ~is_meta_BT[:, None]).sum(dim=-1)
        meta_keys_BT = (visible_BTS & is_meta_BT[:, None]).sum(dim=-1)
        query_BT = ~is_meta_BT & (text_keys_BT >= 2)
        return cls(is_meta_BT, query_BT, query_BT & (meta_keys_BT > 0))


def entropy_of(probability_BHTS: Tensor) -> Tensor:
    """Shannon entropy over keys in nats, (B, H, T)."""
    return torch.special.entr(probability_BHTS).sum(dim=-1)


def reduce_attention(seen: Attended, is_meta_BT: Tensor) -> dict[str, Tensor]:
    """Means of one layer over the rows of each sequence, float64 (B, H) by name.

    Over text queries: ``entropy`` (nats); ``normalised`` (over ln of the visible keys); ``uniform`` (that ln);
    ``text_entropy`` (of the attention to text keys alone, renormalised).
    Over text queries that see a meta-token: ``mass`` (probability on meta keys), ``share`` (meta keys among visible
    keys), ``largest`` (largest logit), ``meta_logit`` and ``text_logit`` (mean logit at meta keys, at text keys),
    ``boosted_entropy`` (as entropy).
    """
    rows = Rows.of(is_meta_BT, seen.visible_BTS)
    p_BHTS, visible_BTS = seen.probability_BHTS, seen.visible_BTS
    meta_keys_BTS = visible_BTS & is_meta_BT[:, None]
    text_keys_BTS = visible_BTS & ~is_meta_BT[:, None]
    keys_BHT = visible_BTS.sum(dim=-1)[:, None].expand(p_BHTS.shape[:3])
    entropy_BHT = entropy_of(p_BHTS)
    uniform_BHT = keys_BHT.double().log()
    text_BHTS = torch.where(text_keys_BTS[:, None], p_BHTS, 0)
    text_BHT = text_BHTS.sum(dim=-1)

    def at(keys_BTS: Tensor) -> Tensor:
        """Mean logit of a query over these keys."""
        total_BHT = torch.where(keys_BTS[:, None], seen.logit_BHTS, 0).sum(dim=-1)
        return total_BHT / keys_BTS.sum(dim=-1)[:, None]

    text_entropy_BHT = entropy_of(text_BHTS / text_BHT[..., None])
    queries, seers = rows.query_BT, rows.sees_meta_BT
    return {
        "entropy": mean_over(entropy_BHT, queries),
        "normalised": mean_over(entropy_BHT / uniform_BHT, queries),
        "uniform": mean_over(uniform_BHT, queries),
        "text_entropy": mean_over(text_entropy_BHT, queries),
        "mass": mean_over(1 - text_BHT.double(), seers),
        "share": mean_over((meta_keys_BTS.sum(dim=-1)[:, None] / keys_BHT), seers),
        "largest": mean_over(seen.logit_BHTS.amax(dim=-1), seers),
        "meta_logit": mean_over(at(meta_keys_BTS), seers),
        "text_logit": mean_over(at(text_keys_BTS), seers),
        "boosted_entropy": mean_over(entropy_BHT, seers),
    }


def is_meta_of(subject: Subject, batch: Batch) -> Tensor:
    """Which slots hold meta-tokens; none where the text was read without (the id may be that of a word)."""
    if not batch.num_meta_columns:
        return torch.zeros_like(batch.token_BT, dtype=torch.bool)
    return batch.token_BT == subject.form.meta_token_id


def batch_size(subject: Subject) -> int:
    """Sequences whose attention is looked at together."""
    model = subject.config.model
    return max(1, min(8, _LOGITS // (model.num_heads * subject.form.sequence_length**2)))


def attention_numbers(
    subject: Subject,
    num_samples: int,
    *,
    meta_tokens: bool = True,
    changed: Callable[[GPT], AbstractContextManager[None]] = lambda model: nullcontext(),
) -> dict[str, Tensor]:
    """``reduce_attention`` of the causal branch over held-out sequences: float64 (C, N, H) by name.

    Args:
        changed: a change of the model, for the time of this.
    """
    batches = subject.held_out(num_samples, meta_tokens=meta_tokens, batch_size=batch_size(subject))
    found: dict[str, list[Tensor]] = {}
    with changed(subject.model), torch.no_grad():
        for batch in batches:
            for name, value_CBH in _of_batch(subject, batch).items():
                found.setdefault(name, []).append(value_CBH)
    return {name: torch.cat(parts, dim=1) for name, parts in found.items()}


def _of_batch(subject: Subject, batch: Batch) -> dict[str, Tensor]:
    is_meta_BT = is_meta_of(subject, batch)
    layers: list[dict[str, Tensor]] = []
    with observed_attention(subject.model, lambda seen: layers.append(reduce_attention(seen, is_meta_BT))):
        subject.hidden_states(batch)
    return stacked(layers)


def stacked(layers: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """(B, H) a layer to (C, B, H), on the CPU."""
    layers = list(layers)
    return {name: torch.stack([layer[name] for layer in layers]).cpu() for name in layers[0]}
