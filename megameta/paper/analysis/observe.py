"""Looking into a model while it computes, and changing one thing in it, without touching its weights or its code.

Everything is a context manager; after it the model is what it was, bit by bit, and has no hook. What is observed is
given to a function as it comes, layer by layer, and not kept: attention takes H · T · T numbers a layer.

Letters: B batch, T query rows, S key rows, H query heads, G key–value heads, K head width, D model width, M meta
columns.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from megameta.model import GPT, Attention, Block, Mask
from megameta.model.attention import Attend

BranchName = Literal["causal", "meta"]
PartName = Literal["causal", "meta", "mlp"]


@dataclass(frozen=True)
class Attended:
    """One call of one branch: of the meta branch rows and columns are the meta-tokens of each sequence, padded."""

    layer: int
    branch: BranchName
    logit_BHTS: Tensor
    """q · k / √K, float32; −∞ where the query does not see the key."""
    probability_BHTS: Tensor
    """Its softmax over keys, float32."""
    visible_BTS: Tensor
    """Whether the query sees the key, (B or 1, T, S)."""


SeeAttention = Callable[[Attended], None]
#: (level, x_BTD): level 0 is the embedding, level l the output of block l − 1.
SeeResidual = Callable[[int, Tensor], None]
#: (layer, part, what it adds to the residual): (B, T, D), of the meta branch (B, M, D)
SeePart = Callable[[int, PartName, Tensor], None]


def blocks_of(model: GPT) -> list[Block]:
    """The layers in order."""
    return [cast(Block, block) for block in model.blocks]


def visible_keys(mask: Mask, rows: int, keys: int, device: torch.device) -> Tensor:
    """What a mask allows, (B or 1, T, S) bool."""
    if (allowed_BTS := mask.allowed_BTS) is not None:
        return allowed_BTS
    everything = torch.ones(1, rows, keys, dtype=torch.bool, device=device)
    return everything.tril() if mask.causal else everything


def attention_logits(q_BHTK: Tensor, k_BGSK: Tensor, visible_BTS: Tensor) -> Tensor:
    """Scaled products, float32 (B, H, T, S), −∞ where unseen."""
    k_BHSK = k_BGSK.float().repeat_interleave(q_BHTK.shape[1] // k_BGSK.shape[1], dim=1)
    logit_BHTS = q_BHTK.float() @ k_BHSK.transpose(2, 3) / math.sqrt(q_BHTK.shape[-1])
    return logit_BHTS.masked_fill(~visible_BTS[:, None], -math.inf)


@contextmanager
def observed_attention(model: GPT, see: SeeAttention, branches: tuple[BranchName, ...] = ("causal",)) -> Iterator[None]:
    """Every attention of the model is shown to ``see`` while the block of this context runs.

    Outputs are those of the model's own kernel, bit by bit; logits and probabilities are computed beside it.
    """

    def watch(attend: Attend, layer: int, branch: BranchName) -> Attend:
        def attend_and_tell(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Mask) -> Tensor:
            with torch.no_grad(), torch.autocast(q_BHTK.device.type, enabled=False):
                visible_BTS = visible_keys(mask, q_BHTK.shape[2], k_BGSK.shape[2], q_BHTK.device)
                logit_BHTS = attention_logits(q_BHTK, k_BGSK, visible_BTS)
                see(Attended(layer, branch, logit_BHTS, logit_BHTS.softmax(dim=-1), visible_BTS))
            return attend(q_BHTK, k_BGSK, v_BGSK, mask)

        return attend_and_tell

    kept: list[tuple[Attention, Attend]] = []
    try:
        for layer, block in enumerate(blocks_of(model)):
            pairs: tuple[tuple[BranchName, Attention | None], ...] = (
                ("causal", block.attention),
                ("meta", block.meta_attention),
            )
            for branch, attention in pairs:
                if attention is not None and branch in branches:
                    kept.append((attention, attention.attend))
                    attention.attend = watch(attention.attend, layer, branch)
        yield
    finally:
        for attention, attend in kept:
            attention.attend = attend


@contextmanager
def _hooked(handles: Iterator[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def observed_residuals(model: GPT, see: SeeResidual) -> Iterator[None]:
    """The residual stream is shown to ``see``: the embedding as level 0, then the output of every block."""

    def tell(level: int, _module: nn.Module, _inputs: Any, x_BTD: Tensor) -> None:
        see(level, x_BTD.detach())

    modules = (model.embedding, *model.blocks)
    with _hooked(module.register_forward_hook(partial(tell, level)) for level, module in enumerate(modules)):
        yield


@contextmanager
def observed_parts(model: GPT, see: SeePart, see_source: Callable[[int, Tensor], None]) -> Iterator[None]:
    """What every part of every block adds to the residual stream is shown to ``see``; to ``see_source`` the rows that
    a layer's meta branch reads, before its norm, (B, M, D)."""

    def tell(layer: int, part: PartName, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        see(layer, part, output.detach())

    def tell_source(layer: int, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see_source(layer, inputs[0].detach())

    def handles() -> Iterator[torch.utils.hooks.RemovableHandle]:
        for layer, block in enumerate(blocks_of(model)):
            parts: tuple[tuple[PartName, nn.Module | None], ...] = (
                ("causal", block.attention),
                ("meta", block.meta_attention),
                ("mlp", block.mlp),
            )
            for part, module in parts:
                if module is not None:
                    yield module.register_forward_hook(partial(tell, layer, part))
            if block.norm_meta is not None:
                yield block.norm_meta.register_forward_pre_hook(partial(tell_source, layer))

    with _hooked(handles()):
        yield


@contextmanager
def switched_off(model: GPT, layers: Collection[int]) -> Iterator[None]:
    """The meta branch of these layers adds zero; layers without one are what they are."""

    def nothing(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    blocks = blocks_of(model)
    branches = (blocks[layer].meta_attention for layer in layers)
    with _hooked(branch.register_forward_hook(nothing) for branch in branches if branch is not None):
        yield


@contextmanager
def zeroed_meta_embedding(model: GPT) -> Iterator[None]:
    """The token embedding of meta-tokens is zero (model.zero_meta_embedding); learned positions stay."""
    kept = model.embedding.config
    model.embedding.config = replace(kept, zero_meta_embedding=True)
    try:
        yield
    finally:
        model.embedding.config = kept
