"""What "auto" stands for in a configuration: it follows from the machine at the first start, and then stays."""

from typing import Any

from megameta.config.sections import RunConfig

#: Major CUDA compute capability from which tensor cores multiply in bf16 (Ampere: A100 and later).
BF16_CAPABILITY = 8
#: Logits of a micro-batch from which it pays to take the loss a few rows at a time; fewer stay in a CPU's caches.
MANY_LOGITS = 2_000_000
#: Keys of train that may be "auto", in the order in which they are settled: later ones follow from earlier ones.
KEYS = ("precision", "compile", "fused_loss")


def is_settled(config: RunConfig) -> bool:
    """Whether no value is "auto"."""
    return not automatic_keys(config)


def automatic_keys(config: RunConfig) -> list[str]:
    """Those of ``KEYS`` that are "auto"."""
    return [key for key in KEYS if getattr(config.train, key) == "auto"]


def settle(
    config: RunConfig,
    device: str,
    *,
    capability: int = BF16_CAPABILITY,
    compiles: bool = False,
    saved: RunConfig | None = None,
) -> RunConfig:
    """The configuration with a value in place of every "auto".

    Args:
        device: "cpu" or "cuda".
        capability: major CUDA compute capability, the lowest of all ranks.
        compiles: whether compiled blocks would win back the time that compiling takes.
        saved: of the checkpoint from which the run resumes: what it began with stays, whatever the device is now.
    """
    keys = automatic_keys(config)
    if not keys:
        return config
    values: dict[str, Any] = {key: getattr(config.train, key) for key in KEYS}
    for key in keys:
        kept = "auto" if saved is None else getattr(saved.train, key)
        if kept != "auto":
            values[key] = kept
        elif key == "precision":
            values[key] = "bf16" if device == "cuda" and capability >= BF16_CAPABILITY else "fp32"
        elif key == "compile":
            values[key] = "blocks" if compiles else "none"
        else:
            # Without a compiler's fused passes over a chunk's logits, a GPU is faster with all logits at once.
            rows = config.train.micro_batch_size * config.data.sequence_length
            many = rows * config.model.vocab_size >= MANY_LOGITS
            values[key] = many and (device == "cpu" or values["compile"] == "blocks")
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def device_of(config: RunConfig) -> str:
    """What the nodes of a cluster compute on, as far as the configuration says: "cuda" where it leaves that open."""
    return "cpu" if config.run.device == "cpu" else "cuda"


def assume(config: RunConfig, device: str) -> RunConfig:
    """As the run would be on a device that is not this process's: for estimates, never stored."""
    config = settle(config, device)
    if config.run.device != "auto":
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"device": device})})
