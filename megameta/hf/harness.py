"""lm-eval's view of an export (``lm_eval.api.model.LM``), with a policy for meta-tokens.

``lm_eval --model hf`` works on an export as it is, and treats meta-tokens as any other id. This class adds what it
cannot do: put meta-tokens into prompts and scored text by a policy, and leave their own slots out of every score.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from torch import Tensor

from megameta.hf.insertion import MetaPolicy, MetaTokenInserter, left_padded
from megameta.tokenizers import Tokenizer


class Scored(NamedTuple):
    """A sequence to be scored: ``ids`` with meta-tokens in it; targets are the ids from ``start`` on that are text."""

    ids: list[int]
    start: int


def place(context: Sequence[int], continuation: Sequence[int], policy: MetaPolicy, limit: int) -> Scored:
    """Context and continuation as the policy has them read, cut on the left to ``limit`` slots and one target.

    A meta-token that follows the context's last token stands before the continuation, so it may predict it.
    """
    before = policy.apply(context)
    ids = policy.apply([*context, *continuation])
    if ids[-1] == policy.meta_token_id:  # after the last target it can do nothing
        ids.pop()
    cut = max(0, len(ids) - limit - 1)
    return Scored(ids[cut:], max(1, len(before) - cut))


class HarnessModel(TemplateLM):
    """An export under lm-eval.

    Args:
        model: a causal language model of transformers in eval mode.
        max_length: slots of a sequence, meta-tokens included. Default: the model's window.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        policy: MetaPolicy,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokens, self.policy = model, tokenizer, policy
        self.batch_size = batch_size
        self.max_length = max_length or model.config.max_position_embeddings
        self._device = str(next(model.parameters()).device)

    # --- text -------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The document end."""
        return self.tokens.eod_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return self.tokens.digest()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any) -> list[int]:
        """Ids; ``<|meta|>`` is the meta-token, which the policy keeps or takes out."""
        return self.tokens.encode_prompt(string)

    # --- scores -----------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = [place(context, continuation, self.policy, self.max_length) for _, context, continuation in requests]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(found)
        for rows in self._batches([len(scored.ids) for scored in found]):
            for row, result in zip(rows, self._score([found[row] for row in rows]), strict=True):
                results[row] = result
                if requests[row][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[row][0], result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Sum of log-probabilities of a text, in windows that follow one another; meta-tokens take slots of a window,
        so windows hold as much less text."""
        results = []
        for request in requests:
            (string,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._text_slots(),
                context_len=1,
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._loglikelihood_tokens(pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
            results.append(total)
        return results

    def _text_slots(self) -> int:
        """Text tokens of a rolling window, so that with its meta-tokens it fits whatever the text is."""
        if self.policy.name == "every":
            return max(1, self.max_length - math.ceil(self.max_length / self.policy.every))
        return max(1, self.max_length // 2) if self.policy.name == "segments" else self.max_length

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Places of like lengths, the longest first."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for first in range(0, len(order), self.batch_size):
            yield order[first : first + self.batch_size]

    @torch.no_grad()
    def _score(self, batch: list[Scored]) -> list[tuple[float, bool]]:
        """(log-probability of the targets, whether each is the most likely token) of each sequence."""
        length = max(len(scored.ids) for scored in batch) - 1
        rows = [scored.ids[:-1] for scored in batch]
        # On the right, where nothing that is scored can see it.
        tokens = torch.tensor([ids + [self.eot_token_id] * (length - len(ids)) for ids in rows], device=self.device)
        logits_BTV = self.model(tokens).logits
        return [self._score_row(logits_BTV[i], scored) for i, scored in enumerate(batch)]

    def _score_row(self, logits_TV: Tensor, scored: Scored) -> tuple[float, bool]:
        wanted = [t for t in range(scored.start, len(scored.ids)) if scored.ids[t] != self.policy.meta_token_id]
        picked_NV = logits_TV[torch.tensor([t - 1 for t in wanted], device=logits_TV.device)].double()
        target_N = torch.tensor([scored.ids[t] for t in wanted], device=logits_TV.device)
        log_NV = picked_NV.log_softmax(dim=-1)
        total = log_NV.gather(1, target_N[:, None]).sum()
        return float(total), bool((log_NV.argmax(dim=-1) == target_N).all())

    # --- generation -------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string; meta-tokens that the policy writes are not part of them."""
        prompts = [self.policy.apply(self.tok_encode(request.args[0])) for request in requests]
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for members in groups.values():
            for rows in self._batches([len(prompts[i]) for i in members]):
                chosen = [members[row] for row in rows]
                texts = self._generate([prompts[i] for i in chosen], dict(requests[chosen[0]].args[1]))
                for index, text in zip(chosen, texts, strict=True):
                    results[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return results

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        until = settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        text_tokens = int(settings.pop("max_gen_toks", 256))
        slots = self._slots_for(text_tokens)
        room = max(1, self.max_length - slots)
        tokens, mask = left_padded([ids[-room:] for ids in prompts], self.eot_token_id, self.device)
        if not settings.get("do_sample"):
            settings = {"do_sample": False}
        output = self.model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=slots,
            pad_token_id=self.eot_token_id,
            eos_token_id=self.eot_token_id,
            logits_processor=[MetaTokenInserter(self.policy, mask)],
            **settings,
        )
        return [self._text(row, until, text_tokens) for row in output[:, tokens.shape[1] :].tolist()]

    def _slots_for(self, text_tokens: int) -> int:
        """Slots that so many text tokens take at most."""
        if self.policy.name == "every":
            return math.ceil(text_tokens * self.policy.every / (self.policy.every - 1)) + 1
        return 2 * text_tokens if self.policy.name == "segments" else text_tokens

    def _text(self, ids: list[int], until: list[str], text_tokens: int) -> str:
        if self.eot_token_id in ids:
            ids = ids[: ids.index(self.eot_token_id)]
        text = self.tokens.decode([token for token in ids if token != self.policy.meta_token_id][:text_tokens])
        for stop in until:
            text = text.split(stop)[0] if stop else text
        return text
