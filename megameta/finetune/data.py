"""Fine-tuning on prompts and answers: loss on the answers, phases of growing length, accuracy by length bin.

Global batch n belongs to phase n · P // num_steps. A phase has an order of its examples for each of its epochs:
shuffled, then sorted by length inside windows of WINDOW global batches, cut into global batches, and those shuffled. So
a batch holds like lengths, and what it holds is a function of (seed, phase, n) on any layout and after any resume.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megameta.config import RunConfig
from megameta.data.counter_random import make_key, permutation
from megameta.data.dataset import IGNORE_INDEX
from megameta.data.index_cache import IndexCache
from megameta.data.loader import Batch, StepLoader
from megameta.engine.engine import Engine
from megameta.engine.loss_module import Scores
from megameta.errors import UserError
from megameta.finetune.encoded import EncodedExamples, Ints, make_batch, padded_length
from megameta.parallel.topology import Topology
from megameta.tokenizers import load_tokenizer
from megameta.train.data import RunEvaluator, loader_options

#: Global batches among whose examples neighbours in length are sought.
WINDOW = 32
#: Tasks that come first, in this order, where a directory has them, and the others by name: batches depend on it.
FIRST = ("list_recall", "segment_counting", "parity", "copying")


@dataclass(frozen=True)
class TaskResult:
    """Accuracy on one set: exact match of the whole answer and its end, as greedy decoding would give it; accuracy of
    its tokens; loss in nats an answer token."""

    accuracy: float
    token_accuracy: float
    loss: float
    examples: int

    @classmethod
    def of(cls, scores: Scores) -> "TaskResult":
        """From sums over the set."""
        targets = max(1, scores.targets)
        accuracy = scores.exact / max(1, scores.rows)
        return cls(accuracy, scores.correct / targets, scores.loss_sum / targets, scores.rows)

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.1%}, of tokens {self.token_accuracy:.1%}, loss {self.loss:.4f}"
            f" ({self.examples:,} examples)"
        )


def task_files(config: RunConfig, split: str) -> dict[str, Path]:
    """The files of the configured tasks by name. Raises UserError where there are none."""
    tuning = config.finetune
    if tuning.directory is None:
        raise UserError("finetune.directory is not set: name the directory of megameta tasks generate")
    directory = Path(tuning.directory)
    if not directory.is_dir():
        raise UserError(f"finetune.directory: {directory} is not there; megameta tasks generate makes it")
    found = sorted(path.parent.name for path in directory.glob(f"*/{split}.jsonl"))
    there = [*(name for name in FIRST if name in found), *(name for name in found if name not in FIRST)]
    missing = [name for name in tuning.tasks if name not in there]
    if missing or not there:
        raise UserError(f"{directory} holds no task {', '.join(missing) or 'at all'}; there: {', '.join(there) or '–'}")
    return {name: directory / name / f"{split}.jsonl" for name in (tuning.tasks or there)}


class TaskData:
    """What ``megameta finetune`` trains and evaluates on (``RunData``)."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self._train = load_examples(config, "train")
        self.order = PhaseOrder(config, self._train)
        self.evaluator: RunEvaluator = TaskEvaluator(config, topology)

    def describe(self) -> list[str]:
        steps = self.config.train.num_steps // len(self.config.finetune.phases)
        lines = [
            f"{name}: {len(source):,} examples, {int(source.length_N.sum()):,} tokens"
            for name, source in self._train.items()
        ]
        for number, bound in enumerate(self.config.finetune.phases):
            count = len(self.order.members[number])
            epochs = steps * self.config.train.global_batch_size / count
            lines.append(
                f"phase {number + 1}: up to {bound} tokens, {count:,} examples, {steps} steps, {epochs:.2f} epochs"
            )
        return lines

    def loader(self) -> StepLoader:
        return TaskLoader(self.order, self.config, self.topology)

    def epochs(self, num_batches: int) -> dict[str, float]:
        """Of the phase that the last of so many batches belongs to."""
        phase, index = self.order.locate(max(0, num_batches - 1))
        count = len(self.order.members[phase])
        return {f"phase {phase + 1}": (index + 1) * self.config.train.global_batch_size / count}

    def evaluates(self, step: int) -> bool:
        per_phase = self.config.train.num_steps // len(self.config.finetune.phases)
        return step % self.config.eval.interval == 0 or step % per_phase == 0


def load_examples(config: RunConfig, split: str) -> dict[str, EncodedExamples]:
    """The examples of each task."""
    if config.data.tokenizer is None:
        raise UserError("data.tokenizer is not set: it encodes the examples")
    tokenizer = load_tokenizer(config.data.tokenizer)
    cache = IndexCache(config.data.cache_dir or Path(config.run.dir) / "cache")
    return {
        name: EncodedExamples(path, tokenizer, markers=config.finetune.markers, cache=cache)
        for name, path in task_files(config, split).items()
    }


