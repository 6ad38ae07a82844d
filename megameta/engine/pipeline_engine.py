"""Pipeline stages under DeepSpeed: the same small interface as ``Engine``, with 1F1B schedules inside."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megameta.config import RunConfig
from megameta.data.loader import Batch
from megameta.engine.engine import Engine
from megameta.engine.loss_module import count_targets
from megameta.parallel.losses import loss_functions
from megameta.parallel.pipeline import Stage, StageLoss, make_pipeline, pack_rows
from megameta.parallel.topology import Topology

#: Batches of one pass through the pipeline in an evaluation.
EVALUATED_TOGETHER = 16


class PipelineEngine(Engine):
    """A stage of the model under DeepSpeed's PipelineEngine (ZeRO 1)."""

    def _wrap(self, model: Any) -> Any:
        self.stage: Stage = model
        self.stage.fuses_loss = self._fuses_loss
        functions = loss_functions(
            self.config.model, self.groups.tensor, fused=self._fuses_loss, compiled=self._compiled_loss()
        )
        self.loss = StageLoss(*functions)
        return make_pipeline(model.to(self.topology.device), self.config.model, self.topology, self.loss)

    def _mpu(self) -> Any:
        return None  # the PipelineModule brings its own

    def _accumulate(self, batches: Sequence[Batch], scale: Tensor | float) -> Tensor:
        from deepspeed.runtime.pipe.schedule import OptimizerStep

        # The schedule ends with the update, which here waits until every rank's loss is known to be finite.
        self.engine._INSTRUCTION_MAP = {**type(self.engine)._INSTRUCTION_MAP, OptimizerStep: lambda _engine: None}
        self.loss.scale = scale
        self.engine.train_batch(_items(self._expect(batches)))
        self.engine.timers("train_batch").reset()  # would keep two CUDA events a step
        return self._take_sums()

    def _update(self) -> None:
        self.engine._exec_optimizer_step()
        # DeepSpeed sums tied gradients over stages and then, apart, over replicas: with more than two of them the two
        # copies' last bits may differ. The first stage's table is the one that counts.
        with torch.no_grad():
            self.engine.module._synchronize_tied_weights()

    def _sum_scores(
        self, batches: Iterable[Batch], byte_counts: Tensor | None, num_groups: int
    ) -> tuple[Tensor, list[int]]:
        total = torch.zeros(3 + num_groups, dtype=torch.float64, device=self.topology.device)
        counts = [0] * (3 + num_groups)
        self.loss.scoring, self.loss.num_groups = True, num_groups
        for chunk in _like_shapes(batches):
            items = _items(self._expect(chunk))
            self.engine.eval_batch(items, reduce_output=None, bcast_loss=False, num_micro_batches=len(chunk))
            total += self._take_sums()
            for batch in chunk:
                counts = [a + b for a, b in zip(counts, count_targets(batch, byte_counts, num_groups), strict=True)]
        self.loss.scoring = False
        return total, counts

    def _expect(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches to come, on the device, and their stage prepared for them: it passes through them in order, and
        buffers between stages have their shape."""
        there = [batch.to(self.topology.device) for batch in batches]
        self.stage.num_meta_columns = batches[0].num_meta_columns
        # Found on the host when the batch was read: from a device's tensors they would be two waits a micro-batch.
        runs = [batch.document_runs for batch in there]
        self.stage.document_runs = deque(runs if all(found is not None for found in runs) else [])
        shape = batches[0].token_BT.shape
        if getattr(self, "_shape", shape) != shape:
            self.engine.reset_activation_shape()
        self._shape = shape
        return there

    def _take_sums(self) -> Tensor:
        """Sum of the micro-batches' losses since the last call; 0 on all stages but the last."""
        sums, self.loss.sums = self.loss.sums, []
        return sum(sums, torch.zeros((), dtype=torch.float64, device=self.topology.device))


def _like_shapes(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Neighbours of one shape, EVALUATED_TOGETHER at most."""
    for _, group in itertools.groupby(batches, key=lambda batch: (batch.token_BT.shape, batch.num_meta_columns)):
        while chunk := list(itertools.islice(group, EVALUATED_TOGETHER)):
            yield chunk


def _items(batches: Sequence[Batch]) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
    """What DeepSpeed's schedules read: the first stage takes the inputs, the last one the labels, with their groups.

    Of batches on the device already: DeepSpeed clones inputs before it copies them there, and a clone of page-locked
    memory is pageable, so that the host would wait for every copy.
    """
    for batch in batches:
        label = batch.label_BT if batch.group_BT is None else (batch.label_BT, batch.group_BT)
        yield pack_rows(batch.token_BT, batch.document_BT, batch.position_BT), label


def make_engine(config: RunConfig, topology: Topology, weights: Mapping[str, Tensor] | None = None) -> Engine:
    """The engine for the layout: collective."""
    kind = PipelineEngine if topology.pipeline_parallel_size > 1 else Engine
    return kind(config, topology, weights)
