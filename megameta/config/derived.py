"""Numbers that follow from a configuration."""

from megameta.config.sections import RunConfig
from megameta.model.flops import forward_flops


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Model replicas: world size over tensor- and pipeline-parallel sizes."""
    return world_size // (config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size)


def step_flops(config: RunConfig) -> float:
    """Model flops of an optimiser step, forward and backward, without recomputation."""
    data = config.data
    return 3 * config.train.global_batch_size * forward_flops(config.model, data.sequence_length, data.num_meta_tokens)
