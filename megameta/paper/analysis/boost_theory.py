"""The paper's statement on entropy (spec §6), tried: what a boost of one key's logit does to the entropy of attention.

One key has probability p and gets Δ added to its logit; the others keep their proportions, whose entropy is R. With
q = p e^Δ / (1 − p + p e^Δ), the key's probability after the boost, and h the entropy of a coin,

    H(Δ) = h(q) + (1 − q) R,    dH/dΔ = −q (ln q + H) = q (1 − q) (ln((1 − q) / q) − R).

So the entropy falls with Δ exactly where q > e^(−H), that is q > 1 / (1 + e^R): where the key is likelier than a key
of a uniform distribution of the same entropy would be. Below, it rises, up to ln(1 + e^R), and only a boost past the
break-even makes up for that. Everything is float64. Letters: N keys.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.plots import BLACK, GREY, META, OTHER, PALE, TEXT, finish
from megameta.paper.analysis.registry import Options

SECTION = "Theory, run"
#: Keys of the example; the others share what the boosted one leaves evenly, so that R = ln(KEYS − 1).
KEYS = 64
#: Mean rise of the largest logit that the paper reports (spec §6), nats.
PAPER_BOOST = 1.26
_STEP = 1e-5

Floats = npt.NDArray[np.float64]


def entropy(logit_N: Floats) -> Any:
    """Of the softmax over the last axis, in nats."""
    shifted = logit_N - logit_N.max(axis=-1, keepdims=True)
    weight = np.exp(shifted)
    total = weight.sum(axis=-1, keepdims=True)
    return np.log(total[..., 0]) - (weight * shifted).sum(axis=-1) / total[..., 0]


def entropy_slope(logit_N: Floats, key: int) -> float:
    """Derivative of the entropy with the logit of ``key``: −p (ln p + H)."""
    shifted = logit_N - logit_N.max()
    log_p = float(shifted[key] - np.log(np.exp(shifted).sum()))
    return -math.exp(log_p) * (log_p + float(entropy(logit_N)))


def boosted(p: Any, boost: Any) -> Any:
    """q, the key's probability after the boost."""
    return p * np.exp(boost) / (1 - p + p * np.exp(boost))


def entropy_after(p: Any, boost: Any, rest: float) -> Any:
    """H(Δ) in closed form; ``rest`` is R. 0 < p < 1."""
    q = boosted(p, boost)
    left = (1 - p) / (1 - p + p * np.exp(boost))  # 1 − q without cancellation
    return -q * np.log(q) - left * np.log(left) + left * rest


def turning_point(rest: float) -> float:
    """The probability above which a boost lowers the entropy and below which it raises it: 1 / (1 + e^R)."""
    return 1 / (1 + math.exp(rest))


def break_even(p: float, rest: float) -> float:
    """The boost from which on the entropy is below what it was; 0 for keys from the turning point on."""
    if p >= turning_point(rest):
        return 0.0
    before = float(entropy_after(p, 0.0, rest))
    low = math.log((1 - p) / p) - rest  # here the entropy is largest; from here on it falls
    high = low + 1.0
    while float(entropy_after(p, high, rest)) > before:
        high += 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float(entropy_after(p, middle, rest)) > before else (low, middle)
    return high


def smallest_drop(boost: float, rest: float, most: float) -> float:
    """The least that the boost lowers the entropy, over keys from the turning point up to probability ``most``."""
    p = np.linspace(turning_point(rest), most, 20_001)
    return float((entropy_after(p, 0.0, rest) - entropy_after(p, boost, rest)).min())


def share_of_keys_that_sharpen(spread: float, boost: float, seed: int, rows: int = 2000) -> dict[str, float]:
    """Rows of KEYS normal logits: shares of keys, and of attention, whose boost lowers the entropy."""
    logit_RN = np.random.default_rng(seed).normal(0.0, spread, (rows, KEYS))
    before_R1 = entropy(logit_RN)[:, None]
    p_RN = np.exp(logit_RN - logit_RN.max(axis=1, keepdims=True))
    p_RN /= p_RN.sum(axis=1, keepdims=True)
    # R of each key's others, from H = h(p) + (1 − p) R
    coin_RN = -p_RN * np.log(p_RN) - (1 - p_RN) * np.log1p(-p_RN)
    rest_RN = (before_R1 - coin_RN) / (1 - p_RN)
    q_RN = boosted(p_RN, boost)
    after_RN = -q_RN * np.log(q_RN) - (1 - q_RN) * np.log1p(-q_RN) + (1 - q_RN) * rest_RN
    falls_RN = after_RN < before_R1
    return {
        "spread of logits": spread,
        "mean entropy (nats)": float(before_R1.mean()),
        "keys": float(falls_RN.mean()),
        "attention": float((p_RN * falls_RN).sum(axis=1).mean()),
    }


