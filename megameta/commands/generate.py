"""``megameta generate``: text from a HuggingFace export, by the package's own classes (no code of the export runs)."""

import json
from pathlib import Path
from typing import Any

import torch

from megameta.data.tokenizer import load_tokenizer
from megameta.errors import UserError
from megameta.hf.shards import open_shards
from megameta.parallel.launch import pick_device


def generate(
    source: str, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int, num_samples: int
) -> int:
    """Print the prompt and its continuations; temperature 0 is greedy. ``<|meta|>`` in the prompt is the meta-token."""
    directory = Path(source)
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{source}: not a HuggingFace export (no config.json); make one with"
            f" python tools/convert_checkpoint.py to-hf {source} --output DIR"
        )
    device = pick_device("auto")
    model = _load(directory).to(device).eval()
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode_prompt(prompt) or [tokenizer.eod_id]
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    tokens = torch.tensor([ids], device=device)
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_samples if temperature > 0 else 1,
        **sampling,
    )
    for number, row in enumerate(output.tolist(), 1):
        if len(output) > 1:
            print(f"--- {number}")
        print(tokenizer.decode(row))
    return 0


def _load(directory: Path) -> Any:
    open_shards(directory)  # pickles are refused before anything opens them
    kind = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind == "megameta":
        from megameta.hf.modeling import MegametaForCausalLM

        return MegametaForCausalLM.from_pretrained(directory, use_safetensors=True)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True, trust_remote_code=False)
