"""Logit lens: the residual of every level read as if it were the last one, at meta positions and at text positions.

Letters: B batch, N sequences, T slots, D model width, V vocabulary, E levels, M meta-tokens, R rows.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megameta.data.dataset import IGNORE_INDEX
from megameta.data.loader import Batch
from megameta.paper.analysis.attention_numbers import is_meta_of
from megameta.paper.analysis.estimates import estimate
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.observe import observed_residuals
from megameta.paper.analysis.plots import BLACK, META, TEXT, finish, line
from megameta.paper.analysis.registry import Options
from megameta.paper.analysis.residual import LEVELS, SECTION
from megameta.paper.analysis.subject import Subject

#: Rows whose logits are held at once.
_ROWS = 1024
KINDS = ("meta", "text")


@dataclass
class Lens:
    """By query kind ("meta", "text"): rows that have a target.

    Attributes:
        loss_EN, agrees_EN: mean next-token loss in nats; share of rows whose most likely token is that of the last
            level. NaN where a sequence has no such row.
        top_E: how often each token is the most likely one.
    """

    loss_EN: dict[str, Tensor]
    agrees_EN: dict[str, Tensor]
    top_E: dict[str, list[Counter[int]]] = field(default_factory=dict)


def lens_numbers(subject: Subject, num_samples: int) -> Lens:
    """Over held-out sequences."""
    parts: dict[str, list[Tensor]] = {f"{what} {kind}": [] for what in ("loss", "agrees") for kind in KINDS}
    levels = subject.config.model.num_layers + 1
    top: dict[str, list[Counter[int]]] = {kind: [Counter() for _ in range(levels)] for kind in KINDS}
    with torch.no_grad():
        for batch in subject.held_out(num_samples, meta_tokens=subject.has_meta_tokens):
            loss_EBT, top_EBT = _of_batch(subject, batch)
            is_meta_BT, counts_BT = is_meta_of(subject, batch), batch.label_BT != IGNORE_INDEX
            for kind, rows_BT in (("meta", is_meta_BT & counts_BT), ("text", ~is_meta_BT & counts_BT)):
                agrees_EBT = (top_EBT == top_EBT[-1]).double()
                for what, value_EBT in (("loss", loss_EBT), ("agrees", agrees_EBT)):
                    total_EB = torch.where(rows_BT, value_EBT, 0).sum(dim=-1, dtype=torch.float64)
                    parts[f"{what} {kind}"].append((total_EB / rows_BT.sum(dim=-1)).cpu())
                for level in range(levels):
                    top[kind][level].update(top_EBT[level][rows_BT].tolist())
    whole = {name: torch.cat(found, dim=1) for name, found in parts.items()}
    return Lens({kind: whole[f"loss {kind}"] for kind in KINDS}, {kind: whole[f"agrees {kind}"] for kind in KINDS}, top)


def _of_batch(subject: Subject, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and most likely token of every level and slot: (E, B, T) each; loss 0 where there is no target."""
    losses: list[Tensor] = []
    tops: list[Tensor] = []

    def see(level: int, x_BTD: Tensor) -> None:
        rows = zip(x_BTD.flatten(0, 1).split(_ROWS), batch.label_BT.flatten().split(_ROWS), strict=True)
        loss, top = [], []
        for x_RD, label_R in rows:
            logit_RV = subject.logits(x_RD)
            loss.append(F.cross_entropy(logit_RV, label_R, ignore_index=IGNORE_INDEX, reduction="none"))
            top.append(logit_RV.argmax(dim=-1))
        losses.append(torch.cat(loss).view(batch.label_BT.shape))
        tops.append(torch.cat(top).view(batch.label_BT.shape))

    with observed_residuals(subject.model, see):
        subject.hidden_states(batch)
    return torch.stack(losses), torch.stack(tops)


def lens(subject: Subject, options: Options) -> list[Finding]:
    """Curves over levels, and the most likely tokens of one sequence."""
    found = lens_numbers(subject, options.num_samples)
    twin = None if subject.twin is None else lens_numbers(subject.twin, options.num_samples)
    return [_curves(subject, found, twin), _tokens(subject)]


