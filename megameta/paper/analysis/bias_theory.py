"""The paper's statement on expressiveness (spec §6), tried: attention biases that depend on where meta-tokens are.

The target: over contents c, which have meta-tokens at different places,

    B[c, i, j] = 2 m[c, j] + m[c, i] m[c, j] − 0.1 (i − j),    j ≤ i, m = 1 at meta-tokens, else 0.

A bias that positions give is the same for all contents: at best any matrix a[i, j] (absolute), any r[i − j] (relative).
Softmax does not see a number added to a whole row, so rows are compared with their means taken off. The best of either
family is then a least-squares projection, computed exactly: its residual is the family's floor. Everything is float64.

Letters: C contents, N positions, P pairs j ≤ i, K width of queries and keys.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megameta.paper.analysis.boost_theory import boost_theory
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.plots import META, OTHER, TEXT, finish
from megameta.paper.analysis.registry import Options

SECTION = "Theory, run"
CONTENTS, POSITIONS, METAS, WIDTH = 16, 16, 2, 6
TO_META, BETWEEN_METAS, DECAY = 2.0, 1.0, 0.1
#: Root mean square residual that counts as a fit.
FITTED = 1e-6


def draw_contents(seed: int) -> Tensor:
    """Where meta-tokens are: float64 (C, N) of 0 and 1, METAS of 1 in each."""
    generator = torch.Generator().manual_seed(seed)
    score_CN = torch.rand(CONTENTS, POSITIONS, generator=generator)
    return torch.zeros_like(score_CN, dtype=torch.float64).scatter(1, score_CN.topk(METAS).indices, 1.0)


def target_bias(meta_CN: Tensor) -> Tensor:
    """B, (C, N, N); entries above the diagonal mean nothing."""
    place = torch.arange(meta_CN.shape[1], dtype=torch.float64)
    key, query = meta_CN[:, None, :], meta_CN[:, :, None]
    return TO_META * key + BETWEEN_METAS * query * key - DECAY * (place[:, None] - place[None, :])


def centred(bias: Tensor) -> Tensor:
    """(…, N, N) with each row's mean over j ≤ i taken off, 0 above the diagonal."""
    causal_NN = torch.ones(bias.shape[-2:], dtype=torch.bool).tril()
    kept = bias.masked_fill(~causal_NN, 0.0)
    mean = kept.sum(dim=-1, keepdim=True) / causal_NN.sum(dim=-1, keepdim=True)
    return (kept - mean).masked_fill(~causal_NN, 0.0)


def residual(target_CNN: Tensor, bias: Tensor) -> Tensor:
    """Root mean square over contents and pairs j ≤ i, rows centred. ``bias``: (N, N) or (C, N, N)."""
    count, size = target_CNN.shape[0], target_CNN.shape[1]
    return ((centred(target_CNN) - centred(bias)).square().sum() / (count * size * (size + 1) / 2)).sqrt()


def best_absolute(target_CNN: Tensor) -> Tensor:
    """The matrix nearest to all contents: their mean (N, N)."""
    return centred(target_CNN).mean(dim=0)


def best_relative(target_CNN: Tensor) -> Tensor:
    """The nearest matrix r[i − j] (N, N), by least squares over the values of r."""
    size = target_CNN.shape[1]
    place = torch.arange(size)
    offset_NN = place[:, None] - place[None, :]
    feature_ONN = (offset_NN == place[:, None, None]).double()  # one an offset
    design_PO = centred(feature_ONN).flatten(1).T
    mean_P1 = best_absolute(target_CNN).flatten()[:, None]
    # One direction of r (a constant) does nothing to centred rows: gelsd takes the shortest solution.
    r_O = torch.linalg.lstsq(design_PO, mean_P1, driver="gelsd").solution[:, 0]
    return r_O[offset_NN.clamp(min=0)]


