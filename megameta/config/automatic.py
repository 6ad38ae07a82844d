"""What "auto" stands for in a configuration: it follows from the machine at the first start, and then stays."""

from megameta.config.sections import RunConfig

#: Major CUDA compute capability from which tensor cores multiply in bf16 (Ampere: A100 and later).
BF16_CAPABILITY = 8


def is_settled(config: RunConfig) -> bool:
    """Whether no value is "auto"."""
    return config.train.precision != "auto"


def settle(
    config: RunConfig, device: str, *, capability: int = BF16_CAPABILITY, saved: RunConfig | None = None
) -> RunConfig:
    """The configuration with a value in place of every "auto".

    Args:
        device: "cpu" or "cuda".
        capability: major CUDA compute capability, the lowest of all ranks.
        saved: of the checkpoint from which the run resumes: what it began with stays, whatever the device is now.
    """
    if is_settled(config):
        return config
    if saved is not None and is_settled(saved):
        precision = saved.train.precision
    else:
        precision = "bf16" if device == "cuda" and capability >= BF16_CAPABILITY else "fp32"
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
