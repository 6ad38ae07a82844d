"""``megameta extend``: from a checkpoint to the configuration of continued training at a longer window."""

import math
import re
import shlex
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import megameta
from megameta.checkpoint import open_checkpoint
from megameta.config import RunConfig, apply_overrides, build_config, dump_yaml
from megameta.config.validate import problems
from megameta.errors import UserError
from megameta.files import write_text_atomically
from megameta.train.schedule import learning_rate

METHODS = ("yarn", "ntk", "linear", "none")
#: Share of the run's steps by which it goes on: pre-training, fine-tuning (which meets its tasks at new lengths). Ours.
SHARE = {False: 100, True: 10}
#: At least so many steps, where the run had them.
MIN_STEPS = 100
MAX_WARMUP = 100


def extend(
    source: str,
    overrides: list[str],
    *,
    factor: float,
    method: str = "yarn",
    total: bool = False,
    output: str | None = None,
    steps: int | None = None,
    lr: float | None = None,
) -> int:
    """Write the configuration of a run that goes on from a checkpoint at ``factor`` times its window; say what it is.

    Args:
        source: run directory or checkpoint.
        overrides: values that replace those of the new configuration.
        factor: of the window; with ``total`` of the window before any extension.
        method: one of METHODS; none trains on the longer sequences with positions as they are.
        output: file, which must not be there. Default: named after the run, the method and the factor, here.
        steps, lr: of the new run, in place of the defaults.

    Raises:
        UserError: a model whose positions cannot be extended, an extended one without ``total``, a file or a run that
            is there already, or a configuration with contradictions.
    """
    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    if not checkpoint.has_trainer:  # weights alone, converted from elsewhere, come without a run's sequence length
        length = f"data.sequence_length={config.model.max_position_embeddings}"
        config = build_config(apply_overrides(config.to_dict(), [length]), source)
    first = config.model.original_max_position_embeddings
    window = first if _is_extended(config) else config.data.sequence_length
    _check_source(config, source, window, factor, total)
    run_dir = _run_directory(checkpoint.path, config)
    suffix = f"-{'long' if method == 'none' else method}{factor:g}"
    made = extended_config(
        config,
        window=window,
        factor=factor,
        method=method,
        weights=str(checkpoint.path),
        run_dir=run_dir + suffix,
        steps=steps,
        lr=lr,
        overrides=overrides,
    )
    found = problems(made, world_size=_model_ranks(made), device="cuda")  # where it will run is not known here
    if found:
        raise UserError("\n  ".join([f"the extended configuration has {len(found)} problem(s):", *found]))
    file = Path(output if output is not None else f"{Path(run_dir).name}{suffix}.yaml")
    _refuse_to_overwrite(file, Path(made.run.dir))
    write_text_atomically(file, to_text(made, config, _header(source, checkpoint.path, made, window, file)))
    for line in _report(source, file, config, made, window):
        print(line)
    return 0


