"""Every check across fields of a configuration: pure, before anything is started."""

from megameta.config import RunConfig
from megameta.errors import UserError


def problems(config: RunConfig, *, world_size: int, device: str) -> list[str]:
    """What is wrong with a configuration for a world of this size on "cpu" or "cuda": keys and a remedy, each."""
    return [*_model_and_data(config), *_batch(config, world_size), *_steps(config), *_layout(config, device)]


def validate(config: RunConfig, *, world_size: int, device: str) -> None:
    """Raise UserError with every problem at once."""
    found = problems(config, world_size=world_size, device=device)
    if found:
        raise UserError("\n  ".join([f"the configuration has {len(found)} problem(s):", *found]))


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Model replicas: world size over tensor- and pipeline-parallel sizes."""
    return world_size // (config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size)


def _model_and_data(config: RunConfig) -> list[str]:
    model, data = config.model, config.data
    found = []
    if model.position == "ape" and model.max_position_embeddings < data.sequence_length:
        found.append(
            f"model.max_position_embeddings {model.max_position_embeddings} is below data.sequence_length"
            f" {data.sequence_length}: learned positions end there; raise the first"
        )
    if data.reset_positions and not data.document_mask:
        found.append("data.reset_positions needs data.document_mask=true: positions restart where documents end")
    if data.text_per_sample < 1:
        found.append(f"data.meta_token_fraction {data.meta_token_fraction} leaves no text in a sequence")
    for first, end in data.skip:
        if not 0 <= first < end:
            found.append(f"data.skip [{first}, {end}]: a range is [first, end) with first below end")
    return found


def _batch(config: RunConfig, world_size: int) -> list[str]:
    train, parallel = config.train, config.parallel
    model_ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if world_size % model_ranks:
        return [
            f"{world_size} processes cannot be divided into groups of parallel.tensor_parallel_size ×"
            f" parallel.pipeline_parallel_size = {model_ranks}"
        ]
    data_parallel = world_size // model_ranks
    per_pass = train.micro_batch_size * data_parallel
    if train.global_batch_size % per_pass:
        return [
            f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size"
            f" {train.micro_batch_size} × {data_parallel} data-parallel ranks = {per_pass}"
        ]
    return []


def _steps(config: RunConfig) -> list[str]:
    optimizer, steps = config.optimizer, config.train.num_steps
    found = []
    if optimizer.warmup_steps >= steps:
        found.append(
            f"optimizer.warmup_steps {optimizer.warmup_steps} is not below train.num_steps {steps}:"
            " the run would end inside its warm-up"
        )
    if optimizer.schedule != "constant" and optimizer.min_lr > optimizer.lr:
        found.append(f"optimizer.min_lr {optimizer.min_lr} is above optimizer.lr {optimizer.lr}")
    decay = optimizer.decay_steps or max(1, steps // 10)
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + decay > steps:
        found.append(
            f"optimizer.warmup_steps {optimizer.warmup_steps} + optimizer.decay_steps {decay} is above"
            f" train.num_steps {steps}"
        )
    return found


def _layout(config: RunConfig, device: str) -> list[str]:
    parallel = config.parallel
    found = []
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1 or parallel.sequence_parallel:
        found.append(
            "tensor, sequence and pipeline parallelism are not built yet: set parallel.tensor_parallel_size=1,"
            " parallel.pipeline_parallel_size=1, parallel.sequence_parallel=false, and use parallel.zero_stage"
        )
    if config.train.precision == "fp16" and device != "cuda":
        found.append("train.precision fp16 needs a CUDA device; on this machine use fp32 or bf16")
    return found
