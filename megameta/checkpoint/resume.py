"""What a run that goes on may change in its configuration."""

import fnmatch
from typing import Any

from megameta.config import RunConfig
from megameta.errors import UserError

#: Keys that may differ between a checkpoint and the run that resumes from it: length, tail of the schedule, intervals,
#: what is evaluated and shown, layout, batches to skip. Everything else would make it another run.
MAY_CHANGE = (
    "run.dir",
    "run.device",
    "run.deterministic",
    "train.num_steps",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "train.fused_loss",
    "train.check_replicas_every",
    "train.peak_tflops",
    "optimizer.min_lr",
    "optimizer.schedule",
    "optimizer.decay_steps",
    "data.skip",
    "data.cache_dir",
    "data.valid",
    "data.valid.*",
    "model.attention_backend",
    "parallel.*",
    "checkpoint.*",
    "cluster.*",
    "eval.*",
    "analysis.*",
    "finetune.directory",
    "finetune.eval_*",
    "log.*",
    "init.*",
    "deepspeed*",
)


def check_resumable(saved: RunConfig, wanted: RunConfig, where: str) -> None:
    """Raise UserError with a diff where the configuration changes what a resumed run may not change."""
    old, new = flatten(saved.to_dict()), flatten(wanted.to_dict())
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    refused = [key for key in changed if not any(fnmatch.fnmatch(key, pattern) for pattern in MAY_CHANGE)]
    if refused:
        diff = [f"{key}: {old.get(key)!r} in the checkpoint, {new.get(key)!r} now" for key in refused]
        raise UserError(
            "\n  ".join(
                [
                    f"{where}: the run cannot go on with a configuration that differs in",
                    *diff,
                    "take these back, or start a new run: another run.dir, with init.from_checkpoint for its weights",
                ]
            )
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keyed section.key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