def extended_config(
    config: RunConfig,
    *,
    window: int,
    factor: float,
    method: str,
    weights: str,
    run_dir: str,
    steps: int | None = None,
    lr: float | None = None,
    overrides: list[str] | None = None,
) -> RunConfig:
    """A run's configuration for going on at ``factor`` × ``window`` slots.

    Tokens a step stay the same where the batch divides; the learning rate begins where the run's schedule ended.

    Args:
        window: before any extension.
        weights: becomes init.from_checkpoint.

    Raises:
        UserError: the new window is no whole number of slots.
    """
    wanted = Fraction(str(factor)) * window
    if wanted.denominator != 1:
        raise UserError(f"--factor {factor:g}: {window} slots times that is {float(wanted):g}, not a whole number")
    growth = wanted / config.data.sequence_length
    values = config.to_dict()
    values["run"]["dir"] = run_dir
    values["init"] = {"from_checkpoint": weights}
    values["data"] |= {"sequence_length": int(wanted), "skip": []}
    values["model"] |= {
        "position_scaling": method,
        "position_scaling_factor": 1.0 if method == "none" else float(factor),
        "original_max_position_embeddings": window,
        "max_position_embeddings": int(wanted),
    }
    if method != "yarn":
        values["model"] |= {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_attention_factor": 1.0}
    values["train"] |= _batch(config, growth)
    tuning = values["finetune"]
    if config.finetune.directory is not None:
        tuning["phases"] = [math.ceil(bound * growth) for bound in tuning["phases"]]
        tuning["eval_bins"] = sorted(
            {*tuning["eval_bins"], *(math.ceil(bound * growth) for bound in tuning["eval_bins"])}
        )
    steps = _steps(config) if steps is None else steps
    values["train"]["num_steps"] = steps
    values["optimizer"] |= _schedule(config, steps, lr)
    for section in ("checkpoint", "eval"):
        values[section]["interval"] = min(values[section]["interval"], max(1, steps // 4))
    return build_config(apply_overrides(values, overrides or []), "the extended configuration")


def _batch(config: RunConfig, growth: Fraction) -> dict[str, int]:
    """As many tokens a step as before, where the batch divides; micro-batches of no more tokens than before, but of at
    least one sequence."""
    batch = Fraction(config.train.global_batch_size) / growth
    size = int(batch) if batch.denominator == 1 else config.train.global_batch_size
    most = max(1, math.floor(config.train.micro_batch_size / growth))
    return {
        "global_batch_size": size,
        "micro_batch_size": next(micro for micro in range(most, 0, -1) if size % micro == 0),
    }


def _steps(config: RunConfig) -> int:
    tuning = config.finetune.directory is not None
    steps = min(config.train.num_steps, max(MIN_STEPS, config.train.num_steps // SHARE[tuning]))
    phases = max(1, len(config.finetune.phases)) if tuning else 1
    return -(-steps // phases) * phases


def _schedule(config: RunConfig, steps: int, lr: float | None) -> dict[str, Any]:
    """A short warm-up, since the optimiser starts anew, to the rate at which the run ended; cosine to a tenth of it."""
    if lr is None:
        before = config.train.num_steps
        lr = learning_rate(before, before, config.optimizer) or config.optimizer.lr / 10
    rates = {"lr": lr, "min_lr": float(f"{lr / 10:.6g}")}
    return {**rates, "warmup_steps": min(MAX_WARMUP, steps // 10), "schedule": "cosine", "decay_steps": 0}


def _is_extended(config: RunConfig) -> bool:
    """Whether its window is a longer one than it was first trained at (with --method none nothing is scaled)."""
    model = config.model
    return model.position_scaling != "none" or model.original_max_position_embeddings < model.max_position_embeddings


def _check_source(config: RunConfig, source: str, window: int, factor: float, total: bool) -> None:
    model = config.model
    if model.position == "ape":
        raise UserError(
            f"{source}: model.position is ape, and learned positions cannot be extended: there are"
            f" {model.max_position_embeddings}, and lengths beyond are not applicable to the model. Train one with"
            " model.position=rope, or this one anew with a longer data.sequence_length"
        )
    if not 1.0 < factor < math.inf:
        raise UserError(f"--factor {factor:g}: how many times the window of {window} slots, a number above 1")
    if model.position == "none":
        longer = math.ceil(window * factor)
        raise UserError(
            f"{source}: model.position is none, so that there are no positions to scale. Evaluate it on longer"
            f" sequences as it is: megameta evaluate {shlex.quote(source)} data.sequence_length={longer}"
        )
    if _is_extended(config) and not total:
        raise UserError(
            f"{source}: extended already, from {window} to {config.data.sequence_length} slots by"
            f" {model.position_scaling}. Scaling starts from the first window: to extend further give --total, and"
            f" --factor as a multiple of {window}"
        )
    if _is_extended(config) and window * factor <= config.data.sequence_length:
        raise UserError(
            f"--factor {factor:g} --total: {window * factor:g} slots, and {source} is at {config.data.sequence_length}"
            f" already; give more than {config.data.sequence_length / window:g}"
        )


def _run_directory(checkpoint: Path, config: RunConfig) -> str:
    """Of the run that a checkpoint is in; of one that has been taken out of its run, what its configuration says."""
    return str(checkpoint.parent.parent) if checkpoint.parent.name == "checkpoints" else config.run.dir


def _refuse_to_overwrite(file: Path, run: Path) -> None:
    if file.exists():
        raise UserError(f"{file} is there already: name another with --output, or remove it")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent} is no directory: make it, or name another file with --output")
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run} is there already, and the new run needs a directory of its own: give run.dir=OTHER")


def _model_ranks(config: RunConfig) -> int:
    return config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size


# --- what is written and said ---------------------------------------------------------------------------------------


def to_text(config: RunConfig, before: RunConfig, header: list[str]) -> str:
    """YAML of the whole model, and of what else differs from the defaults or from the run before; with what it was.

    The window is left out where it follows from data.sequence_length, as ``load_run_config`` fills it in."""
    changes = _changes(before, config)
    values, defaults = config.to_dict(), RunConfig().to_dict()
    shown: dict[str, Any] = {}
    for section, entries in values.items():
        # Defaults of the model follow from one another: what one model has by default another would not.
        whole = section in ("model", "deepspeed")
        kept = {k: v for k, v in entries.items() if whole or v != defaults[section][k] or f"{section}.{k}" in changes}
        if kept:
            shown[section] = kept
    if config.model.max_position_embeddings == config.data.sequence_length:
        del shown["model"]["max_position_embeddings"]
    lines, section = [f"# {line}" for line in header], ""
    for line in dump_yaml(shown).splitlines():
        if match := re.match(r"(\w+):", line):
            section = match[1]
        match = re.match(r"  (\w+):", line)
        note = changes.get(f"{section}.{match[1]}") if match else None
        lines.append(line if note is None else f"{line}  # was {note[0]}")
    return "\n".join(lines) + "\n"


def _changes(before: RunConfig, after: RunConfig) -> dict[str, tuple[str, str]]:
    """section.key → (before, after), where they differ, in the order of the sections."""

    def by_key(config: RunConfig) -> dict[str, Any]:
        sections: Mapping[str, Any] = {key: value for key, value in config.to_dict().items() if key != "deepspeed"}
        return {f"{section}.{key}": value for section, part in sections.items() for key, value in part.items()}

    old, new = by_key(before), by_key(after)
    return {key: (_shown(old[key]), _shown(new[key])) for key in new if old[key] != new[key]}


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "not set" if value is None else str(value)


def _header(source: str, checkpoint: Path, made: RunConfig, window: int, file: Path) -> list[str]:
    kind = "Fine-tuning" if made.finetune.directory is not None else "Continued pre-training"
    scaling = made.model.position_scaling
    how = "positions as they were" if scaling == "none" else f"positions scaled by {scaling}"
    return [
        f"{kind} from {checkpoint} at {made.data.sequence_length} slots; its window was {window}, {how}.",
        f"Made by megameta extend ({megameta.__version__}) from {source}. What is not here is as the defaults have it.",
        f"    {_command(made)} {shlex.quote(str(file))}",
    ]


def _command(made: RunConfig) -> str:
    return "megameta finetune" if made.finetune.directory is not None else "megameta train"


def _report(source: str, file: Path, before: RunConfig, made: RunConfig, window: int) -> list[str]:
    """Lines for the person at the terminal: what changed, what to look at, the next commands."""
    train = made.train
    lines = [
        f"{file}: {source} at {made.data.sequence_length} slots, {made.data.sequence_length / window:g} × {window}"
    ]
    changes = _changes(before, made)
    width = max(map(len, changes))
    lines += [f"  {key:<{width}}  {old} → {new}" for key, (old, new) in changes.items()]
    slots = train.global_batch_size * made.data.sequence_length
    ranks = train.global_batch_size // train.micro_batch_size
    lines.append(
        f"A step has {slots:,} slots (before: {before.train.global_batch_size * before.data.sequence_length:,}); the"
        f" batch can be shared by up to {ranks} model replica(s)."
    )
    if made.finetune.directory is not None:
        longest = ", ".join(map(str, made.finetune.phases))
        lines.append(
            f"{made.finetune.directory} must hold examples of up to {longest} tokens (megameta tasks generate --bins)."
        )
    elif not made.data.sources:
        lines.append("data.train is empty: the checkpoint does not say what it was trained on; give data.train=PREFIX.")
    return [
        *lines,
        "To measure it without further training:",
        f"  {_evaluation(source, made)}",
        f"Next: {_command(made)} {shlex.quote(str(file))}",
    ]


def _evaluation(source: str, made: RunConfig) -> str:
    """The command that evaluates the weights as they are at the new window."""
    if made.finetune.directory is not None:
        words = ["megameta", "tasks", "evaluate", source, f"finetune.eval_bins={made.finetune.phases}"]
    else:
        words = ["megameta", "evaluate", source, f"data.sequence_length={made.data.sequence_length}"]
    names = ("position_scaling", "position_scaling_factor", "original_max_position_embeddings")
    if made.model.position_scaling != "none":
        words += [f"model.{name}={_shown(getattr(made.model, name))}" for name in names]
    return shlex.join(words)
