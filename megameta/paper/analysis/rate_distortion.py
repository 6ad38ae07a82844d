"""Rate and distortion at the last meta-token against the last text token of the same sequence (spec §6, compression).

The spec leaves open what is predicted: here it is the next text token (ours). A held-out sequence is cut behind each
meta-token that text precedes and follows. Then the last meta-token and the last text token have read the same text, and
neither is further from the target; in pre-training it is the meta-token that predicts there, the text token's own
target being the meta-token. States are taken behind the last block and the final norm. The model is frozen; heads are
fitted to states of some windows of the held-out text and judged by others.

Letters: B batch, T slots, N examples, D width, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megameta.data.dataset import IGNORE_INDEX
from megameta.data.loader import Batch
from megameta.errors import UserError
from megameta.paper.analysis.bottleneck import Examples, Point, cross_entropy, sweep
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.plots import BLACK, GREY, META, OTHER, PALE, TEXT, finish
from megameta.paper.analysis.registry import Options
from megameta.paper.analysis.subject import Subject
from megameta.statistics import half_width

SECTION = "Rate and distortion"
BETAS = (0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0)
SEEDS = 4
#: Examples that are sought, by reading the same windows with meta-tokens at other places, at most MOST_DRAWS times.
WANTED_EXAMPLES, MOST_DRAWS, MOST_WINDOWS = 20_000, 8, 2000
#: Slots before the last text token among which the earlier one is drawn.
EARLIER = 32
_HELD_OUT = 0.3

META_SITE, TEXT_SITE, EARLIER_SITE, TWIN_SITE = "last meta-token", "last text token", "earlier text token", "twin"
_COLOURS = {META_SITE: (META, "s"), TEXT_SITE: (TEXT, "o"), EARLIER_SITE: (PALE, "v"), TWIN_SITE: (OTHER, "^")}


class Sites(NamedTuple):
    """States by site, each (N, D), of the same N examples; their targets and windows (N,)."""

    states: dict[str, Tensor]
    target_N: Tensor
    window_N: Tensor


def cut_behind_meta(token_BT: Tensor, label_BT: Tensor, document_BT: Tensor | None, meta_token_id: int) -> Tensor:
    """Slots of meta-tokens between two text tokens of a document, the second of which counts: bool (B, T)."""
    is_meta_BT = token_BT == meta_token_id
    found_BT = is_meta_BT & (label_BT != IGNORE_INDEX)
    found_BT[:, 0] = False
    found_BT[:, 1:] &= ~is_meta_BT[:, :-1]
    if document_BT is not None:
        found_BT[:, 1:] &= document_BT[:, 1:] == document_BT[:, :-1]
    return found_BT


def earlier_slots(is_text_BT: Tensor, row_N: Tensor, slot_N: Tensor, generator: torch.Generator) -> Tensor:
    """For each last text token a random text token among the EARLIER slots before it; itself where there is none."""
    place = torch.arange(is_text_BT.shape[1])
    distance_NT = slot_N[:, None] - place
    allowed_NT = is_text_BT[row_N] & (distance_NT > 0) & (distance_NT <= EARLIER)
    score_NT = torch.rand(allowed_NT.shape, generator=generator).masked_fill(~allowed_NT, -1.0)
    return torch.where(allowed_NT.any(dim=1), score_NT.argmax(dim=1), slot_N)


def read_sites(subject: Subject, num_windows: int, seed: int) -> Sites:
    """States of all examples, on the CPU. The model is not changed.

    Raises:
        UserError: no meta-token stands between text tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []
    count = 0
    for draw in range(MOST_DRAWS):
        reading = replace(subject, form=replace(subject.form, seed=subject.form.seed + draw))
        first = 0
        twins = None if subject.twin is None else _twin(reading).held_out(num_windows, batch_size=8)
        for batch in reading.held_out(num_windows, batch_size=8):
            twin_batch = None if twins is None else next(twins)
            part = _read(reading, batch, twin_batch, first, generator)
            parts.append(part)
            first += len(batch.token_BT)
            count += len(part[1])
        if count >= WANTED_EXAMPLES:
            break
    if not count:
        raise UserError(f"{subject.name}: no meta-token of the held-out text stands between two text tokens")
    states = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
    return Sites(states, torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts]))


def _twin(reading: Subject) -> Subject:
    """The twin with meta-tokens, if it reads any, where this reading has them."""
    assert reading.twin is not None  # noqa: S101
    return replace(reading.twin, form=replace(reading.form, num_meta_tokens=reading.twin.form.num_meta_tokens))