def boost_theory(options: Options) -> list[Finding]:
    """The regions, then the derivative and the bound."""
    return [_regions(options), _slopes_and_bound()]


#: Entropies R of the other keys: as flat as can be, and sharp.
_RESTS = {"the others flat": math.log(KEYS - 1), "the others sharp": 0.3}


def _changes() -> tuple[Floats, Floats, dict[str, Floats]]:
    """Probabilities, boosts, and for each R the change of the entropy (boost, p)."""
    p, boost = np.logspace(-4, math.log10(0.995), 241), np.linspace(0, 8, 161)
    found = {
        name: entropy_after(p[None, :], boost[:, None], rest) - entropy_after(p, 0.0, rest)[None, :]
        for name, rest in _RESTS.items()
    }
    return p, boost, found


def _regions(options: Options) -> Finding:
    p, boost, changes = _changes()
    even = [
        {"R (nats)": rest, "p": float(value), "boost (nats)": break_even(float(value), rest)}
        for rest in _RESTS.values()
        for value in p[p < turning_point(rest)]
    ]
    shares = [share_of_keys_that_sharpen(spread, PAPER_BOOST, options.seed) for spread in (0.5, 1.0, 2.0, 4.0)]

    def draw(figure: Any) -> None:
        from matplotlib.colors import SymLogNorm

        for axes, (name, rest) in zip(figure.subplots(1, 2, sharey=True), _RESTS.items(), strict=True):
            scale = SymLogNorm(linthresh=0.01, vmin=-4, vmax=4)
            shown = axes.pcolormesh(p, boost, changes[name], cmap="RdBu_r", norm=scale, shading="nearest")
            line = [row for row in even if row["R (nats)"] == rest]
            x, y = [row["p"] for row in line], [row["boost (nats)"] for row in line]
            turn = turning_point(rest)
            axes.plot(x, y, color=BLACK, label="break-even: above it the entropy is below what it was")
            axes.axvline(turn, color=BLACK, linestyle=":", label=f"1 / (1 + e$^R$) = {turn:.4f}")
            axes.axhline(PAPER_BOOST, color=OTHER, linestyle="--", label=f"the paper's mean boost, {PAPER_BOOST} nats")
            axes.set_xscale("log")
            axes.set_ylim(0, 8)
            finish(
                axes, f"probability p of the key before ({name}, R = {rest:.2f} nats)", "boost Δ of its logit (nats)"
            )
        bar = figure.colorbar(shown, ax=figure.axes, label="change of the entropy (nats)")
        bar.set_ticks([-4, -1, -0.1, 0, 0.1, 1, 4], labels=["−4", "−1", "−0.1", "0", "0.1", "1", "4"])

    flat, sharp = _RESTS.values()
    return Finding(
        name="theory-regions",
        section=SECTION,
        title="A boost lowers the entropy of a likely key, and raises that of an unlikely one",
        caption=(
            f"Computed in closed form, no model: {KEYS} keys, one of probability p gets Δ added to its logit, the"
            " others keep their proportions, whose entropy is R. Blue: the entropy falls, red: it rises (colours are"
            " logarithmic beyond 0.01 nats). A key right of the dotted line lowers it with any boost. Left of it a"
            " small boost raises it, and only one past the black line lowers it: the statement that a boost lowers the"
            " entropy needs the boosted key to be where attention is already. The rise is at most ln(1 + e^−R):"
            f" {math.log1p(math.exp(-flat)):.3f} nats where the others are flat, {math.log1p(math.exp(-sharp)):.2f}"
            f" where they are sharp. Of rows of {KEYS} normal logits, a boost of {PAPER_BOOST} of a key at random"
            f" lowers the entropy for {shares[1]['keys']:.0%} of the keys at a spread of 1 and {shares[3]['keys']:.0%}"
            f" at a spread of 4 (seed {options.seed}); these keys hold {shares[1]['attention']:.0%} and"
            f" {shares[3]['attention']:.0%} of the attention."
        ),
        draw=draw,
        tables={
            "break-even": even,
            "change": [
                {"R (nats)": rest, "p": float(p[x]), "boost (nats)": float(boost[y]), "change (nats)": float(d[y, x])}
                for rest, d in zip(_RESTS.values(), changes.values(), strict=True)
                for y in range(0, len(boost), 8)
                for x in range(0, len(p), 8)
            ],
            "random-logits": shares,
        },
        facts={"keys": KEYS, "turning points": [turning_point(rest) for rest in _RESTS.values()], "seed": options.seed},
        size=(11.0, 5.5),
    )


