"""An export's model by the package's own classes: no code of the export runs, and weights are safetensors alone."""

import json
from pathlib import Path
from typing import Any

from megameta.errors import UserError
from megameta.hf.shards import open_shards


def load_causal_lm(directory: str | Path) -> Any:
    """The model of an export, in eval mode on the CPU: ``MegametaForCausalLM``, or transformers' own class of a stock
    architecture.

    Raises:
        UserError: it is no export.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{directory}: not a HuggingFace export (no config.json); make one with"
            f" python tools/convert_checkpoint.py to-hf {directory} --output DIR"
        )
    open_shards(path.parent)  # pickles are refused before anything opens them
    if json.loads(path.read_text(encoding="utf-8")).get("model_type") == "megameta":
        from megameta.hf.modeling import MegametaForCausalLM

        return MegametaForCausalLM.from_pretrained(directory, use_safetensors=True).eval()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False, use_safetensors=True).eval()
