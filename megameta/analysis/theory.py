"""The paper's two statements, run: proofs by example that need no model (spec §6)."""

from megameta.analysis.bias_theory import bias_theory
from megameta.analysis.boost_theory import boost_theory
from megameta.analysis.findings import Finding
from megameta.analysis.registry import Options


def theory(options: Options) -> list[Finding]:
    """Entropy under a boost, then the biases that positions and meta-tokens can express."""
    return [*boost_theory(options), *bias_theory(options)]