def example_logits(p: float) -> Floats:
    """KEYS logits, the first key of probability p and the others equal."""
    logit_N = np.zeros(KEYS)
    logit_N[0] = math.log(p / (1 - p) * (KEYS - 1))
    return logit_N


def slope_rows(probabilities: Sequence[float], boosts: Floats) -> list[dict[str, float]]:
    """dH/dΔ in closed form and by central differences of the entropy as it is defined."""
    rows = []
    unit = np.eye(1, KEYS)[0]
    for p in probabilities:
        for boost in boosts:
            logit_N = example_logits(p) + boost * unit
            difference = entropy(logit_N + _STEP * unit) - entropy(logit_N - _STEP * unit)
            rows.append(
                {
                    "p": p,
                    "boost (nats)": float(boost),
                    "closed form": entropy_slope(logit_N, 0),
                    "finite difference": float(difference) / (2 * _STEP),
                }
            )
    return rows


def _slopes_and_bound() -> Finding:
    rest = math.log(KEYS - 1)
    chosen = {0.001: PALE, 1 / KEYS: BLACK, 0.2: OTHER, 0.8: META}
    rows = slope_rows(list(chosen), np.linspace(0, 8, 33))
    worst = max(abs(row["closed form"] - row["finite difference"]) for row in rows)
    boosts = {0.5: PALE, PAPER_BOOST: META, 3.0: TEXT}
    p = 1 / (1 + np.exp(-np.linspace(math.log(1e-4), -math.log(1e-6), 401)))
    drops = {b: entropy_after(p, 0.0, rest) - entropy_after(p, b, rest) for b in boosts}
    bound = [
        {"boost (nats)": b, "p at most": most, "smallest drop (nats)": smallest_drop(b, rest, most)}
        for b in boosts
        for most in (0.9, 0.99, 0.999, 0.9999, 0.999999)
    ]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for value, colour in chosen.items():
            mine = [row for row in rows if row["p"] == value]
            x = [row["boost (nats)"] for row in mine]
            left.plot(x, [row["closed form"] for row in mine], color=colour, label=f"p = {value:.4g}")
            left.plot(x, [row["finite difference"] for row in mine], "o", color=colour, markersize=3)
        left.axhline(0, color=GREY, linewidth=1)
        finish(left, "boost Δ (nats)", "slope dH/dΔ; dots: finite differences")
        for value, colour in boosts.items():
            right.plot(p, drops[value], color=colour, label=f"Δ = {value:g} nats")
        right.axhline(0, color=GREY, linewidth=1)
        right.axvline(turning_point(rest), color=BLACK, linestyle=":", label="1 / (1 + e$^R$)")
        right.set_xscale("logit")
        right.set_yscale("symlog", linthresh=0.01)
        right.set_yticks([-0.01, 0, 0.01, 0.1, 1], ["−0.01", "0", "0.01", "0.1", "1"])
        right.set_xticks([1e-4, 1e-2, 0.5, 0.99, 0.9999], ["0.0001", "0.01", "0.5", "0.99", "0.9999"])
        right.minorticks_off()
        finish(right, "probability p before the boost", "drop of the entropy, H(0) − H(Δ) (nats)")

    at_paper = {row["p at most"]: row["smallest drop (nats)"] for row in bound if row["boost (nats)"] == PAPER_BOOST}
    return Finding(
        name="theory-slope",
        section=SECTION,
        title="The derivative in closed form, and no drop that depends on the boost alone",
        caption=(
            f"No model: {KEYS} keys, all but the boosted one equal, float64. Left: dH/dΔ = −q (ln q + H), q being the"
            " key's probability after the boost, against central differences of the entropy; they differ by at most"
            f" {worst:.0e}. Right: by how much a boost lowers the entropy, with p stretched towards 0 and 1 (logit) and"
            " the drop logarithmic beyond 0.01 nats, which bends the curves there. The paper bounds it from below by a"
            " κ(Δ) > 0. Left of the dotted line that is false for small boosts, since the entropy rises; right of it"
            " the entropy does fall, but by as little as one likes where p nears 1: over keys up to p = 0.9 a boost of"
            f" {PAPER_BOOST} lowers it by at least {at_paper[0.9]:.3f} nats, up to 0.9999 by {at_paper[0.9999]:.4f}. So"
            " no positive κ of Δ alone holds; one of Δ and of a bound on p does."
        ),
        draw=draw,
        tables={"slope": rows, "bound": bound},
        facts={"largest difference of slopes": worst, "step of differences": _STEP},
        size=(10.0, 5.0),
    )