class PhaseOrder:
    """Which examples a global batch holds.

    Attributes:
        members: for each phase its examples as (task, number) rows, int64 (n, 2).
    """

    def __init__(self, config: RunConfig, examples: dict[str, EncodedExamples]) -> None:
        self.config = config
        self.examples = list(examples.values())
        self.members: list[Ints] = []
        for bound in config.finetune.phases:
            parts = [
                np.stack([np.full(len(chosen), task), chosen], axis=1)
                for task, source in enumerate(self.examples)
                for chosen in [np.flatnonzero(source.bin_N <= bound)]
            ]
            found = np.concatenate(parts)
            if len(found) < config.train.global_batch_size:
                raise UserError(
                    f"finetune.phases: {len(found)} examples have up to {bound} tokens, fewer than"
                    f" train.global_batch_size {config.train.global_batch_size}; make more, or change the phases"
                )
            self.members.append(found)
        self._orders: OrderedDict[tuple[int, int], Ints] = OrderedDict()

    def locate(self, batch: int) -> tuple[int, int]:
        """(phase, which of the phase's batches) of a global batch; those beyond the run count on in the last phase."""
        per_phase = self.config.train.num_steps // len(self.members)
        phase = min(batch // per_phase, len(self.members) - 1)
        return phase, batch - phase * per_phase

    def batch(self, number: int) -> Ints:
        """(task, example) of each row of a global batch: int64 (G, 2)."""
        phase, index = self.locate(number)
        per_epoch = len(self.members[phase]) // self.config.train.global_batch_size
        epoch, number_in_epoch = divmod(index, per_epoch)
        return self.members[phase][self._order(phase, epoch)[number_in_epoch]]

    def _order(self, phase: int, epoch: int) -> Ints:
        """Places in ``members`` of each batch of an epoch: (batches, G). Some are left over, others each epoch."""
        key = (phase, epoch)
        if key not in self._orders:
            size, members = self.config.train.global_batch_size, self.members[phase]
            seed = self.config.run.seed
            shuffled = permutation(make_key("examples", seed, phase, epoch), len(members))
            shuffled = shuffled[: len(members) // size * size]
            lengths = np.array([int(self.examples[task].length_N[number]) for task, number in members[shuffled]])
            window = np.arange(len(shuffled)) // (WINDOW * size)
            batches = shuffled[np.lexsort((lengths, window))].reshape(-1, size)
            self._orders[key] = batches[permutation(make_key("batches", seed, phase, epoch), len(batches))]
            while len(self._orders) > 2:  # a batch is read ahead, perhaps of the next epoch
                self._orders.popitem(last=False)
        return self._orders[key]


class TaskLoader(StepLoader):
    """Batches of a fine-tuning run. All rows of a global batch have one length, on every rank."""

    def __init__(self, order: PhaseOrder, config: RunConfig, topology: Topology) -> None:
        super().__init__(None, **loader_options(config, topology))  # type: ignore[arg-type]  # has examples of its own
        self._order = order
        self._num_meta = max(source.most_meta(config.model.meta_token_id) for source in order.examples)

    def make_batch(self, number: int, row: int) -> Batch:
        members = self._order.batch(number)
        rows = [(self._order.examples[task], int(example)) for task, example in members]
        length = padded_length(np.array([source.length_N[example] for source, example in rows]))
        chosen = range(row, row + self.micro_batch_size)
        first = number * self.global_batch_size
        return make_batch([rows[i] for i in chosen], [first + i for i in chosen], length, self._num_meta)


class TaskEvaluator:
    """Accuracy on test examples, by task and bin: sets are named TASK/BIN."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self.examples = load_examples(config, "test")
        bins = config.finetune.eval_bins or [*config.finetune.phases, 2 * config.finetune.phases[-1]]
        limit = config.model.max_position_embeddings if config.model.position == "ape" else None
        self.sets: dict[str, tuple[EncodedExamples, Ints]] = {}
        for name, source in self.examples.items():
            for bound in bins:
                chosen = np.flatnonzero(source.bin_N == bound)
                if config.finetune.eval_examples:
                    chosen = chosen[: config.finetune.eval_examples]
                # Learned positions end: such lengths are not applicable (spec §3).
                if len(chosen) and (limit is None or bound <= limit):
                    by_length = np.argsort(source.length_N[chosen], kind="stable")
                    self.sets[f"{name}/{bound}"] = (source, chosen[by_length])

    def names(self, *, final: bool) -> list[str]:
        return list(self.sets)

    def run(self, engine: Engine, names: list[str] | None = None) -> dict[str, TaskResult]:
        """Results by set. Collective."""
        wanted = list(self.sets) if names is None else names
        return {name: TaskResult.of(engine.evaluate(self.batches(name), None)) for name in wanted}

    def batches(self, name: str) -> Iterator[Batch]:
        """This rank's batches of a set. Every rank runs as many passes of the same shapes."""
        source, chosen = self.sets[name]
        micro, ranks = self.config.train.micro_batch_size, self.topology.data_parallel_size
        together = micro * ranks
        for first in range(0, len(chosen), together):
            part = chosen[first : first + together]
            length = padded_length(source.length_N[part])
            begin = self.topology.data_parallel_rank * micro
            rows = [part[min(i, len(part) - 1)] for i in range(begin, begin + micro)]
            batch = self._batch(source, rows, length)
            batch.label_BT[max(0, len(part) - begin) :] = IGNORE_INDEX  # past the end: rows without targets
            yield batch

    def _batch(self, source: EncodedExamples, rows: list[Any], length: int) -> Batch:
        members = [(source, int(row)) for row in rows]
        return make_batch(
            members, [int(row) for row in rows], length, source.most_meta(self.config.model.meta_token_id)
        )
