"""Pipeline stages: a contiguous range of the GPT's parts as one module, driven by DeepSpeed's PipelineModule (1F1B).

Between stages travel the hidden states and, as int64, the token ids, with documents and positions where batches carry
them: each stage makes the context of its own blocks from those, once a micro-batch. Parameters keep their canonical
names, so that everything that goes by name (initial weights, tensor parallelism, checkpoints) is the same as without
a pipeline.
"""

import contextlib
import io
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megameta.model import Block, DocumentRuns, Embedding, Head, ModelConfig, make_context
from megameta.model.flops import block_flops, head_flops
from megameta.model.gpt import run_blocks
from megameta.model.shapes import on_meta_device, without_kernels
from megameta.parallel.groups import TensorParallel
from megameta.parallel.losses import scaled
from megameta.parallel.tensor_parallel import shard_context
from megameta.parallel.topology import Topology


def part_costs(config: ModelConfig, balance: str, length: int, num_meta: int) -> list[float]:
    """What embedding, blocks and head cost, to be balanced over stages: "parameters", or "time" (model flops)."""
    config = without_kernels(config)
    width, has_meta = config.hidden_size, [config.layer_has_meta(layer) for layer in range(config.num_layers)]
    if balance == "time":
        flops = {kind: block_flops(config, length, num_meta, has_meta=kind) for kind in {*has_meta}}
        return [0.0, *(flops[kind] for kind in has_meta), head_flops(config, length)]
    with on_meta_device():
        either = {kind: Block(config, has_meta.index(kind)) for kind in {*has_meta}}
        sizes = {kind: sum(p.numel() for p in block.parameters()) for kind, block in either.items()}
        embedding = sum(p.numel() for p in Embedding(config, 128).parameters())
        head_parameters = sum(p.numel() for p in Head(config, 128).parameters())
    tied = config.padded_vocab_size() * width if config.tie_embeddings else 0  # the last stage has a copy
    return [embedding, *(sizes[kind] for kind in has_meta), head_parameters + tied]


def stage_bounds(
    config: ModelConfig, num_stages: int, *, balance: str = "parameters", length: int = 1024, num_meta: int = 0
) -> list[tuple[int, int]]:
    """The blocks [first, end) of each stage: contiguous, every stage at least one, the costliest as cheap as can be,
    then the second, and so on; among equals those with most blocks on the first stages. The embedding is on the first
    stage, the head on the last."""
    embedding, *blocks, head = part_costs(config, balance, length, num_meta)
    until = [0.0, *itertools.accumulate(blocks)]
    # The best division of the first blocks over the first stages, by the number of blocks: the costs of its stages in
    # falling order, and its ends, negative. Of two divisions the better one stays so when both get the same stage more.
    best: dict[int, tuple[list[float], list[int]]] = {0: ([], [])}
    for stage in range(num_stages):
        is_last = stage == num_stages - 1
        extra = (embedding if stage == 0 else 0.0) + (head if is_last else 0.0)
        fewest, most = (len(blocks) if is_last else stage + 1), len(blocks) - (num_stages - 1 - stage)
        best = {
            end: min(
                (sorted([*costs, until[end] - until[first] + extra], reverse=True), [*ends, -end])
                for first, (costs, ends) in best.items()
                if first < end
            )
            for end in range(fewest, most + 1)
        }
    ends = [0, *(-end for end in best[len(blocks)][1])]
    return list(itertools.pairwise(ends))


