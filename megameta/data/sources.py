"""Which samples a configuration trains and evaluates on: pooled datasets, mixtures, splits (spec §1)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megameta.config import DataSection, RunConfig, Source
from megameta.data.blend import BlendedSamples, normalized, weights_by_tokens
from megameta.data.index_cache import IndexCache
from megameta.data.samples import Corpus, DocumentSamples, SampleIndex, Samples
from megameta.errors import UserError

#: Held-out sets that are evaluated once, at the end of a run.
TEST = "test"


@dataclass(frozen=True)
class SourceReport:
    """What a run takes from one source."""

    name: str
    documents: int
    tokens: int
    share: float
    """Of the samples."""
    samples: int
    epochs: float


@dataclass(frozen=True)
class TrainingData:
    """Samples of a run, and what they come from."""

    samples: Samples
    reports: list[SourceReport]

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often each source was read through after ``num_samples``, by its name ("data" where there is one)."""
        if isinstance(self.samples, BlendedSamples):
            return self.samples.epochs(num_samples)
        return {"data": num_samples / self.samples.samples_per_epoch}


def split_shares(data: DataSection) -> dict[str, tuple[float, float]]:
    """(begin, end) of each dataset's documents for "train", "valid" and "test"; empty parts are left out."""
    if data.split is None:
        return {"train": (0.0, 1.0)}
    edges = [0.0, *np.cumsum(normalized(data.split)).tolist()]
    edges[-1] = 1.0
    parts = {name: (edges[i], edges[i + 1]) for i, name in enumerate(("train", "valid", TEST))}
    return {name: part for name, part, share in zip(parts, parts.values(), data.split, strict=True) if share > 0}


def training_data(config: RunConfig) -> TrainingData:
    """What ``data.train`` says, for the steps of a run.

    Raises:
        UserError: a dataset is missing, damaged or too small; a source has no tokens.
    """
    data = config.data
    cache = IndexCache(data.cache_dir or Path(config.run.dir) / "cache")
    share = split_shares(data)["train"]
    corpora = {name: Corpus(prefixes, share) for name, prefixes in data.sources.items()} or {"": Corpus([])}
    # Every batch that a run reads has a number below this (data.skip passes over some).
    batches = config.train.num_steps + sum(end - first for first, end in data.skip)
    num_samples = batches * config.train.global_batch_size
    if isinstance(data.train, list):
        (corpus,) = corpora.values()
        pooled = _samples(data, corpus, config.run.seed, cache)
        return TrainingData(pooled, [_report("", corpus, 1.0, num_samples, pooled)])
    empty = [name for name, corpus in corpora.items() if corpus.num_tokens == 0]
    if empty:
        raise UserError(f"data.train: no tokens in {', '.join(empty[:5])}; take these sources away")
    weights = _weights(data.train, corpora, data.temperature)
    sources = {name: _samples(data, corpus, config.run.seed, cache) for name, corpus in corpora.items()}
    blended = BlendedSamples(sources, weights, num_samples, cache)
    taken, shares = blended.taken(num_samples), blended.weights
    reports = [
        _report(name, corpora[name], float(shares[i]), int(taken[i]), source)
        for i, (name, source) in enumerate(sources.items())
    ]
    return TrainingData(blended, reports)


def _weights(train: dict[str, Source], corpora: dict[str, Corpus], temperature: float) -> list[float]:
    given = [source.weight for source in train.values() if source.weight is not None]
    return given or weights_by_tokens([corpus.num_tokens for corpus in corpora.values()], temperature)


def _report(name: str, corpus: Corpus, share: float, taken: int, samples: Samples) -> SourceReport:
    epochs = taken / samples.samples_per_epoch
    return SourceReport(name, len(corpus.document_lengths), corpus.num_tokens, share, taken, epochs)


def held_out_samples(config: RunConfig) -> dict[str, Samples]:
    """Held-out sets in the order on disk: those of ``data.valid``, and of ``data.split`` "valid" and "test" (of a
    mixture "valid/SOURCE", "test/SOURCE")."""
    data = config.data
    sets: dict[str, Samples] = {name: _samples(data, Corpus(prefixes), None) for name, prefixes in data.valid.items()}
    for part, share in split_shares(data).items():
        if part != "train":
            for source, prefixes in data.sources.items():
                name = f"{part}/{source}" if source else part
                sets[name] = _samples(data, Corpus(prefixes, share), None, what=f"data.split, {name}: ")
    return sets


def _samples(
    data: DataSection, corpus: Corpus, seed: int | None, cache: IndexCache | None = None, what: str = ""
) -> Samples:
    try:
        kind = SampleIndex if data.cross_documents else DocumentSamples
        return kind(corpus, data.text_per_sample, seed, cache)
    except UserError as error:
        raise UserError(f"{what}{error}") from error
