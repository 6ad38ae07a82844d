"""A tiny trained model, and what attention and residuals are in it, in float64 from the dense oracle (oracle.py)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megameta.paper.analysis.run import load_subject
from megameta.paper.analysis.subject import Subject
from tests.support import oracle
from tests.support.commands import run_command
from tests.support.training import tiny_values, write_corpus

LAYERS, HEADS, SAMPLES = 3, 4, 6


def train_tiny(folder: Path) -> Path:
    """Three layers, the middle one without the branch; grouped-query heads; many short documents; 40 steps."""
    write_corpus(folder / "text")
    write_corpus(folder / "valid", seed=1)
    values = tiny_values(
        str(folder / "text"),
        run__dir=str(folder / "run"),
        model__num_layers=LAYERS,
        model__meta_layers=[0, 2],
        model__num_key_value_heads=2,
        data__valid=str(folder / "valid"),
        train__num_steps=40,
        train__peak_tflops=1.0,
        eval__num_samples=4,
        analysis__interval=20,
        log__tensorboard=True,
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    run_command(folder, "megameta", "train", "run.yaml", check=True)
    return folder


def subject_of(folder: Path, *overrides: str) -> Subject:
    return load_subject(str(folder / "run"), list(overrides), None, None)


@dataclass(eq=False)
class Dense:
    """One sequence through the dense oracle.

    Attributes:
        levels: the residual stream before the first block and after each, (T, D).
        scores, weights: causal attention of [layer][head][query][key]; scores are −∞ where unseen.
        sources, parts: by layer at all rows: what the meta branch reads; what "causal", "meta", "mlp" add.
    """

    is_meta: list[bool]
    label: list[int]
    levels: list[Tensor]
    scores: list[list[list[list[float]]]]
    weights: list[list[list[list[float]]]]
    sources: list[Tensor]
    parts: list[dict[str, Tensor]]
    logits: list[Tensor]

    def queries(self) -> Iterator[int]:
        """Text queries with at least two text keys."""
        for t in range(len(self.is_meta)):
            if not self.is_meta[t] and len(self.text_keys(t)) >= 2:
                yield t

    def seers(self) -> Iterator[int]:
        """Of them those that see a meta-token."""
        yield from (t for t in self.queries() if self.meta_keys(t))

    @cache  # noqa: B019 (a few sequences, for the time of a test)
    def keys(self, t: int) -> list[int]:
        return [s for s in range(len(self.is_meta)) if self.scores[0][0][t][s] > -math.inf]

    def text_keys(self, t: int) -> list[int]:
        return [s for s in self.keys(t) if not self.is_meta[s]]

    def meta_keys(self, t: int) -> list[int]:
        return [s for s in self.keys(t) if self.is_meta[s]]


def dense(subject: Subject, *, meta_tokens: bool = True, off: tuple[int, ...] = (), **switches: bool) -> list[Dense]:
    """Every held-out sequence; ``switches`` change the model's configuration, ``off`` layers have no branch."""
    config = replace(subject.config.model, **switches)
    state = {name: p.double() for name, p in subject.model.named_parameters()}
    found = []
    for batch in subject.held_out(SAMPLES, meta_tokens=meta_tokens):
        for row, token_T in enumerate(batch.token_BT):
            length = len(token_T)
            position_T = torch.arange(length) if batch.position_BT is None else batch.position_BT[row]
            document_T = torch.zeros(length).long() if batch.document_BT is None else batch.document_BT[row]
            label_T = batch.label_BT[row].tolist()
            found.append(_sequence(config, state, token_T, position_T, document_T, label_T, off))
    return found


def _sequence(config, state, token_T, position_T, document_T, label_T, off) -> Dense:
    is_meta_T = token_T == config.meta_token_id
    mask = oracle.causal_mask(document_T)
    x = oracle.embed(config, state, token_T, position_T)
    found = Dense(is_meta_T.tolist(), label_T, [x], [], [], [], [], [])
    for layer in range(config.num_layers):
        block = f"blocks.{layer}."
        h = oracle.norm(config, state, block + "norm_1", x)
        scores = list(_scores(config, state, block + "attention.", h, position_T, mask))
        found.scores.append([score.tolist() for score in scores])
        found.weights.append([torch.softmax(score, dim=1).tolist() for score in scores])
        parts = {"causal": oracle.causal_branch(config, state, layer, x, is_meta_T, position_T, document_T)}
        a = x + parts["causal"]
        found.sources.append(a)
        if layer in config.meta_layers and layer not in off:
            parts["meta"] = oracle.meta_branch(config, state, layer, a, is_meta_T, position_T, document_T)
            a = a + parts["meta"]
        parts["mlp"] = oracle.mlp(config, state, block + "mlp.", oracle.norm(config, state, block + "norm_2", a))
        x = a + parts["mlp"]
        found.levels.append(x)
        found.parts.append(parts)
    table = state["embedding.tokens.weight"][: config.vocab_size]
    found.logits = [oracle.norm(config, state, "head.norm", level) @ table.T for level in found.levels]
    return found


def _scores(config, state, prefix, h, position_T, mask) -> Iterator[Tensor]:
    size = config.hidden_size // config.num_heads
    q, k = (oracle.linear(state, prefix + name, h) for name in ("q_proj", "k_proj"))
    for head in range(config.num_heads):
        kv = head * config.num_key_value_heads // config.num_heads
        q_TK = oracle.rope(config, q[:, head * size : (head + 1) * size], position_T)
        k_TK = oracle.rope(config, k[:, kv * size : (kv + 1) * size], position_T)
        yield q_TK @ k_TK.T / math.sqrt(size) + mask


def nan_mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def close(found: Tensor, expected: list, tolerance: float = 2e-5) -> None:
    """Equal, NaN where NaN, relative to the largest expected magnitude."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    scale = float(wanted.nan_to_num().abs().max())
    assert torch.equal(found.isnan().cpu(), wanted.isnan())
    difference = float((found.cpu().double() - wanted).nan_to_num().abs().max())
    assert difference <= tolerance * scale, (difference, scale)