def _curves(subject: Subject, found: Lens, twin: Lens | None) -> Finding:
    loss = {kind: [estimate(value_N) for value_N in found.loss_EN[kind]] for kind in KINDS}
    agrees = {kind: [estimate(value_N) for value_N in found.agrees_EN[kind]] for kind in KINDS}
    gap = [estimate(value_N) for value_N in found.loss_EN["meta"] - found.loss_EN["text"]]
    levels = range(len(gap))

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for axes, curves in ((left, loss), (right, agrees)):
            line(axes, levels, curves["meta"], "at meta positions", META, "-", "s")
            line(axes, levels, curves["text"], "at text positions", TEXT)
        if twin is not None:
            for axes, value_EN in ((left, twin.loss_EN["text"]), (right, twin.agrees_EN["text"])):
                curve = [estimate(value_N) for value_N in value_EN]
                line(axes, range(len(curve)), curve, "twin, at text positions", BLACK, ":", "x")
        finish(left, "level", "next-token loss (nats)", ticks=levels)
        finish(right, "level", "same most likely token as at the end (share)", ticks=levels)

    rows: list[dict[str, Any]] = []
    for level in levels:
        rows.append({"level": level})
        for kind in KINDS:
            rows[-1] |= loss[kind][level].columns(f"loss at {kind} positions (nats)")
            rows[-1] |= agrees[kind][level].columns(f"agreement at {kind} positions")
        rows[-1] |= gap[level].columns("meta minus text (nats)")
    return Finding(
        name="lens",
        section=SECTION,
        title="Logit lens at meta positions",
        caption=(
            "The residual of every level, through the final norm and the output projection, as a prediction of the next"
            f" text token: {found.loss_EN['meta'].shape[1]} held-out sequences, slots that have a target, 95 %"
            f" intervals over sequences. {LEVELS[0].upper()}{LEVELS[1:]}. A meta-token has no text of its own and"
            " predicts the token that follows; its targets are other places of the same text, so that the two curves"
            f" are comparable on average. At the end: meta minus text {gap[-1]} nats. The lens is a reading that the"
            " model was not trained for: a high loss at an inner level does not mean that the information is missing."
        ),
        draw=draw,
        tables={"levels": rows, "top-tokens": _top_rows(subject, found)},
        facts={
            "sequences": found.loss_EN["meta"].shape[1],
            "loss at the end, meta positions (nats)": str(loss["meta"][-1]),
            "loss at the end, text positions (nats)": str(loss["text"][-1]),
            "meta minus text (nats)": str(gap[-1]),
        },
        size=(9.0, 4.4),
    )


def _top_rows(subject: Subject, found: Lens) -> list[dict[str, Any]]:
    """The five most frequent most likely tokens of every level and kind."""
    return [
        {
            "level": level,
            "positions": kind,
            "rank": rank,
            "token": subject.text(token),
            "share": count / counter.total(),
        }
        for kind in KINDS
        for level, counter in enumerate(found.top_E[kind])
        for rank, (token, count) in enumerate(counter.most_common(5), 1)
    ]


def _tokens(subject: Subject, most: int = 12) -> Finding:
    """The most likely token at the meta-tokens of the first held-out sequence."""
    batch = next(subject.held_out(1, batch_size=1))
    slots = is_meta_of(subject, batch)[0].nonzero().flatten().tolist()[:most]
    grid: list[list[tuple[int, float]]] = []

    def see(level: int, x_BTD: Tensor) -> None:
        probability_RV = subject.logits(x_BTD[0, slots]).softmax(dim=-1)
        best = probability_RV.max(dim=-1)
        grid.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))

    with torch.no_grad(), observed_residuals(subject.model, see):
        subject.hidden_states(batch)
    token_T, label_T = batch.token_BT[0].tolist(), batch.label_BT[0].tolist()
    before = [_text_before(subject, token_T, slot) for slot in slots]
    after = ["(none)" if label_T[slot] == IGNORE_INDEX else subject.text(label_T[slot]) for slot in slots]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        chances = [[chance for _, chance in row] for row in grid]
        image = axes.imshow(chances, aspect="auto", origin="lower", cmap="cividis", vmin=0)
        half = max(max(row) for row in chances) / 2
        figure.colorbar(image, ax=axes, label="probability of the most likely token")
        for level, row in enumerate(grid):
            for x, (token, chance) in enumerate(row):
                colour = "black" if chance > half else "white"
                axes.text(x, level, _short(subject.text(token)), ha="center", va="center", fontsize=7, color=colour)
        labels = [f"{slot}\n{_short(b)}\n→ {_short(a)}" for slot, b, a in zip(slots, before, after, strict=True)]
        axes.set_xticks(range(len(slots)), labels, fontsize=7)
        axes.set_yticks(range(len(grid)))
        axes.set_xlabel("slot of the meta-token; text before it; → the token to predict")
        axes.set_ylabel("level")

    rows = [
        {"level": level, "slot": slot, "token": subject.text(token), "probability": chance, "target": target}
        for level, row in enumerate(grid)
        for slot, target, (token, chance) in zip(slots, after, row, strict=True)
    ]
    return Finding(
        name="lens-tokens",
        section=SECTION,
        title="What meta-tokens would say, level by level",
        caption=(
            f"The first {len(slots)} meta-tokens of one held-out sequence (sample {batch.sample_ids[0]}): the most"
            " likely next token that the residual of each level gives through the final norm and the output projection,"
            " and its probability (colour). Under each column the text token before the meta-token and the one to"
            " predict; (none): no target there, because a meta-token follows. One example: look at the curves for what"
            " is general."
        ),
        draw=draw,
        tables={"tokens": rows},
        facts={"sample": batch.sample_ids[0]},
        size=(11.0, 0.45 * len(grid) + 2.4),
    )


def _text_before(subject: Subject, token_T: list[int], slot: int) -> str:
    earlier = [token for token in token_T[:slot] if token != subject.form.meta_token_id]
    return subject.text(earlier[-1]) if earlier else "(start)"


def _short(text: str, most: int = 11) -> str:
    """Fits into a cell; what matplotlib would take for a formula, or no font has, is shown harmlessly."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text.replace("$", r"\$")
