"""Checkpoints to HuggingFace and back (the work of ``tools/convert_checkpoint.py``)."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

import torch

from megameta.errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: What of the run's configuration stands in the model card.
_CARD_KEYS = {
    "model": ("meta_layers",),
    "data": ("sequence_length", "meta_token_fraction", "meta_token_placement", "document_mask", "reset_positions"),
    "train": ("num_steps", "global_batch_size", "precision"),
    "optimizer": ("lr", "min_lr", "warmup_steps", "schedule", "weight_decay"),
}


def checkpoint_to_hf(
    source: str | Path,
    output_dir: str | Path,
    *,
    tokenizer: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Export a checkpoint, or the newest one of a run, with the run's tokenizer and a card filled from the run.

    Args:
        tokenizer: path, in place of the one in the run's configuration.
        dtype: float32, bfloat16 or float16; default: as the checkpoint holds them.

    Returns:
        The directory.

    Raises:
        UserError: see ``export_to_hf``; or no such checkpoint or tokenizer.
    """
    from megameta.checkpoint import load_weights
    from megameta.data.tokenizer import load_tokenizer
    from megameta.hf.export import export_to_hf

    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    run_config, tensors = load_weights(source)
    path = tokenizer or run_config.data.tokenizer
    if tokenizer is None and path is not None and not Path(path).exists():
        raise UserError(f"the run's tokenizer {path} is not there: say where it is with --tokenizer PATH")
    return export_to_hf(
        run_config.model,
        tensors,
        output_dir,
        tokenizer=load_tokenizer(path) if path is not None else None,
        card=card_from_run(run_config, Path(source)),
        dtype=_DTYPES[dtype] if dtype is not None else None,
        overwrite=overwrite,
    )


def hf_to_checkpoint(directory: str | Path, output_dir: str | Path) -> Path:
    """Write an export's weights as a checkpoint, which ``init.from_checkpoint`` takes; one tensor in memory at a time.

    A GPT-2 or GPT-NeoX from elsewhere becomes what ``init.from_hf`` makes of it with the default run.seed.

    Raises:
        UserError: see ``read_hf_model``; or the output exists.
    """
    from megameta.checkpoint import save_weights
    from megameta.config import RunConfig
    from megameta.data.tokenizer import load_tokenizer
    from megameta.hf.importer import read_hf_model
    from megameta.hf.start import start_model, start_weights
    from megameta.model import ModelConfig

    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already: choose another output")
    source = read_hf_model(directory)
    config, tensors = source.config, source.tensors
    if source.is_foreign:
        tokenizer = load_tokenizer(source.tokenizer_dir) if source.tokenizer_dir is not None else None
        config = ModelConfig(**start_model(source, tokenizer, directory))
        tensors = start_weights(directory, config, RunConfig().run.seed)
    save_weights(output, config, tensors, source.tokenizer_dir)
    return output


def next_step(output: Path) -> str:
    """A shell command that opens the export and generates from it."""
    values = json.loads((output / "config.json").read_text(encoding="utf-8"))
    remote = ", trust_remote_code=True" if "auto_map" in values else ""
    path = json.dumps(str(output), ensure_ascii=False)
    model = f"AutoModelForCausalLM.from_pretrained(p{remote})"
    if (output / "tokenizer_config.json").is_file():
        code = (
            f"from transformers import AutoModelForCausalLM, AutoTokenizer; p = {path}; m = {model};"
            f' t = AutoTokenizer.from_pretrained(p{remote}); b = t("The", return_tensors="pt");'
            " print(t.decode(m.generate(**b, max_new_tokens=20)[0]))"
        )
    else:
        code = f"from transformers import AutoModelForCausalLM; p = {path}; print({model})"
    return f"python -c {shlex.quote(code)}"


def card_from_run(run_config: Any, source: Path) -> dict[str, Any]:
    """What the run's configuration and metrics.jsonl say, for the model card; no paths but the data's last parts."""
    training = {
        f"{section}.{key}": value
        for section, keys in _CARD_KEYS.items()
        for key in keys
        if (value := getattr(getattr(run_config, section, None), key, None)) is not None
    }
    prefixes = [Path(prefix).name for part in run_config.data.sources.values() for prefix in part]
    card: dict[str, Any] = {"training": training} if training else {}
    if prefixes:
        card["training_data"] = prefixes
    if numbers := _last_numbers(source):
        card["results"] = numbers
    return card


def _last_numbers(source: Path) -> dict[str, float]:
    """Last step, loss and held-out results of the run's metrics.jsonl; empty where there is none."""
    candidates = [folder / "metrics.jsonl" for folder in (source, source.parent, source.parent.parent)]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    numbers: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path is not None else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed while writing
        values = {name: record[name] for name in ("step", "tokens", "loss") if name in record}
        for held_out, result in record.get("eval", {}).items():
            values |= {f"{held_out}: {measure}": value for measure, value in result.items()}
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                numbers[name] = value
    return numbers
