"""Tensor parallelism, applied to the plain model from one table.

A module that the table names holds 1/n of its weight, and computes with it as the plain one does; the number of heads
follows from the projections' widths. What travels, travels where a branch begins and ends:

    attention, mlp            begin: copy_to_shards (sequence parallel: gather_sequence), once for all projections
                              end:   reduce_shards (scatter_sequence), inside the row-sharded projection
    meta_attention            begin: copy_to_shards, end: reduce_shards: its M rows are on every rank (ShardedMetaRows)
    embedding, head           vocabulary-sharded; the loss works on sharded logits

Under sequence parallelism the residual stream between branches, with its norms, is sharded along T.
"""

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megameta.model import Context, MetaRows, ModelConfig
from megameta.parallel.collectives import (
    copy_to_shards,
    gather_sequence,
    reduce_shards,
    scatter_sequence,
    split_sequence,
)
from megameta.parallel.groups import TensorParallel

Kind = Literal["column", "row", "vocabulary"]

#: Module path → how its weight is sharded: column (output features), row (input features), vocabulary (entries).
#: Everything that is not named is on every rank.
TABLE: dict[str, Kind] = {
    r"embedding\.tokens": "vocabulary",
    r"blocks\.\d+\.(attention|meta_attention)\.[qkv]_proj": "column",
    r"blocks\.\d+\.(attention|meta_attention)\.o_proj": "row",
    r"blocks\.\d+\.mlp\.(up_proj|gate_proj)": "column",
    r"blocks\.\d+\.mlp\.down_proj": "row",
    r"head\.output": "vocabulary",
}

#: Parameters on every rank whose gradients are partial there, because each rank sees its own heads …
PARTIAL_BY_HEADS = re.compile(r"blocks\.\d+\.(attention|meta_attention)\.[qk]_norm\.weight")
#: … or, under sequence parallelism, its own rows. Not norm_meta and meta_attention's bias: all M rows are everywhere.
PARTIAL_BY_ROWS = re.compile(
    r"blocks\.\d+\.(norm_[12]\.(weight|bias)|attention\.o_proj\.bias|mlp\.down_proj\.bias)|head\.norm\.(weight|bias)"
)


@dataclass(frozen=True)
class Shard:
    """Which part of a parameter a rank holds: entries start … stop − 1 of a dimension."""

    dim: int
    start: int
    stop: int


def kind_of(module_path: str) -> Kind | None:
    """How the table shards a module of the plain ``GPT``, None where it does not."""
    return next((kind for pattern, kind in TABLE.items() if re.fullmatch(pattern, module_path)), None)


def shard_dim(name: str) -> int | None:
    """The dimension of a parameter, by canonical name, that is sharded; None for one that every rank holds."""
    path, _, leaf = name.rpartition(".")
    kind = kind_of(path)
    if kind is None or (kind == "row" and leaf == "bias"):
        return None
    return 1 if kind == "row" else 0


def shard_of(name: str, shape: tuple[int, ...], config: ModelConfig, rank: int, size: int) -> Shard | None:
    """What ``rank`` of ``size`` holds of a parameter of this logical shape. Of the vocabulary, padded to a multiple of
    128 · size, a rank may hold padding alone: an empty shard."""
    dim = shard_dim(name)
    if dim is None or size == 1:
        return None
    if kind_of(name.rpartition(".")[0]) == "vocabulary":
        width = vocabulary_multiple(config, size)
        return Shard(dim, *(min(r * width, config.vocab_size) for r in (rank, rank + 1)))
    width = shape[dim] // size
    return Shard(dim, rank * width, (rank + 1) * width)


def vocabulary_multiple(config: ModelConfig, size: int) -> int:
    """Rows of the padded vocabulary that each of ``size`` ranks holds (spec §2: padded to 128 × size)."""
    return config.padded_vocab_size(128 * size) // size


class RowParallelLinear(nn.Linear):
    """A linear layer over this rank's input features, whose outputs are summed over the ranks before the bias."""

    def __init__(self, full: nn.Linear, tp: TensorParallel, *, scatters: bool) -> None:
        super().__init__(full.in_features // tp.size, full.out_features, bias=full.bias is not None, device="meta")
        self.tp = tp
        self.sum_shards = scatter_sequence if scatters else reduce_shards

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, F / n) to (B, T, D); (B, T / n, D) where it scatters."""
        y = self.sum_shards(F.linear(x, self.weight), self.tp)
        return y if self.bias is None else y + self.bias


class VocabularyParallelEmbedding(nn.Embedding):
    """An embedding table that holds this rank's entries of the vocabulary."""

    def __init__(self, rows: int, width: int, tp: TensorParallel) -> None:
        super().__init__(rows, width, device="meta")
        self.tp = tp

    def forward(self, token_BT: Tensor) -> Tensor:
        """(B, T) int64 to (B, T, D), the same on every rank."""
        row_BT = token_BT - self.tp.rank * self.num_embeddings
        outside_BT = (row_BT < 0) | (row_BT >= self.num_embeddings)
        x_BTD = F.embedding(row_BT.masked_fill(outside_BT, 0), self.weight)
        return reduce_shards(x_BTD.masked_fill(outside_BT[..., None], 0), self.tp)


