"""Open exported models where megameta cannot be imported, and generate text from them.

A program of its own: run by path in a fresh interpreter, it needs torch and transformers alone.

    python -I open_export.py --output samples.json --seed 1234 DIR [DIR …]
"""

import argparse
import importlib
import json
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

PROMPTS = ("def __init__(self,", "Return the")


class Blocker(MetaPathFinder):
    """Makes ``import megameta`` fail as it does where it is not installed."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] == "megameta":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
        return None


def block_megameta() -> str:
    """Block the import; returns the error that proves it."""
    sys.meta_path.insert(0, Blocker())
    try:
        importlib.import_module("megameta")
    except ModuleNotFoundError as error:
        return f"{type(error).__name__}: {error}"
    raise SystemExit("error: megameta can still be imported")


def generate(directory: str, seed: int, num_tokens: int) -> dict[str, Any]:
    """Load a model by the Auto classes and continue the prompts, greedily and sampled."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The directory's code is this project's own, written by the conversion a moment ago.
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    samples = []
    for prompt in PROMPTS:
        batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        torch.manual_seed(seed)
        for kind, options in (("greedy", {"do_sample": False}), ("sampled", {"do_sample": True, "temperature": 0.8})):
            ids = model.generate(**batch, max_new_tokens=num_tokens, **options)[0]
            samples.append({"prompt": prompt, "kind": kind, "text": tokenizer.decode(ids, skip_special_tokens=True)})
    return {"directory": directory, "class": f"{type(model).__module__}.{type(model).__name__}", "samples": samples}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Open exported models where megameta cannot be imported.")
    parser.add_argument("directories", nargs="+", metavar="DIR")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON file for what was generated")
    parser.add_argument("--seed", type=int, default=1234, metavar="N")
    parser.add_argument("--tokens", type=int, default=48, metavar="N", help="new tokens of each sample (48)")
    arguments = parser.parse_args()
    proof = block_megameta()
    print(f"import megameta → {proof}", flush=True)
    models = []
    for directory in arguments.directories:
        models.append(generate(directory, arguments.seed, arguments.tokens))
        print(f"{directory}: {models[-1]['class']}")
        for sample in models[-1]["samples"]:
            print(f"  {sample['kind']}: {sample['text']!r}", flush=True)
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "megameta")
    if loaded:
        raise SystemExit(f"error: parts of megameta were loaded: {', '.join(loaded)}")
    output = Path(arguments.output)
    work = output.with_name(f".{output.name}.writing")
    work.write_text(json.dumps({"blocked": proof, "models": models}, indent=1, ensure_ascii=False), encoding="utf-8")
    work.replace(output)


if __name__ == "__main__":
    main()
