"""A GPT-2-shaped transformer with the meta-attention branch (spec §2).

    x = x + CausalAttention(norm_1(x))
    x = x + MetaAttention(norm_meta(x))      # adds exactly zero at positions that hold no meta-token
    x = x + MLP(norm_2(x))

Letters: B batch, T rows, D model width, F feed-forward width, V vocabulary (logical), P vocabulary (padded).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megameta.model.attention import Attention, product_dtype
from megameta.model.cache import DecodingCache
from megameta.model.config import ModelConfig
from megameta.model.context import Context, DocumentRuns, MetaRows, make_context


def make_norm(config: ModelConfig) -> nn.Module:
    """The configured normalisation over D."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


class Embedding(nn.Module):
    """Token vectors, plus position vectors under ape."""

    def __init__(self, config: ModelConfig, vocab_multiple: int) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.padded_vocab_size(vocab_multiple), config.hidden_size)
        self.positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.position == "ape" else None
        )

    def forward(self, token_BT: Tensor, context: Context) -> Tensor:
        """(B, T) int64 to (B, T, D)."""
        x_BTD = self.tokens(token_BT)
        is_meta = context.is_meta_BT[..., None]
        if self.config.zero_meta_embedding:
            x_BTD = x_BTD.masked_fill(is_meta, 0)
        if self.positions is not None:
            position_BTD = self.positions(context.position_BT)
            if self.config.zero_meta_positions:
                position_BTD = position_BTD.expand_as(x_BTD).masked_fill(is_meta, 0)
            x_BTD = x_BTD + position_BTD
        return x_BTD


class MLP(nn.Module):
    """Two projections around the activation; swiglu has a third, the gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.up_proj = nn.Linear(width, inner, bias=config.bias)
        self.gate_proj = nn.Linear(width, inner, bias=config.bias) if config.activation == "swiglu" else None
        self.down_proj = nn.Linear(inner, width, bias=config.bias)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x_BTD = x_BTD.to(product_dtype(x_BTD))
        h_BTF = self.up_proj(x_BTD)
        if self.gate_proj is not None:
            h_BTF = F.silu(self.gate_proj(x_BTD)) * h_BTF
        else:
            h_BTF = F.gelu(h_BTF, approximate=self.approximate)
        return self.down_proj(h_BTF)


class Block(nn.Module):
    """One layer: causal attention, meta-attention (if this layer has it), MLP."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.parallel_residual = config.parallel_residual
        self.norm_1 = make_norm(config)
        self.attention = Attention(config, layer)
        has_meta = config.layer_has_meta(layer)
        self.norm_meta = make_norm(config) if has_meta else None
        self.meta_attention = Attention(config, layer) if has_meta else None
        self.meta_layer = config.count_meta_layers(0, layer)  # its number among the layers that have the branch
        self.norm_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, context: Context, cache: DecodingCache | None = None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        rows = context.meta if self.meta_attention is not None else None
        if rows is not None and self.parallel_residual:
            x_BTD, source_BMD = rows.take(x_BTD)
        update = partial(cache.update_causal, self.layer) if cache is not None else None
        out_BTD = self.attention(self.norm_1(x_BTD), context.rotation, context.mask, update)
        if rows is None or self.parallel_residual:
            out_BTD = x_BTD + out_BTD
        else:
            out_BTD, source_BMD = rows.take(x_BTD, out_BTD)
        if rows is not None:
            out_BTD = rows.add_(out_BTD, self.branch(source_BMD, rows, cache))
        return out_BTD + self.mlp(self.norm_2(x_BTD if self.parallel_residual else out_BTD))

    def branch(self, x_BMD: Tensor, rows: MetaRows, cache: DecodingCache | None = None) -> Tensor:
        """The meta branch of the meta rows (B, M, D) alone: its cost is M rows, not T."""
        if self.norm_meta is None or self.meta_attention is None:
            raise ValueError(f"layer {self.layer} has no meta branch")
        update = partial(cache.update_meta, self.meta_layer) if cache is not None else None
        # The norm works row by row, so it may come after the rows are taken.
        return self.meta_attention(self.norm_meta(x_BMD), rows.rotation, rows.mask, update)


