"""The analyses by name, each a family of figures: ``megameta analyze NAME MODEL``. Light to import: --help reads it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megameta.paper.analysis.findings import Finding

if TYPE_CHECKING:
    from megameta.paper.analysis.subject import Subject


@dataclass(frozen=True)
class Options:
    """What all analyses are told.

    Attributes:
        num_samples: held-out sequences to look at.
        seed: of what is drawn.
        layers: layers that maps are drawn of; empty: some, spread over all.
    """

    num_samples: int = 64
    seed: int = 1234
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """A family of figures.

    Attributes:
        function: "module:function" of (Subject, Options) -> list[Finding]; (Options) -> list[Finding] where it
            needs no model.
        help: what it shows, a line.
        needs: "nothing", "model" (and held-out text), "meta-tokens" (in the text), or "branch" (and the meta branch).
            Where a model lacks it, a report leaves the family out and says why.
    """

    function: str
    help: str
    needs: str = "model"

    def load(self) -> Callable[..., list[Finding]]:
        """The function."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)

    def obstacle(self, subject: "Subject") -> str | None:
        """Why it cannot be run on this model; None where it can."""
        if self.needs in ("meta-tokens", "branch") and not subject.has_meta_tokens:
            return f"{subject.name} was trained without meta-tokens (data.meta_token_fraction is 0)"
        if self.needs == "branch" and not subject.has_branch:
            return f"{subject.name} has no meta branch (model.meta_attention is false)"
        return None


#: In the order of the report.
ANALYSES: dict[str, Analysis] = {
    "attention": Analysis(
        "megameta.paper.analysis.attention_maps:attention_maps",
        "attention maps by layer and head, meta-tokens marked",
        "meta-tokens",
    ),
    "entropy": Analysis(
        "megameta.paper.analysis.entropy:entropy",
        "entropy of text queries with and without meta-tokens, by layer",
        "meta-tokens",
    ),
    "boost": Analysis(
        "megameta.paper.analysis.boost:boost",
        "what the meta-token's embedding does to logits and entropy",
        "meta-tokens",
    ),
    "mass": Analysis(
        "megameta.paper.analysis.mass:mass",
        "attention that meta-tokens receive, by layer and distance, against their share of the keys",
        "meta-tokens",
    ),
    "residual": Analysis(
        "megameta.paper.analysis.residual:residual",
        "cosine similarity of meta-tokens with earlier tokens, by layer and distance; norms",
        "meta-tokens",
    ),
    "lens": Analysis(
        "megameta.paper.analysis.lens:lens",
        "logit lens at meta positions and at text positions, by layer",
        "meta-tokens",
    ),
    "branch": Analysis(
        "megameta.paper.analysis.branch:branch",
        "what the meta branch adds by layer, and what is lost when it is switched off",
        "branch",
    ),
    "rate-distortion": Analysis(
        "megameta.paper.analysis.rate_distortion:rate_distortion",
        "what a few nats of the last meta-token's state say of the next token, against the last text token's",
        "meta-tokens",
    ),
    "cache": Analysis(
        "megameta.paper.analysis.cache_sizes:cache_sizes",
        "loss against the rows that a cache keeps: meta-tokens, a window, random ones",
        "meta-tokens",
    ),
    "theory": Analysis(
        "megameta.paper.analysis.bias_theory:theory",
        "the paper's two statements, run on examples, where they hold and where not",
        "nothing",
    ),
}
