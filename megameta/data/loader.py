"""Batches of an optimiser step, as a pure function of its number: any rank, any worker, any resume reads the same."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megameta.data.dataset import IGNORE_INDEX, Dataset, Sample
from megameta.model import DocumentRuns, find_document_runs


@dataclass(frozen=True)
class Batch:
    """One forward pass of one rank. Tensors are int64 (B, T)."""

    token_BT: Tensor
    label_BT: Tensor
    document_BT: Tensor | None
    position_BT: Tensor | None
    num_meta_columns: int | None
    """Meta-tokens of the fullest sequence, where it is known beforehand."""
    sample_ids: tuple[int, ...]
    first_target: int = 0
    """No target stands in a column before this one."""
    group_BT: Tensor | None = None
    """Which group of an evaluation the target of each slot counts to, from 0, where losses are summed by groups."""
    document_runs: DocumentRuns | None = None
    """What ``make_context`` would wait for a GPU to find out, where it was found out beforehand."""

    def to(self, device: str) -> "Batch":
        """The batch on a device."""
        return self._with_each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which copies to a GPU run beside its work."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            token_BT=change(self.token_BT),
            label_BT=change(self.label_BT),
            document_BT=None if self.document_BT is None else change(self.document_BT),
            position_BT=None if self.position_BT is None else change(self.position_BT),
            group_BT=None if self.group_BT is None else change(self.group_BT),
            document_runs=None if self.document_runs is None else self.document_runs.with_each(change),
        )

    def with_runs(self, meta_token_id: int) -> "Batch":
        """The batch with its ``document_runs``, where it has documents; while it is on the host."""
        if self.document_BT is None or self.num_meta_columns is None:
            return self
        runs = find_document_runs(self.token_BT, self.document_BT, meta_token_id, self.num_meta_columns)
        return replace(self, document_runs=runs)

    def padded(self, multiple: int, token: int) -> "Batch":
        """Rows added at the end until their number divides by ``multiple``: of ``token``, without targets, in a
        document of their own, so that they change nothing before them (sequence parallelism needs equal shards)."""
        count = -self.token_BT.shape[1] % multiple
        if count == 0:
            return self

        def extend(x_BT: Tensor, value: Tensor | int) -> Tensor:
            return torch.cat((x_BT, x_BT.new_zeros(x_BT.shape[0], count) + value), dim=1)

        documents, positions, groups = self.document_BT, self.position_BT, self.group_BT
        return replace(
            self,
            token_BT=extend(self.token_BT, token),
            label_BT=extend(self.label_BT, IGNORE_INDEX),
            document_BT=None if documents is None else extend(documents, documents.amax(dim=1, keepdim=True) + 1),
            position_BT=None if positions is None else extend(positions, 0),
            group_BT=None if groups is None else extend(groups, 0),
            document_runs=None,
        )

    @property
    def num_targets(self) -> int:
        """Labels that count in the loss."""
        return int((self.label_BT != IGNORE_INDEX).sum())


def collate(samples: Sequence[Sample], num_meta_columns: int | None) -> Batch:
    """Stack samples of one length."""

    def stack(arrays: list) -> Tensor | None:
        return None if arrays[0] is None else torch.from_numpy(np.stack(arrays))

    return Batch(
        token_BT=torch.from_numpy(np.stack([s.token_T for s in samples])),
        label_BT=torch.from_numpy(np.stack([s.label_T for s in samples])),
        document_BT=stack([s.document_T for s in samples]),
        position_BT=stack([s.position_T for s in samples]),
        num_meta_columns=num_meta_columns,
        sample_ids=tuple(s.index for s in samples),
    )


def next_batch_number(number: int, skip: Sequence[tuple[int, int]]) -> int:
    """The first batch from ``number`` on that no range [first, end) of ``data.skip`` holds."""
    for first, end in sorted(skip):
        if first <= number < end:
            number = end
    return number


class StepLoader:
    """This rank's micro-batches of global batch ``number``, read ahead in a thread.

    Global batch n holds samples n · G … (n + 1) · G − 1; accumulation step a and data-parallel rank r take ``micro`` of
    them from n · G + (a · data_parallel_size + r) · micro on. So the samples of a step do not depend on the layout.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_size: int = 1,
        data_parallel_rank: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.data_parallel_size = data_parallel_size
        self.data_parallel_rank = data_parallel_rank
        self.pin_memory = pin_memory
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.accumulation_steps = global_batch_size // (micro_batch_size * data_parallel_size)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-loader")
        self._ahead: dict[int, Future[list[Batch]]] = {}

    def read(self, number: int, then: int | None = None) -> list[Batch]:
        """Micro-batches of global batch ``number``; starts to read ``then``, the one that will be asked for next."""
        future = self._ahead.pop(number, None) or self._reader.submit(self._read, number)
        batches = future.result()
        self._ahead = {} if then is None else {then: self._reader.submit(self._read, then)}
        return batches

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, number: int) -> list[Batch]:
        micro, ranks = self.micro_batch_size, self.data_parallel_size
        batches = []
        for step in range(self.accumulation_steps):
            row = (step * ranks + self.data_parallel_rank) * micro
            batch = self.make_batch(number, row)
            batches.append(batch.with_runs(self.dataset.form.meta_token_id).pin_memory() if self.pin_memory else batch)
        return batches

    def make_batch(self, number: int, row: int) -> Batch:
        """``micro_batch_size`` rows of global batch ``number``, from its row ``row`` on."""
        first = number * self.global_batch_size + row
        samples = [self.dataset[index] for index in range(first, first + self.micro_batch_size)]
        return collate(samples, self.dataset.form.num_meta_tokens)
