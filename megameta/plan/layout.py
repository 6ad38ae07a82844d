"""A division of the work, as numbers: how many ranks share what, and which parameters each of them holds.

Pure functions of a configuration; no process group is needed, so that a layout for 1024 GPUs is judged on a laptop.
Letters: D model width, F feed-forward width, K head width, P padded vocabulary.
"""

from dataclasses import dataclass
from functools import cache

from megameta.config import RunConfig
from megameta.config.deepspeed import zero_stage
from megameta.errors import UserError
from megameta.model import ModelConfig
from megameta.parallel.pipeline import stage_bounds


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups and what else decides memory and time. tensor × pipeline × data is the world size."""

    tensor: int
    pipeline: int
    data: int
    zero_stage: int
    sequence_parallel: bool
    micro_batch_size: int
    accumulation: int
    checkpointing: bool

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> "Layout":
        """The layout that a configuration asks for.

        Raises:
            UserError: the ranks or the sequences of a step cannot be divided so.
        """
        parallel, train = config.parallel, config.train
        model_ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        data, left = divmod(world_size, model_ranks)
        if left or not data:
            raise UserError(f"{world_size} processes cannot be divided into model replicas of {model_ranks}")
        accumulation, left = divmod(train.global_batch_size, train.micro_batch_size * data)
        if left or not accumulation:
            raise UserError(
                f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size"
                f" {train.micro_batch_size} × {data} data-parallel ranks"
            )
        return cls(
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            data,
            zero_stage(config, data),
            parallel.sequence_parallel,
            train.micro_batch_size,
            accumulation,
            train.activation_checkpointing,
        )

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tensor * self.pipeline * self.data

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose activations a stage holds at once under 1F1B."""
        return min(self.pipeline - stage, self.accumulation)

    @property
    def bubble(self) -> float:
        """Share of a step in which a stage waits: (p − 1) / (m + p − 1) with m micro-batches (1F1B)."""
        return (self.pipeline - 1) / (self.accumulation + self.pipeline - 1)

    def overrides(self) -> list[str]:
        """What to give to ``megameta train`` for this layout."""
        return [
            f"parallel.tensor_parallel_size={self.tensor}",
            f"parallel.pipeline_parallel_size={self.pipeline}",
            f"parallel.sequence_parallel={str(self.sequence_parallel).lower()}",
            f"parallel.zero_stage={self.zero_stage}",
            f"train.micro_batch_size={self.micro_batch_size}",
            f"train.activation_checkpointing={str(self.checkpointing).lower()}",
        ]


@dataclass(frozen=True)
class Weights:
    """Parameters of a part of the model on one rank."""

    linear: int = 0
    """Weights of linear layers, of which autocast makes low-precision copies."""
    other: int = 0
    """Tables, norms and biases."""
    partial: tuple[int, ...] = ()
    """Sizes of the replicated parameters whose gradients are partial on a tensor-parallel rank; part of ``other``."""

    @property
    def count(self) -> int:
        """All of them."""
        return self.linear + self.other


def block_weights(model: ModelConfig, tensor: int = 1, *, has_meta: bool, sequence_parallel: bool = False) -> Weights:
    """Parameters of a block with or without the meta branch on one of ``tensor`` ranks: column- and row-sharded
    projections, the rest replicated."""
    width, inner = model.hidden_size, model.intermediate_size
    key_value = model.num_key_value_heads * model.head_size
    branches = 2 if has_meta else 1
    ups = 2 if model.activation == "swiglu" else 1
    linear = branches * (2 * width * width + 2 * width * key_value) + (ups + 1) * width * inner
    split_bias = branches * (width + 2 * key_value) + ups * inner if model.bias else 0  # of column-sharded projections
    norm = _norm(model)
    head_norms = [model.head_size] * (2 * branches) if model.qk_norm else []
    row_biases = [width] * (branches + 1) if model.bias else []
    partial = list(head_norms)
    if sequence_parallel:  # norm_1, norm_2, and the biases of o_proj and down_proj; the meta rows are on every rank
        partial += [*norm, *norm, *([width, width] if model.bias else [])]
    other = split_bias // tensor + (branches + 1) * sum(norm) + sum(head_norms) + sum(row_biases)
    return Weights(linear // tensor, other, tuple(partial) if tensor > 1 else ())


def _norm(model: ModelConfig) -> list[int]:
    has_bias = model.norm == "layernorm" and model.bias
    return [model.hidden_size] * (2 if has_bias else 1)


def table_rows(model: ModelConfig, tensor: int = 1) -> int:
    """Rows of a token table on one rank (spec §2: the vocabulary is padded to a multiple of 128 × tensor)."""
    return model.padded_vocab_size(128 * tensor) // tensor


def stage_weights(model: ModelConfig, layout: Layout, blocks: tuple[int, int]) -> Weights:
    """Parameters of the stage that runs ``blocks`` [first, end), on one rank."""
    first, last = blocks[0] == 0, blocks[1] == model.num_layers
    with_meta = model.count_meta_layers(*blocks)
    linear, other = 0, 0
    partial: tuple[int, ...] = ()
    for has_meta, count in ((True, with_meta), (False, blocks[1] - blocks[0] - with_meta)):
        block = block_weights(model, layout.tensor, has_meta=has_meta, sequence_parallel=layout.sequence_parallel)
        linear, other = linear + count * block.linear, other + count * block.other
        partial += count * block.partial
    table = table_rows(model, layout.tensor) * model.hidden_size
    if first:
        other += table
        other += model.max_position_embeddings * model.hidden_size if model.position == "ape" else 0
    if last:
        norm = _norm(model)
        other += sum(norm)
        if layout.sequence_parallel and layout.tensor > 1:
            partial += tuple(norm)
        if not model.tie_embeddings:
            linear += table
        elif not first:
            other += table  # the last stage's copy of the tied table
    return Weights(linear, other, partial)


def stage_blocks(config: RunConfig, pipeline: int) -> list[tuple[int, int]]:
    """The blocks [first, end) of each stage, as a run divides them."""
    data = config.data
    balance = config.parallel.pipeline_balance
    return _stage_blocks(config.model, pipeline, balance, data.sequence_length, data.num_meta_tokens)


@cache
def _stage_blocks(
    model: ModelConfig, pipeline: int, balance: str, length: int, num_meta: int
) -> list[tuple[int, int]]:  # kept, as a plan asks for the same ones hundreds of times
    return stage_bounds(model, pipeline, balance=balance, length=length, num_meta=num_meta)
