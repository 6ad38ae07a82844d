"""The paper's two statements, run: proofs by example that need no model (spec §6)."""

from megameta.paper.analysis.bias_theory import bias_theory
from megameta.paper.analysis.boost_theory import boost_theory
from megameta.paper.analysis.findings import Finding
from megameta.paper.analysis.registry import Options


def theory(options: Options) -> list[Finding]:
    """Entropy under a boost, then the biases that positions and meta-tokens can express."""
    return [*boost_theory(options), *bias_theory(options)]
