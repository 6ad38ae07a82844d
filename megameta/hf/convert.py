"""Checkpoints to HuggingFace and back (the work of ``tools/convert_checkpoint.py``)."""

import json
import shlex
from pathlib import Path

import torch

from megameta.errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def checkpoint_to_hf(
    source: str | Path,
    output_dir: str | Path,
    *,
    tokenizer: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    audit: str | None = None,
) -> Path:
    """Export a checkpoint, or the newest one of a run, with the run's tokenizer and a card filled from the run.

    Args:
        tokenizer: path, in place of the one in the run's configuration.
        dtype: float32, bfloat16 or float16; default: as the checkpoint holds them.
        max_shard_size: of a file of weights, like "5GB".
        audit: of the training data, for the card: directory of tools/audit_corpus.py.

    Returns:
        The directory.

    Raises:
        UserError: see ``export_to_hf``; or no such checkpoint or tokenizer.
    """
    from megameta.checkpoint import open_checkpoint
    from megameta.hf.export import export_to_hf
    from megameta.hf.run_card import card_from_run
    from megameta.tokenizers import load_tokenizer

    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    checkpoint = open_checkpoint(source)
    run_config = checkpoint.config
    path = tokenizer or run_config.data.tokenizer
    if tokenizer is None and path is not None and not Path(path).exists():
        raise UserError(f"the run's tokenizer {path} is not there: say where it is with --tokenizer PATH")
    card, files = card_from_run(checkpoint, Path(source), Path(audit) if audit is not None else None)
    return export_to_hf(
        run_config.model,
        checkpoint.weights(),
        output_dir,
        tokenizer=load_tokenizer(path) if path is not None else None,
        card=card,
        files=files,
        dtype=_DTYPES[dtype] if dtype is not None else None,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
    )


def hf_to_checkpoint(directory: str | Path, output_dir: str | Path) -> Path:
    """Write an export's weights as a checkpoint, which ``init.from_checkpoint`` takes; one tensor in memory at a time.

    A GPT-2 or GPT-NeoX from elsewhere becomes what ``init.from_hf`` makes of it with the default run.seed.

    Raises:
        UserError: see ``read_hf_model``; or the output exists.
    """
    from megameta.checkpoint import save_weights
    from megameta.config import RunConfig
    from megameta.hf.importer import read_hf_model
    from megameta.hf.start import start_model, start_weights
    from megameta.model import ModelConfig
    from megameta.tokenizers import load_tokenizer

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