def make_logits(x_BTD: Tensor, weight_PD: Tensor, vocab_size: int, *, padded: bool) -> Tensor:
    """(B, T, D) times the first V rows of the weight: logits (B, T, V).

    Args:
        padded: multiply by all P rows and cut columns off. Rows of V logits start at addresses that a GPU multiplies
            slowly, in each of three products. On a CPU that costs more: log-softmax would copy all logits first.
    """
    if padded:
        return F.linear(x_BTD, weight_PD)[..., :vocab_size]
    return F.linear(x_BTD, weight_PD[:vocab_size])


class Head(nn.Module):
    """Final norm and the projection to the vocabulary, whose weight is the embedding's where they are tied."""

    def __init__(self, config: ModelConfig, vocab_multiple: int) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.norm = make_norm(config)
        self.output = (
            None
            if config.tie_embeddings
            else nn.Linear(config.hidden_size, config.padded_vocab_size(vocab_multiple), bias=False)
        )

    def forward(self, x_BTD: Tensor, embedding_PD: Tensor, project: Callable | None = None) -> Any:
        """(B, T, D) to logits (B, T, V); padding rows of the vocabulary take no part, so their gradient is zero.

        Args:
            project: what is made of normalised x (B, T, D) and the weight (V, D) in place of logits.
        """
        weight_PD = embedding_PD if self.output is None else self.output.weight
        x_BTD = self.norm(x_BTD)
        if project is not None:
            return project(x_BTD, weight_PD[: self.vocab_size])
        # A shard of padding alone has no logits, and ZeRO 3's stand-in for F.linear has no gradient for no rows.
        padded = x_BTD.is_cuda or self.vocab_size == 0
        return make_logits(x_BTD, weight_PD, self.vocab_size, padded=padded)


def run_blocks(
    blocks: Iterable[nn.Module],
    x_BTD: Tensor,
    context: Context,
    cache: DecodingCache | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """(B, T, D) through blocks in order. ``recompute`` keeps only their inputs for the backward pass."""
    for block in blocks:
        # Nothing in a block draws, so no generator's state is read, which the host of a GPU would wait for.
        run = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False) if recompute else block
        x_BTD = run(x_BTD, context, cache)
    return x_BTD


class GPT(nn.Module):
    """The whole model in one process.

    Args:
        vocab_multiple: the embedding tables are padded to a multiple of this (spec §2); padding rows stay zero.
    """

    def __init__(self, config: ModelConfig, vocab_multiple: int = 128) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = Embedding(config, vocab_multiple)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.head = Head(config, vocab_multiple)

    def hidden_states(self, token_BT: Tensor, context: Context, cache: DecodingCache | None = None) -> Tensor:
        """Token ids (B, T) and their ``make_context`` to the last block's output (B, T, D)."""
        recompute = self.activation_checkpointing and self.training
        return run_blocks(self.blocks, self.embedding(token_BT, context), context, cache, recompute=recompute)

    def forward(
        self,
        token_BT: Tensor,
        *,
        position_BT: Tensor | None = None,
        document_BT: Tensor | None = None,
        num_meta_columns: int | None = None,
        document_runs: DocumentRuns | None = None,
        cache: DecodingCache | None = None,
    ) -> Tensor:
        """Token ids (B, T) to logits (B, T, V). The arguments are those of ``make_context``."""
        context = make_context(
            self.config,
            token_BT,
            position_BT=position_BT,
            document_BT=document_BT,
            num_meta_columns=num_meta_columns,
            document_runs=document_runs,
            cache=cache,
        )
        return self.head(self.hidden_states(token_BT, context, cache), self.embedding.tokens.weight)
