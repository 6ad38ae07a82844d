"""What DeepSpeed is told, derived from the run's configuration: ZeRO's stage, who clips, and its own dictionary, into
which the pass-through section is merged last."""

from typing import Any

from megameta.config.sections import RunConfig
from megameta.errors import UserError

#: Sections of DeepSpeed's that would compete with the run's own, and the keys that stand for them here.
ELSEWHERE = {
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "gradient_clipping": "optimizer.clip_grad_norm",
}

#: Keys of deepspeed.zero_optimization that take gradients off the device.
OFFLOADS = ("offload_optimizer", "cpu_offload", "zenflow")
#: Keys of deepspeed.zero_optimization that mean nothing at stage 0.
NEED_ZERO = frozenset({"stage", "offload_optimizer", "offload_param"})

#: DeepSpeed's default reduce_bucket_size, in elements.
REDUCE_BUCKET = 5e8


def zero_stage(config: RunConfig, data_parallel_size: int) -> int:
    """The stage of ZeRO that a run uses, where the configuration leaves it open.

    A lone data-parallel rank would copy every gradient into a bucket and every weight out of a partition, and keep both
    (docs/performance.md has the price). Pipeline stages and fp16 need stage 1 (``validate``), and so do DeepSpeed's
    offloading and its choice of a type to accumulate gradients in.
    """
    if config.parallel.zero_stage is not None:
        return config.parallel.zero_stage
    shared = data_parallel_size > 1 or config.parallel.pipeline_parallel_size > 1
    asked = "data_types" in config.deepspeed or not NEED_ZERO.isdisjoint(config.zero_options)
    return int(shared or config.train.precision == "fp16" or asked)


def zero_option(config: RunConfig, name: str, default: float) -> float:
    """A number of DeepSpeed's zero_optimization section."""
    return float(config.zero_options.get(name, default))


def overlaps_reduction(
    config: RunConfig, device_type: str, *, zero_stage: int, pipeline: int, data: int, num_parameters: int
) -> bool:
    """Whether ZeRO 1 or 2 sums gradients over its ranks beside the backward pass (DeepSpeed's overlap_comm).

    Where the configuration leaves it open: on GPUs, if a rank's gradients fill more than one bucket. With one the sum
    begins when all gradients are there anyway, and the second bucket, which overlapping takes, is memory for nothing.
    ZeRO 3 always does; pipeline stages never can.

    Args:
        num_parameters: of a rank.
    """
    if zero_stage not in (1, 2) or pipeline > 1:
        return False
    chosen = config.zero_options.get("overlap_comm")
    if chosen is not None:
        return bool(chosen)
    fills_more = num_parameters > zero_option(config, "reduce_bucket_size", REDUCE_BUCKET)
    return device_type == "cuda" and data > 1 and fills_more


def clips_itself(config: RunConfig, zero_stage: int) -> bool:
    """Whether norm and clipping are ours (``megameta.engine.clipping``)."""
    elsewhere = any(config.zero_options.get(key) is not None for key in OFFLOADS)
    if config.parallel.pipeline_parallel_size > 1 or config.train.precision == "fp16":
        return False
    return zero_stage < 3 and not elsewhere and "data_types" not in config.deepspeed


def deepspeed_config(
    config: RunConfig, accumulation_steps: int, zero_stage: int, *, overlap: bool = False
) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``. ``overlap``: as ``overlaps_reduction`` says.

    bf16 runs as autocast over float32 parameters, which is right at every ZeRO stage; gradients are reduced in float32,
    so no module is listed for low-precision communication. fp16 does the same with a gradient scaler at ZeRO 0; at 1 to
    3 DeepSpeed 0.19.8 would clip the gradients while they are still scaled, so its own fp16 section with float32 master
    weights is used there.

    Raises:
        UserError: ``deepspeed:`` sets a key to something else than what is derived, or a section in ``ELSEWHERE``.
    """
    derived: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "zero_optimization": {"stage": zero_stage},
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the device in every micro-batch
    }
    if clips_itself(config, zero_stage):
        derived["gradient_clipping"] = 0.0
        if zero_stage > 0:
            derived["zero_optimization"]["compute_grad_norm"] = False
    if overlap:
        derived["zero_optimization"]["overlap_comm"] = True
    if config.parallel.pipeline_parallel_size > 1:
        # Stages send whole tensors: under sequence parallelism they are shards already, each rank's another.
        derived["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
        derived["steps_per_print"] = None  # it would print losses of its own
    if config.train.precision == "fp16" and zero_stage > 0:
        derived["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    elif config.train.precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[config.train.precision]
        derived["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    for key in config.deepspeed.keys() & ELSEWHERE.keys():
        raise UserError(f"deepspeed.{key}: set {ELSEWHERE[key]} instead, from which it follows")
    return _merge(derived, config.deepspeed, "deepspeed")


def _merge(derived: dict[str, Any], extra: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in extra.items():
        here = f"{path}.{key}"
        if key not in derived:
            merged[key] = value
        elif isinstance(derived[key], dict) and isinstance(value, dict):
            merged[key] = _merge(derived[key], value, here)
        elif derived[key] != value:
            raise UserError(
                f"{here}: {value!r} contradicts {derived[key]!r}, derived from the other sections; change them instead"
            )
    return merged
