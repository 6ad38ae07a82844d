"""Names of weights in the training model and in exports (the table stands at the top of ``megameta.hf.modeling``)."""

from collections.abc import Mapping

from torch import Tensor

from megameta.checkpoint.tensor_file import entry_of
from megameta.errors import UserError
from megameta.model import ModelConfig
from megameta.model.shapes import parameter_shapes

_OUTPUT, _HF_OUTPUT = "head.output.weight", "lm_head.weight"
_NORM, _HF_NORM = "head.norm.", "model.norm."


def to_hf_name(name: str) -> str:
    """Canonical name in the plain ``GPT`` to the name in an export."""
    if name == _OUTPUT:
        return _HF_OUTPUT
    if name.startswith(_NORM):
        return _HF_NORM + name.removeprefix(_NORM)
    return f"model.{name}"


def from_hf_name(name: str) -> str:
    """The inverse of ``to_hf_name``."""
    if name == _HF_OUTPUT:
        return _OUTPUT
    if name.startswith(_HF_NORM):
        return _NORM + name.removeprefix(_HF_NORM)
    return name.removeprefix("model.")


def check_tensors(config: ModelConfig, tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that are not exactly the model's.

    Raises:
        UserError: names the first few that are missing, unknown, or of another shape.
    """
    expected = parameter_shapes(config)
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is no parameter of this model" for name in tensors if name not in expected]
    wrong += [
        f"{name} has shape {entry_of(tensors, name).shape}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and entry_of(tensors, name).shape != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source} does not fit its model configuration: {'; '.join(wrong[:3])}{more}")
