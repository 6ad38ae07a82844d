"""What the quickstart claims about its two runs, computed from their files."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megameta.checkpoint import load_weights
from megameta.config import RunConfig
from megameta.data.dataset import IGNORE_INDEX, Dataset, SampleFormat
from megameta.data.sources import held_out_samples
from megameta.errors import UserError
from megameta.model.init import draw_parameter
from megameta.train.evaluation import evaluated_samples
from megameta.train.metrics import read_metrics

#: Output projections of the branch.
BRANCH_OUTPUT = "meta_attention.o_proj.weight"
#: A projection has moved when it differs from its initial value by at least this share of its norm.
MOVED = 1e-3


@dataclass(frozen=True)
class Claim:
    """Something that the quickstart asserts."""

    text: str
    holds: bool


def unigram_entropy(tokens: npt.NDArray[np.int64]) -> float:
    """Entropy of the tokens' own frequencies in nats: no predictor that ignores the context has a lower loss."""
    counts = np.unique(tokens, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def evaluated_targets(config: RunConfig, name: str = "valid") -> npt.NDArray[np.int64]:
    """The targets over which the evaluation of a run averages, in their order."""
    form = replace(SampleFormat.of(config.data, config.model.meta_token_id, config.run.seed), skip_first_target=True)
    dataset = Dataset(held_out_samples(config)[name], form)
    labels = np.concatenate([dataset[index].label_T for index in evaluated_samples(config, dataset)])
    return labels[labels != IGNORE_INDEX]


def final_evaluation(run_dir: Path, num_steps: int) -> dict[str, dict[str, Any]]:
    """Results by set name of the evaluation after the last step.

    Raises:
        UserError: there is none.
    """
    path = run_dir / "metrics.jsonl"
    for record in reversed(read_metrics(path)):
        if "eval" in record and record["step"] == num_steps:
            return record["eval"]
    raise UserError(f"{path}: no evaluation of step {num_steps}; start again with --fresh")


def branch_movement(run_dir: Path) -> dict[str, float]:
    """How far the branch's output projections are from their initial values, relative to those, by name."""
    config, weights = load_weights(run_dir)
    moved = {}
    for name, tensor in weights.items():
        if name.endswith(BRANCH_OUTPUT):
            initial = draw_parameter(name, tuple(tensor.shape), config.model, config.run.seed)
            moved[name] = float((tensor - initial).norm() / initial.norm())
    return moved


def loss_claims(losses: dict[str, float], entropy: float, margin: float) -> list[Claim]:
    """Each model's held-out loss is below the unigram entropy of the same targets by at least ``margin`` nats."""
    return [
        Claim(
            f"{name}: held-out loss {loss:.3f} is {entropy - loss:.3f} nats below the unigram entropy {entropy:.3f}"
            f" of the same targets (at least {margin:g} asked for)",
            math.isfinite(loss) and entropy - loss >= margin,
        )
        for name, loss in losses.items()
    ]


def branch_claim(moved: dict[str, float]) -> Claim:
    """Every output projection of the branch has moved from its initial value."""
    return Claim(
        f"the branch's {len(moved)} output projections have moved from their initial values, by"
        f" {_range(moved.values())} of their norm",
        bool(moved) and all(share >= MOVED for share in moved.values()),
    )


def same_targets_claim(counts: Iterable[int]) -> Claim:
    """All losses and the entropy are over the same number of targets."""
    counts = list(counts)
    same = len(set(counts)) == 1
    shown = f"{counts[0]:,}" if same else ", ".join(f"{count:,}" for count in counts)
    return Claim(f"all held-out numbers are over the same {shown} targets", same)


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{found[0]:.0%} to {found[-1]:.0%}" if found else "nothing"
