"""What a run trains and evaluates on, behind one small interface: tokenised corpora here, tasks in megameta.tasks."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from megameta.config import RunConfig
from megameta.data.dataset import Dataset, SampleFormat
from megameta.data.loader import StepLoader
from megameta.data.sources import training_data
from megameta.engine.engine import Engine
from megameta.parallel.topology import Topology
from megameta.train.evaluation import Evaluator


class RunEvaluator(Protocol):
    """Held-out sets by name."""

    def names(self, *, final: bool) -> list[str]:
        """The sets to evaluate, at the end of a run or before."""

    def run(self, engine: Engine, names: list[str] | None = None) -> Mapping[str, Any]:
        """A dataclass of numbers, whose str() is a line for people, by set. Collective."""


class RunData(Protocol):
    """Made on every rank from (configuration, topology)."""

    evaluator: RunEvaluator

    def describe(self) -> list[str]:
        """Lines for the log at the start."""

    def loader(self) -> StepLoader:
        """This rank's batches by the number of the global batch."""

    def epochs(self, num_batches: int) -> dict[str, float]:
        """How often each source was read through after so many global batches."""

    def evaluates(self, step: int) -> bool:
        """Whether the run is evaluated after this step (after the last one it always is)."""


class Probe(Protocol):
    """Looks into the model between steps, and leaves it and the training as they were."""

    def measure(self, engine: Engine) -> dict[str, float]:
        """Numbers by name, the same on every rank. Collective."""


#: Made on every rank, where analysis.interval asks for it.
MakeProbe = Callable[[RunConfig, Topology], Probe]


class PretrainingData:
    """Tokenised corpora with meta-tokens injected: ``data.train``, ``data.valid``, ``data.split``."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self._data = training_data(config)
        self.evaluator: RunEvaluator = Evaluator(config, topology)

    def describe(self) -> list[str]:
        data = self.config.data
        lines = [f"sequences of {data.sequence_length} slots: {data.num_meta_tokens} meta-tokens, the rest text"]
        for source in self._data.reports:
            name = f"{source.name}: " if source.name else ""
            share = f", {source.share:.2%} of the samples" if source.name else ""
            counts = f"{source.documents:,} documents, {source.tokens:,} tokens of text"
            lines.append(f"{name}{counts}{share}; the run is {source.epochs:.2f} epochs")
        return lines

    def loader(self) -> StepLoader:
        config = self.config
        form = SampleFormat.of(
            config.data, config.model.meta_token_id, config.run.seed, vocab_size=config.model.vocab_size
        )
        return StepLoader(Dataset(self._data.samples, form), **loader_options(config, self.topology))

    def epochs(self, num_batches: int) -> dict[str, float]:
        return self._data.epochs(num_batches * self.config.train.global_batch_size)

    def evaluates(self, step: int) -> bool:
        return step % self.config.eval.interval == 0


def loader_options(config: RunConfig, topology: Topology) -> dict[str, Any]:
    """Arguments of a ``StepLoader`` for a run."""
    return {
        "micro_batch_size": config.train.micro_batch_size,
        "global_batch_size": config.train.global_batch_size,
        "data_parallel_size": topology.data_parallel_size,
        "data_parallel_rank": topology.data_parallel_rank,
        "pin_memory": topology.device_type == "cuda",
    }