class Stage(nn.Module):
    """The parts of a ``GPT`` that one pipeline stage runs, by their canonical names.

    Under tied embeddings the last stage holds a second token table, which ``make_pipeline`` ties to the first's.

    Args:
        blocks: the range [first, end) of its blocks.
    """

    def __init__(self, config: ModelConfig, blocks: tuple[int, int], vocab_multiple: int = 128) -> None:
        super().__init__()
        self.config = config
        self.is_first, self.is_last = blocks[0] == 0, blocks[1] == config.num_layers
        self.activation_checkpointing = False
        self.num_meta_columns: int | None = None
        """M of the batches to come, where it is known."""
        self.document_runs: deque[DocumentRuns | None] = deque()
        """Of the batches to come, one each, on this stage's device; empty: not known."""
        self.tensor_parallel: TensorParallel | None = None
        self.fuses_loss = False
        """Whether the last stage hands the loss what logits are made of."""
        self.embedding: Any = None
        if self.is_first:
            self.embedding = Embedding(config, vocab_multiple)
        elif self.is_last and config.tie_embeddings:
            self.embedding = Embedding(config, vocab_multiple)
            self.embedding.positions = None
        self.blocks = nn.ModuleDict({str(layer): Block(config, layer) for layer in range(*blocks)})
        self.head = Head(config, vocab_multiple) if self.is_last else None

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Tensor:
        """(tokens, …) on the first stage, (x, tokens, …) on the others; … is documents, positions where both exist.

        Returns:
            (x, tokens, …) for the next stage; on the last logits (B, T, V), or (x, weight) where it fuses the loss.
        """
        x_BTD, rows = (None, inputs) if self.is_first else (inputs[0], inputs[1:])
        token_BT, document_BT, position_BT = unpack_rows(rows)
        context = make_context(
            self.config,
            token_BT,
            position_BT=position_BT,
            document_BT=document_BT,
            num_meta_columns=self.num_meta_columns,
            document_runs=self.document_runs.popleft() if self.document_runs else None,
        )
        context = shard_context(context, self.tensor_parallel)
        if x_BTD is None:
            x_BTD = self.embedding(token_BT, context)
        recompute = self.activation_checkpointing and self.training
        x_BTD = run_blocks(self.blocks.values(), x_BTD, context, recompute=recompute)
        if self.head is None:
            return (x_BTD, *rows)
        project = (lambda *parts: parts) if self.fuses_loss else None
        return self.head(x_BTD, self.embedding.tokens.weight if self.embedding is not None else None, project)


def pack_rows(token_BT: Tensor, document_BT: Tensor | None, position_BT: Tensor | None) -> tuple[Tensor, ...]:
    """What travels with the hidden states: int64 (B, T), one to three of them. Positions alone bring one document."""
    if position_BT is None:
        return (token_BT,) if document_BT is None else (token_BT, document_BT)
    return token_BT, torch.zeros_like(token_BT) if document_BT is None else document_BT, position_BT


def unpack_rows(rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Inverse of ``pack_rows``."""
    return rows[0], rows[1] if len(rows) > 1 else None, rows[2] if len(rows) > 2 else None


class StageLoss:
    """The last stage's loss: scaled for the gradient, and what the step or evaluation sums up on record.

    ``scoring``: whether that is what ``score_function`` gives, for ``num_groups`` groups, or the sum of cross-entropies
    alone.

    Args:
        cross_entropy, score: of logits, or of the (x, weight) that a stage with a fused loss returns, and of labels.
    """

    def __init__(self, cross_entropy: Callable[..., Tensor], score: Callable[..., Tensor]) -> None:
        self.cross_entropy = cross_entropy
        self.score = score
        self.scale: Tensor | float = 1.0
        self.scoring = False
        self.num_groups = 0
        self.sums: list[Tensor] = []

    def __call__(self, output: Any, label: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Sum of cross-entropies times ``scale``. Labels (B, T), or (labels, groups)."""
        label_BT, group_BT = label if isinstance(label, tuple) else (label, None)
        parts = output if isinstance(output, tuple) else (output,)
        if self.scoring:
            self.sums.append(self.score(*parts, label_BT, group_BT, self.num_groups).detach())
            return self.sums[-1][0]
        loss_sum = self.cross_entropy(*parts, label_BT)
        self.sums.append(loss_sum.detach().double())
        return scaled(loss_sum, self.scale)


def make_pipeline(stage: Stage, config: ModelConfig, topology: Topology, loss: StageLoss) -> Any:
    """DeepSpeed's PipelineModule around this rank's stage: one layer a stage. Collective; weights must be filled.

    Tied tables: DeepSpeed sums their gradients over the first and the last stage, and counts the first's copy alone in
    the norm. It would count none of the last stage's other parameters either, which is undone here.
    """
    from deepspeed.pipe import PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    last = topology.pipeline_parallel_size - 1

    class TiedStage(TiedLayerSpec):
        def build(self, log: bool = False) -> nn.Module:
            return stage

    def layer(number: int) -> Any:
        if config.tie_embeddings and number in (0, last):
            return TiedStage("embedding", Stage, tied_weight_attr="embedding.tokens.weight")
        return stage if number == topology.pipeline_parallel_rank else nn.Identity()  # others are not built here

    # It prints its layout (ours is in the log), and broadcasts the tied parameter.
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        module = PipelineModule(
            [layer(number) for number in range(last + 1)],
            topology=PipeModelDataParallelTopology(
                last + 1, topology.tensor_parallel_size, topology.data_parallel_size
            ),
            loss_fn=loss,
            partition_method="uniform",
        )
    for name, parameter in stage.named_parameters():
        parameter.ds_pipe_replicated = (  # type: ignore[attr-defined]
            config.tie_embeddings and stage.is_last and name == "embedding.tokens.weight"
        )
    return module