class Bilinear(nn.Module):
    """q · k of learned vectors, as attention makes logits: of positions, and where ``sees_meta`` of the meta-token."""

    def __init__(self, sees_meta: bool, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(rows: int) -> nn.Parameter:
            return nn.Parameter(0.3 * torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator))

        self.query, self.key = drawn(POSITIONS), drawn(POSITIONS)
        self.meta_query = drawn(1) if sees_meta else None
        self.meta_key = drawn(1) if sees_meta else None

    def forward(self, meta_CN: Tensor) -> Tensor:
        """(C, N, N)."""
        query, key = self.query.expand(len(meta_CN), -1, -1), self.key.expand(len(meta_CN), -1, -1)
        if self.meta_query is not None and self.meta_key is not None:
            query, key = query + meta_CN[..., None] * self.meta_query, key + meta_CN[..., None] * self.meta_key
        return query @ key.mT


class Relative(nn.Module):
    """r[i − j], learned."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Parameter(torch.zeros(POSITIONS, dtype=torch.float64))

    def forward(self, meta_CN: Tensor) -> Tensor:
        """(N, N)."""
        place = torch.arange(POSITIONS)
        return self.r[(place[:, None] - place[None, :]).clamp(min=0)]


def fit(model: nn.Module, meta_CN: Tensor, target_CNN: Tensor, steps: int = 40) -> list[float]:
    """Residuals after each step of Levenberg and Marquardt's method; the model is fitted in place.

    It ends below FITTED / 10, or where a step lowers the residual by less than a millionth.
    """
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    kept_NN = torch.ones_like(target_CNN[0], dtype=torch.bool).tril()
    wanted_CNN = centred(target_CNN)
    scale = (len(target_CNN) * int(kept_NN.sum())) ** -0.5

    def errors(x: Tensor) -> Tensor:
        parts = x.split([shape.numel() for shape in shapes])
        given = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        bias = torch.func.functional_call(model, given, (meta_CN,))
        return ((centred(bias) - wanted_CNN)[:, kept_NN] * scale).flatten()

    with torch.no_grad():
        x = torch.cat([p.flatten() for p in model.parameters()])
        error, damping, found = errors(x), 1e-2, []
        for _ in range(steps):
            slope = torch.func.jacfwd(errors)(x)
            square, gradient = slope.T @ slope, slope.T @ error
            while damping < 1e8:
                step = torch.linalg.solve(square + damping * torch.eye(len(x), dtype=x.dtype), gradient)
                tried = errors(x - step)
                if tried.norm() < error.norm():
                    break
                damping *= 4
            else:
                break
            x, error, damping = x - step, tried, max(damping / 4, 1e-9)
            found.append(float(error.norm()))
            if found[-1] < FITTED / 10 or (len(found) > 1 and found[-2] - found[-1] < 1e-6 * found[-1]):
                break
        for p, part in zip(model.parameters(), x.split([shape.numel() for shape in shapes]), strict=True):
            p.copy_(part.view_as(p))
    return found


def bias_theory(options: Options) -> list[Finding]:
    """Fits and floors; then what was fitted."""
    meta_CN = draw_contents(options.seed)
    target_CNN = target_bias(meta_CN)
    floors = {
        "absolute": float(residual(target_CNN, best_absolute(target_CNN))),
        "relative": float(residual(target_CNN, best_relative(target_CNN))),
    }
    models: dict[str, nn.Module] = {
        "absolute": Bilinear(sees_meta=False, seed=options.seed),
        "relative": Relative(),
        "meta": Bilinear(sees_meta=True, seed=options.seed),
    }
    curves = {name: fit(model, meta_CN, target_CNN) for name, model in models.items()}
    with torch.no_grad():
        shown = {name: model(meta_CN).expand_as(target_CNN) for name, model in models.items()}
    return [_fits(options, floors, curves), _pictures(meta_CN, target_CNN, shown)]


_LABELS = {
    "absolute": ("absolute positions (q · k of learned position vectors)", TEXT),
    "relative": ("relative positions (any r[i − j])", OTHER),
    "meta": ("positions and a meta-token's own vectors", META),
}


def _fits(options: Options, floors: dict[str, float], curves: dict[str, list[float]]) -> Finding:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, values in curves.items():
            label, colour = _LABELS[name]
            axes.plot(range(1, len(values) + 1), values, color=colour, label=label)
        for name, floor in floors.items():
            colour = _LABELS[name][1]
            axes.axhline(
                floor, color=colour, linestyle="--", linewidth=1, label=f"floor of all {name} biases: {floor:.3f}"
            )
        axes.axhline(FITTED, color=META, linestyle=":", label=f"{FITTED:g}")
        axes.set_yscale("log")
        finish(axes, "steps of Levenberg–Marquardt", "root mean square residual (nats)")

    last = {name: values[-1] for name, values in curves.items()}
    words = "does" if last["meta"] <= FITTED else "did not get that far here"
    return Finding(
        name="theory-expressiveness",
        section=SECTION,
        title="A bias that follows the meta-tokens is out of reach of positions alone",
        caption=(
            f"No trained model. The target bias rises by {TO_META:g} nats at meta-token keys, by {BETWEEN_METAS:g} more"
            f" between two meta-tokens, and falls by {DECAY:g} a token of distance, over {CONTENTS} sequences of"
            f" {POSITIONS} tokens with {METAS} meta-tokens at random places (seed {options.seed}). Dashed: the least"
            " residual that any bias of the positions alone can have, an exact projection; whatever a row has in common"
            f" is free. Absolute positions stop at {last['absolute']:.4f} (floor {floors['absolute']:.4f}), relative"
            f" ones at {last['relative']:.4f} (floor {floors['relative']:.4f}); with a query and a key vector for the"
            f" meta-token the fit should reach {FITTED:g} and {words}: {last['meta']:.1e}. What decides is that the"
            " logits can see the content: any token that attention knows by its embedding would do as well. A"
            " meta-token is one that says nothing else."
        ),
        draw=draw,
        tables={
            "residuals": [
                {"family": name, "step": number, "residual (nats)": value}
                for name, values in curves.items()
                for number, value in enumerate(values, 1)
            ],
            "floors": [
                {"family": name, "floor (nats)": floor, "reached (nats)": last[name]} for name, floor in floors.items()
            ],
        },
        facts={
            "seed": options.seed,
            "contents": CONTENTS,
            "positions": POSITIONS,
            "reached by meta-tokens": last["meta"],
        },
        size=(8.0, 5.5),
    )


def _pictures(meta_CN: Tensor, target_CNN: Tensor, shown: dict[str, Tensor]) -> Finding:
    pictures = {"target": target_CNN, **shown}
    titles = {"target": "target", "absolute": "best absolute", "relative": "best relative", "meta": "with meta-tokens"}
    above_NN = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).triu(1)
    images = {name: centred(bias).masked_fill(above_NN, float("nan")) for name, bias in pictures.items()}
    limit = float(images["target"][:2].nan_to_num().abs().max())

    def draw(figure: Any) -> None:
        axes = figure.subplots(2, len(images), sharex=True, sharey=True)
        for row in range(2):
            for column, (name, image_CNN) in enumerate(images.items()):
                place = axes[row][column]
                seen = place.imshow(image_CNN[row].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
                places = meta_CN[row].nonzero().flatten().tolist()
                place.set_xticks(range(0, POSITIONS, 5))
                place.set_yticks(range(0, POSITIONS, 5))
                place.plot(places, [-1] * len(places), "v", color=META, markersize=4, clip_on=False)
                if row == 0:
                    place.set_title(titles[name], pad=12)
                else:
                    place.set_xlabel("key (position)")
            axes[row][0].set_ylabel(f"sequence {row + 1}\nquery (position)")
        figure.colorbar(seen, ax=axes, label="bias, row mean taken off (nats)", shrink=0.8)

    return Finding(
        name="theory-biases",
        section=SECTION,
        title="The target in two sequences, and what each family makes of it",
        caption=(
            f"The fits of the figure before, for the first two of {CONTENTS} sequences; triangles mark their"
            " meta-tokens. Biases of positions are the same in both rows, and blur what moves."
        ),
        draw=draw,
        tables={
            "biases": [
                {"sequence": c, "query": i, "key": j, **{name: float(image[c, i, j]) for name, image in images.items()}}
                for c in range(2)
                for i in range(POSITIONS)
                for j in range(i + 1)
            ]
        },
        size=(11.0, 5.5),
    )


def theory(options: Options) -> list[Finding]:
    """The paper's two statements, run: entropy under a boost, then biases of positions and of meta-tokens."""
    return [*boost_theory(options), *bias_theory(options)]
