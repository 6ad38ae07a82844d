"""The models that are compared. Claims about the branch need the control beside it: markers without the branch."""

from dataclasses import dataclass
from typing import Any

from megameta.errors import UserError
from megameta.model.config import Position


@dataclass(frozen=True)
class Arm:
    """One model of a comparison.

    Attributes:
        meta_tokens: injected in pre-training, and in the places of the tasks' markers.
        branch: whether the blocks have the meta-attention branch.
        equal_compute: of the arm whose training flops this one gets, by more steps; None: steps as all.
    """

    name: str
    title: str
    position: Position
    meta_tokens: bool = False
    branch: bool = False
    equal_compute: str | None = None

    def model(self) -> dict[str, Any]:
        """Keys of the model section."""
        return {"position": self.position, "meta_attention": self.branch}


_ALL = (
    Arm("gpt2-ape", "GPT-2, learned positions", "ape"),
    Arm("gpt2-rope", "GPT-2, rotary positions", "rope"),
    Arm("gpt2-nope", "GPT-2, no positions", "none"),
    Arm("gpt2-rnope", "GPT-2, rotary in every other layer", "rnope"),
    Arm("gpt2-rope-compute", "GPT-2, rotary positions, compute of Meta + RoPE", "rope", equal_compute="meta-rope"),
    Arm("pause-ape", "markers without the branch, learned positions", "ape", meta_tokens=True),
    Arm("pause-rope", "markers without the branch, rotary positions", "rope", meta_tokens=True),
    Arm("meta-ape", "Meta + APE", "ape", meta_tokens=True, branch=True),
    Arm("meta-rope", "Meta + RoPE", "rope", meta_tokens=True, branch=True),
)
ARMS = {arm.name: arm for arm in _ALL}

#: What is compared: the first less the second, and what the difference is due to.
COMPARISONS = (
    ("meta-rope", "gpt2-ape", "the paper's comparison"),
    ("meta-rope", "pause-rope", "the branch"),
    ("pause-rope", "gpt2-rope", "the markers"),
    ("meta-rope", "gpt2-rope", "both"),
    ("meta-rope", "gpt2-rope-compute", "both, at equal compute"),
    ("meta-ape", "pause-ape", "the branch, learned positions"),
    ("pause-ape", "gpt2-ape", "the markers, learned positions"),
    ("meta-ape", "gpt2-ape", "both, learned positions"),
)


def find_arms(names: list[str]) -> list[Arm]:
    """Raises UserError for a name that there is not."""
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise UserError(f"arms: no {unknown[0]}; there are {', '.join(ARMS)}")
    return [ARMS[name] for name in names]