@dataclass(frozen=True)
class ShardedMetaRows(MetaRows):
    """Meta rows of a residual stream that is sharded along T. The M rows themselves are held by every rank: taking them
    sums what each contributes (an all-reduce of B · M · D), and adding back keeps each rank's own rows (backward: the
    same all-reduce). So the branch between the two is computed as it is without sequence parallelism.
    """

    tp: TensorParallel
    is_own_BM: Tensor
    """Whether the column is a meta-token of this rank's rows."""

    @classmethod
    def of(cls, rows: MetaRows, length: int, tp: TensorParallel) -> "ShardedMetaRows":
        """From the rows of whole sequences of ``length``."""
        batch, columns = rows.is_real_BM.shape
        local = length // tp.size
        row_BM = rows.index_R.view(batch, columns) % length - tp.rank * local
        is_own_BM = rows.is_real_BM & (row_BM >= 0) & (row_BM < local)
        offset_B1 = torch.arange(batch, device=row_BM.device)[:, None] * local
        index_R = (row_BM.masked_fill(~is_own_BM, 0) + offset_B1).flatten()
        return cls(index_R, rows.is_real_BM, rows.mask, rows.rotation, tp, is_own_BM)

    def take(self, x_BSD: Tensor, y_BSD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x, or its sum with y: own rows; the meta rows of all ranks' sums: (B, M, D), the same on every rank)."""
        x_BSD, rows_BMD = super().take(x_BSD, y_BSD)
        return x_BSD, reduce_shards(rows_BMD.masked_fill(~self.is_own_BM[..., None], 0), self.tp)

    def add_(self, x_BSD: Tensor, y_BMD: Tensor) -> Tensor:
        """Own rows of x with y added where they are meta-tokens, in place."""
        own = replace(self, is_real_BM=self.is_own_BM)
        return MetaRows.add_(own, x_BSD, copy_to_shards(y_BMD, self.tp))


def shard_context(context: Context, tp: TensorParallel | None) -> Context:
    """The context for blocks whose residual stream is sharded along T, where it is."""
    if tp is None or not tp.sequence_parallel or context.meta is None:
        return context
    length = context.is_meta_BT.shape[1]
    return replace(context, meta=ShardedMetaRows.of(context.meta, length, tp))


def apply_tensor_parallel(model: nn.Module, config: ModelConfig, tp: TensorParallel) -> None:
    """Make a model on the meta device tensor-parallel, in place: a ``GPT`` or a stage with the same module paths.

    Parameters become shards, without values yet; ``prepare_parameters`` must follow once they have some.
    """
    for path, module in list(model.named_modules()):
        if kind := kind_of(path):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _shard_module(module, kind, path, config, tp))
        elif re.fullmatch(r"blocks\.\d+\.(attention|mlp)", path):
            collective = gather_sequence if tp.sequence_parallel else copy_to_shards
            module.register_forward_pre_hook(partial(_enter, collective, tp))
        elif re.fullmatch(r"blocks\.\d+\.meta_attention", path):
            module.register_forward_pre_hook(partial(_enter, copy_to_shards, tp))
        elif path == "head":
            _enter_head(module, config, tp)
        elif path == "embedding" and tp.sequence_parallel:
            module.register_forward_hook(lambda _module, _arguments, x_BTD: split_sequence(x_BTD, tp))


def _shard_module(module: Any, kind: Kind, path: str, config: ModelConfig, tp: TensorParallel) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return VocabularyParallelEmbedding(vocabulary_multiple(config, tp.size), module.embedding_dim, tp)
    if kind == "row":
        return RowParallelLinear(module, tp, scatters=tp.sequence_parallel and "meta_attention" not in path)
    rows = vocabulary_multiple(config, tp.size) if kind == "vocabulary" else module.out_features // tp.size
    return nn.Linear(module.in_features, rows, bias=module.bias is not None, device="meta")


def _enter(collective: Any, tp: TensorParallel, _module: nn.Module, arguments: tuple) -> tuple:
    return (collective(arguments[0], tp), *arguments[1:])


def _enter_head(head: Any, config: ModelConfig, tp: TensorParallel) -> None:
    """Rows of all ranks behind the final norm, and logits of this rank's entries of the vocabulary."""
    width = vocabulary_multiple(config, tp.size)
    head.vocab_size = max(0, min(width, config.vocab_size - tp.rank * width))
    collective = gather_sequence if tp.sequence_parallel else copy_to_shards
    head.norm.register_forward_hook(lambda _module, _arguments, x: collective(x, tp))


def prepare_parameters(model: nn.Module, tp: TensorParallel) -> None:
    """Mark the shards, which DeepSpeed's norm counts on every rank (``tensor_model_parallel``), and hook the parameters
    that every rank holds and of which it sees a part: their gradients are summed in backward, before any engine sees
    them, so that this holds under every ZeRO stage and in every pipeline."""
    for name, parameter in model.named_parameters():
        if shard_dim(name) is not None:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        by_rows = tp.sequence_parallel and PARTIAL_BY_ROWS.fullmatch(name)
        if by_rows or PARTIAL_BY_HEADS.fullmatch(name):
            parameter.register_hook(partial(_sum_gradient, tp))


def _sum_gradient(tp: TensorParallel, grad: Tensor) -> Tensor:
    grad = grad.clone()
    torch.distributed.all_reduce(grad, group=tp.group)
    return grad
