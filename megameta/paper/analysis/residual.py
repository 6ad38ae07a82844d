"""The residual stream at meta-tokens: what earlier tokens it is like (spec §6, caching), and how long it is.

Letters: B batch, N sequences, T slots, D model width, E levels (0 the embedding, l the output of layer l − 1),
X bins of distance.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megameta.data.loader import Batch
from megameta.paper.analysis.attention_numbers import is_meta_of
from megameta.paper.analysis.distances import bin_labels, bin_of_pairs, num_bins, sum_by_bin
from megameta.paper.analysis.estimates import estimate, mean_over
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.observe import observed_residuals, visible_keys
from megameta.paper.analysis.plots import BLACK, META, TEXT, finish, heat, line, number_ticks
from megameta.paper.analysis.registry import Options
from megameta.paper.analysis.subject import Subject

SECTION = "Residual stream"
LEVELS = "level (0: embedding, l: output of layer l − 1)"
#: Query kind, and what it is compared with.
KINDS = (("meta", "embeddings"), ("text", "embeddings"), ("meta", "residuals"), ("text", "residuals"))


@dataclass(frozen=True)
class Cosines:
    """Sums over pairs (query, earlier text token of its document) by level and distance.

    Attributes:
        total: (query kind, key kind) → sums of cosine similarities, float64 (E, X).
        pairs: query kind → number of pairs, float64 (X).
    """

    total: dict[tuple[str, str], Tensor]
    pairs: dict[str, Tensor]

    def mean(self, query: str, key: str) -> Tensor:
        """(E, X); NaN where there is no pair."""
        return self.total[query, key] / self.pairs[query]


def cosines(subject: Subject, num_samples: int) -> Cosines:
    """Of residuals at meta-tokens, and at text tokens as a baseline, with the token embeddings of earlier text tokens
    (without positions) and with their residuals at the same level."""
    bins, levels = num_bins(subject.form.sequence_length), subject.config.model.num_layers + 1
    total = {kind: torch.zeros(levels, bins, dtype=torch.float64) for kind in KINDS}
    pairs = {query: torch.zeros(bins, dtype=torch.float64) for query in ("meta", "text")}
    with torch.no_grad():
        for batch in subject.held_out(num_samples):
            _add_batch(subject, batch, total, pairs)
    return Cosines(total, pairs)


def _add_batch(subject: Subject, batch: Batch, total: dict[tuple[str, str], Tensor], pairs: dict[str, Tensor]) -> None:
    is_meta_BT = is_meta_of(subject, batch)
    length = is_meta_BT.shape[1]
    bin_TS, bins = bin_of_pairs(length, is_meta_BT.device), num_bins(length)
    context = subject.context(batch)
    earlier_BTS = visible_keys(context.mask, length, length, is_meta_BT.device) & (bin_TS >= 0)
    earlier_BTS = earlier_BTS & ~is_meta_BT[:, None]
    chosen = {"meta": earlier_BTS & is_meta_BT[:, :, None], "text": earlier_BTS & ~is_meta_BT[:, :, None]}
    embedding_BTD = F.normalize(subject.model.embedding.tokens(batch.token_BT), dim=-1)
    for query, pairs_BTS in chosen.items():
        count_BX = sum_by_bin(torch.ones_like(pairs_BTS, dtype=torch.float32), pairs_BTS, bin_TS, bins)
        pairs[query] += count_BX.sum(dim=0).cpu()

    def see(level: int, x_BTD: Tensor) -> None:
        unit_BTD = F.normalize(x_BTD, dim=-1)
        for key, other_BTD in (("embeddings", embedding_BTD), ("residuals", unit_BTD)):
            cosine_BTS = unit_BTD @ other_BTD.transpose(1, 2)
            for query, pairs_BTS in chosen.items():
                found_BX = sum_by_bin(cosine_BTS, pairs_BTS, bin_TS, bins)
                total[query, key][level] += found_BX.sum(dim=0).cpu()

    with observed_residuals(subject.model, see):
        subject.model.hidden_states(batch.token_BT, context)


def norms(subject: Subject, num_samples: int, *, meta_tokens: bool = True) -> dict[str, Tensor]:
    """Mean Euclidean norm of the residual at meta-tokens and at text tokens, float64 (E, N) by name."""
    found: dict[str, list[Tensor]] = {"meta": [], "text": []}
    with torch.no_grad():
        for batch in subject.held_out(num_samples, meta_tokens=meta_tokens):
            is_meta_BT = is_meta_of(subject, batch)
            levels = norms_of_levels(subject, batch)
            for name, rows_BT in (("meta", is_meta_BT), ("text", ~is_meta_BT)):
                found[name].append(torch.stack([mean_over(norm_B1T, rows_BT)[:, 0] for norm_B1T in levels]).cpu())
    return {name: torch.cat(parts, dim=1) for name, parts in found.items()}


def norms_of_levels(subject: Subject, batch: Batch) -> list[Tensor]:
    """Norm of the residual of every slot, (B, 1, T) a level."""
    found: list[Tensor] = []
    with observed_residuals(subject.model, lambda level, x_BTD: found.append(x_BTD.norm(dim=-1)[:, None])):
        subject.hidden_states(batch)
    return found


def residual(subject: Subject, options: Options) -> list[Finding]:
    """Cosine similarities and norms."""
    return [_cosines(subject, options), _norms(subject, options)]


def _cosines(subject: Subject, options: Options) -> Finding:
    found = cosines(subject, options.num_samples)
    labels = bin_labels(subject.form.sequence_length)
    maps = {kind: found.mean(*kind) for kind in KINDS}
    differences = {key: maps["meta", key] - maps["text", key] for key in ("embeddings", "residuals")}
    levels = range(subject.config.model.num_layers + 1)

    def draw(figure: Any) -> None:
        grid = figure.subplots(2, 3)
        for row, key in zip(grid, ("embeddings", "residuals"), strict=True):
            both = torch.cat([maps["meta", key].flatten(), maps["text", key].flatten()])
            both = both[both.isfinite()]
            limits = (float(both.min()), float(both.max()))
            for axes, value, what, diverging in (
                (row[0], maps["meta", key], "meta-tokens", False),
                (row[1], maps["text", key], "text tokens (baseline)", False),
                (row[2], differences[key], "difference", True),
            ):
                scale = None if diverging else limits
                heat(figure, axes, value.numpy(), "cosine similarity", diverging=diverging, limits=scale)
                axes.set_title(f"{what}, with {key}", fontsize="medium")
                axes.set_xlabel("distance (slots)")
                axes.set_ylabel("level")
                axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize="small")
                number_ticks(axes.yaxis, levels)

    rows = [
        {
            "level": level,
            "distance (slots)": label,
            **{f"{query}-tokens with {key}": float(maps[query, key][level, x]) for query, key in KINDS},
            "pairs of meta-tokens": int(found.pairs["meta"][x]),
            "pairs of text tokens": int(found.pairs["text"][x]),
        }
        for level in levels
        for x, label in enumerate(labels)
    ]
    nearest = {key: float(value[1:, 0].mean()) for key, value in differences.items()}
    return Finding(
        name="residual-cosine",
        section=SECTION,
        title="What meta-tokens are like: cosine similarity with earlier tokens",
        caption=(
            "Cosine similarity of the residual at meta-tokens (left) and at text tokens (middle, the baseline) with the"
            " token embeddings of earlier text tokens (top) and with their residuals at the same level (bottom); mean"
            f" over pairs in the same document of {options.num_samples} held-out sequences at most, by level (0: the"
            " embedding, with learned positions where the model has them; l: output of layer l − 1) and distance in"
            " slots. The left picture alone says little: residuals of one level share directions, so that any two"
            " tokens are alike. What is special to meta-tokens is the difference (right; red: more alike than text"
            " tokens are). At distance 1, mean over the levels above 0: "
            + ", ".join(f"{value:+.3f} with {key}" for key, value in nearest.items())
            + "."
        ),
        draw=draw,
        tables={"map": rows},
        facts={f"meta minus text at distance 1, with {key}": value for key, value in nearest.items()},
        size=(11.0, 6.6),
    )


def _norms(subject: Subject, options: Options) -> Finding:
    found = norms(subject, options.num_samples)
    curves = {name: [estimate(value_N) for value_N in value_EN] for name, value_EN in found.items()}
    if subject.twin is not None:
        other = norms(subject.twin, options.num_samples, meta_tokens=subject.twin.has_meta_tokens)
        curves["twin"] = [estimate(value_N) for value_N in other["text"]]
    levels = range(len(found["meta"]))
    styles = {
        "meta": ("at meta-tokens", META, "-", "s"),
        "text": ("at text tokens", TEXT, "-", "o"),
        "twin": ("twin, at text tokens", BLACK, ":", "x"),
    }

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, curve in curves.items():
            line(axes, range(len(curve)), curve, *styles[name])
        axes.set_ylim(bottom=0)
        finish(axes, LEVELS, "Euclidean norm of the residual", ticks=range(max(map(len, curves.values()))))

    return Finding(
        name="residual-norms",
        section=SECTION,
        title="Length of the residual",
        caption=(
            f"Mean norm of the residual stream at meta-tokens and at text tokens of {found['meta'].shape[1]} held-out"
            " sequences; bands are 95 % intervals over sequences. A branch that adds a vector of a given length turns a"
            " short residual more than a long one; norms of different models are not comparable."
        ),
        draw=draw,
        tables={
            "levels": [
                {"level": level, **{k: v for n in ("meta", "text") for k, v in curves[n][level].columns(n).items()}}
                for level in levels
            ]
        },
        facts={"sequences": found["meta"].shape[1]},
        size=(6.5, 4.2),
    )