@torch.no_grad()
def _read(
    subject: Subject, batch: Batch, twin_batch: Batch | None, first: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    meta_id = subject.form.meta_token_id
    found_BT = cut_behind_meta(batch.token_BT, batch.label_BT, batch.document_BT, meta_id)
    row_N, slot_N = (x.cpu() for x in found_BT.nonzero(as_tuple=True))
    is_text_BT = (batch.token_BT != meta_id).cpu()
    x_BTD = _normed(subject, batch)
    states = {
        META_SITE: x_BTD[row_N, slot_N],
        TEXT_SITE: x_BTD[row_N, slot_N - 1],
        EARLIER_SITE: x_BTD[row_N, earlier_slots(is_text_BT, row_N, slot_N - 1, generator)],
    }
    if twin_batch is not None and subject.twin is not None:
        # At its own meta-token if it reads any; else at its last text token, numbered without meta-tokens.
        place_BT = is_text_BT.long().cumsum(dim=1) - 1
        places_N = slot_N if subject.twin.form.num_meta_tokens else place_BT[row_N, slot_N]
        states[TWIN_SITE] = _normed(subject.twin, twin_batch)[row_N, places_N]
    return states, batch.label_BT.cpu()[row_N, slot_N], first + row_N


def _normed(subject: Subject, batch: Batch) -> Tensor:
    return subject.model.head.norm(subject.hidden_states(batch)).cpu()


def unigram_floor(train_N: Tensor, held_out_N: Tensor, vocab_size: int) -> float:
    """Cross-entropy, in nats, of held-out targets under the frequencies of the others, plus one each."""
    count_V = torch.bincount(train_N, minlength=vocab_size).double() + 1
    return float(-(count_V / count_V.sum()).log()[held_out_N].mean())


def split_by_window(window_N: Tensor, seed: int) -> Tensor:
    """Whether an example is held out, bool (N,): all examples of a window are, or none."""
    windows = torch.unique(window_N)
    order = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
    return torch.isin(window_N, order[: max(1, round(_HELD_OUT * len(windows)))])


def at_rates(curve: Sequence[Point], rates: Sequence[float]) -> list[float]:
    """Distortions at these rates, linear between the points of a curve."""
    points = sorted((point.rate, point.distortion) for point in curve)
    return [float(value) for value in np.interp(rates, [p[0] for p in points], [p[1] for p in points])]


def compare(
    first: Sequence[Sequence[Point]], second: Sequence[Sequence[Point]], count: int = 7
) -> list[dict[str, float]]:
    """First less second at ``count`` rates that all curves reach, paired by seed: mean, 95 % interval over seeds."""
    curves = [*first, *second]
    low = max(min(point.rate for point in curve) for curve in curves)
    high = min(max(point.rate for point in curve) for curve in curves)
    if low >= high:
        return []
    rates = [float(rate) for rate in np.linspace(low, high, count)]
    differences = [np.subtract(at_rates(a, rates), at_rates(b, rates)) for a, b in zip(first, second, strict=True)]
    rows = []
    for number, rate in enumerate(rates):
        values = [float(difference[number]) for difference in differences]
        half = half_width(values) if len(values) > 1 else math.inf
        rows.append(
            {
                "rate (nats)": rate,
                "difference (nats)": fmean(values),
                "low": fmean(values) - half,
                "high": fmean(values) + half,
            }
        )
    return rows


def verdict(rows: Sequence[Mapping[str, float]], other: str) -> str:
    """What the rows say of D_meta(R) ≤ D(R) of another site, by rule."""
    if not rows:
        return f"The curves of the last meta-token and of the {other} share no rate, so nothing is said."
    holds = sum(row["high"] <= 0 for row in rows)
    fails = sum(row["low"] > 0 for row in rows)
    span = f"from {rows[0]['rate (nats)']:.2f} to {rows[-1]['rate (nats)']:.2f} nats"
    if holds == len(rows):
        return f"D_meta(R) ≤ D(R) of the {other} holds at all {len(rows)} matched rates {span}."
    if fails == len(rows):
        return f"D_meta(R) ≤ D(R) of the {other} is false at all {len(rows)} matched rates {span}."
    rest = len(rows) - holds - fails
    return (
        f"D_meta(R) ≤ D(R) of the {other}: of {len(rows)} matched rates {span} it holds at {holds}, is false at"
        f" {fails}, and {rest} are not resolved."
    )


def curves_by_site(
    sites: Sites, output_VD: Tensor, seed: int, seeds: int = SEEDS
) -> tuple[dict[str, list[list[Point]]], float]:
    """A curve a seed of each site, and the unigram floor (mean over seeds)."""
    vocab_size = len(output_VD)
    curves: dict[str, list[list[Point]]] = {name: [] for name in sites.states}
    floors = []
    for number in range(seeds):
        out_N = split_by_window(sites.window_N, seed + number)
        floors.append(unigram_floor(sites.target_N[~out_N], sites.target_N[out_N], vocab_size))
        for name, state_ND in sites.states.items():
            train, test = (Examples(state_ND[chosen], sites.target_N[chosen]) for chosen in (~out_N, out_N))
            curve = sweep(train, test, BETAS, cross_entropy, vocab_size, seed + number, output_VD=output_VD)
            curves[name].append(curve)
    return curves, fmean(floors)


def rate_distortion(subject: Subject, options: Options) -> list[Finding]:
    """The curves with chance and floor, and the claim judged."""
    windows = min(MOST_WINDOWS, max(options.num_samples, subject.samples.samples_per_epoch))
    sites = read_sites(subject, windows, options.seed)
    head = subject.model.head
    weight_PD = subject.model.embedding.tokens.weight if head.output is None else head.output.weight
    output_VD = weight_PD.detach()[: head.vocab_size].cpu().float()
    curves, floor = curves_by_site(sites, output_VD, options.seed)
    own = {
        name: float(cross_entropy(state_ND @ output_VD.T, sites.target_N).double().mean())
        for name, state_ND in sites.states.items()
        if name == META_SITE
    }
    compared = {name: compare(curves[META_SITE], curves[name]) for name in curves if name != META_SITE}
    return [_finding(subject, options, sites, curves, floor, own[META_SITE], compared)]


def _finding(
    subject: Subject,
    options: Options,
    sites: Sites,
    curves: dict[str, list[list[Point]]],
    floor: float,
    own: float,
    compared: dict[str, list[dict[str, float]]],
) -> Finding:
    chance = math.log(subject.config.model.vocab_size)
    rows = [
        _row(name, [curve[place] for curve in found]) for name, found in curves.items() for place in range(len(BETAS))
    ]
    best = {name: min(row["distortion (nats)"] for row in rows if row["site"] == name) for name in curves}
    useless = [name for name, value in best.items() if value >= floor]
    windows = len(torch.unique(sites.window_N))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name in curves:
            colour, marker = _COLOURS[name]
            mine = sorted((row for row in rows if row["site"] == name), key=lambda row: row["rate (nats)"])
            x, y = [row["rate (nats)"] for row in mine], [row["distortion (nats)"] for row in mine]
            axes.plot(x, y, color=colour, marker=marker, markersize=5, label=_label(subject, name))
            axes.fill_between(
                x, [r["low"] for r in mine], [r["high"] for r in mine], color=colour, alpha=0.18, linewidth=0
            )
        axes.axhline(chance, color=BLACK, linestyle=":", label=f"chance, ln V = {chance:.2f}")
        axes.axhline(floor, color=GREY, linestyle="--", label=f"knowing nothing: unigram entropy, {floor:.2f}")
        axes.axhline(
            own, color=META, linestyle="-.", linewidth=1, label=f"the model's own loss at its meta-tokens, {own:.2f}"
        )
        finish(axes, "rate: KL to a standard normal (nats)", "distortion: cross-entropy of the next text token (nats)")

    said = [verdict(found, _label(subject, name)) for name, found in compared.items()]
    if useless:
        names = " and ".join(_label(subject, name) for name in useless)
        said.append(f"The distortion at the {names} never falls below the unigram entropy: these curves show nothing.")
    return Finding(
        name="rate-distortion",
        section=SECTION,
        title="What a few nats of a state say of the next token",
        caption=(
            "Variational information bottleneck on the frozen model: Gaussian head of 32 dimensions, linear-softmax"
            f" decoder, β from {BETAS[0]} to {BETAS[-1]}; both begin as the model's own output projection. The target"
            " is the next text token behind a meta-token, so that the last meta-token and the last text token before"
            f" it have read the same text; the earlier text token is one of the {EARLIER} slots before."
            f" {len(sites.target_N):,} examples from {windows} held-out windows, {_HELD_OUT:.0%} of the windows kept"
            f" for the distortion; bands are 95 % intervals (Student) over {SEEDS} seeds of split, noise and order"
            f" (from {options.seed}), of one trained model. {' '.join(said)} Both axes are upper bounds, since heads"
            " are fitted to few examples."
        ),
        draw=draw,
        tables={
            "curves": rows,
            "matched": [{"against": name, **row} for name, found in compared.items() for row in found],
        },
        facts={"chance": chance, "unigram": floor, "own loss": own, "examples": len(sites.target_N), "verdicts": said},
        size=(8.0, 6.0),
    )


def _label(subject: Subject, name: str) -> str:
    if name != TWIN_SITE or subject.twin is None:
        return name
    return f"twin's last {'meta-token' if subject.twin.form.num_meta_tokens else 'text token'}"


def _row(site: str, points: Sequence[Point]) -> dict[str, Any]:
    values = [point.distortion for point in points]
    mean, half = fmean(values), half_width(values) if len(values) > 1 else 0.0
    rate = fmean(point.rate for point in points)
    numbers = {"beta": points[0].beta, "rate (nats)": rate, "distortion (nats)": mean}
    return {"site": site, **numbers, "low": mean - half, "high": mean + half}
