"""From a configuration to the model of a rank and its first weights."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megameta.checkpoint import open_checkpoint
from megameta.config import RunConfig, settle
from megameta.config.automatic import BF16_CAPABILITY, is_settled
from megameta.engine.compile import try_compiler, why_not_compile
from megameta.errors import UserError
from megameta.log import LOG
from megameta.model import GPT, ModelConfig
from megameta.model.init import draw_parameter
from megameta.model.shapes import on_meta_device, parameter_shapes
from megameta.parallel.groups import TensorParallel
from megameta.parallel.pipeline import Stage, stage_bounds
from megameta.parallel.tensor_parallel import Shard, apply_tensor_parallel, prepare_parameters, shard_of
from megameta.parallel.topology import Topology


def settle_on(config: RunConfig, topology: Topology, saved: RunConfig | None = None) -> RunConfig:
    """The configuration with a value in place of every "auto", the same on all ranks. Collective where there is one.

    Args:
        saved: of the checkpoint from which the run resumes.
    """
    if is_settled(config):
        return config
    capability = BF16_CAPABILITY
    if topology.device_type == "cuda":
        lowest = torch.tensor(torch.cuda.get_device_capability(topology.device)[0], device=topology.device)
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        capability = int(lowest)
    settled = settle(config, topology.device_type, capability=capability, saved=saved)
    if config.train.compile != "auto":
        return settled
    began = saved.train.compile if saved is not None else "auto"
    if began == "none":
        return settled
    # A run that resumes has compiled before, and goes on so wherever that works.
    reason = why_not_compile(settled, topology) if began == "auto" else try_compiler(topology.device)
    if topology.world_size > 1:
        reasons: list[str | None] = [None] * topology.world_size
        dist.all_gather_object(reasons, reason)
        reason = next(filter(None, reasons), None)
    if reason is None:
        return settle(config, topology.device_type, capability=capability, compiles=True, saved=saved)
    LOG.info("blocks are not compiled%s: %s", "" if began == "auto" else " any more", reason)
    return settled.model_copy(update={"train": settled.train.model_copy(update={"compile": "none"})})


def build_model(config: RunConfig, weights: Mapping[str, Tensor] | None = None) -> GPT:
    """The whole model on the CPU, with the given weights (logical rows by canonical name) or drawn from run.seed.

    Raises:
        UserError: the weights are those of another model; names and shapes that differ are listed.
    """
    return cast(GPT, build_part(config, Topology(), None, weights))


def build_part(
    config: RunConfig, topology: Topology, tp: TensorParallel | None, weights: Mapping[str, Tensor] | None = None
) -> GPT | Stage:
    """What this rank runs of the model, on the CPU: all of it or a pipeline stage, with whole or sharded layers. Each
    parameter is drawn in full from a seed of its name, or read, and then sliced; a lazy mapping is read in slices."""
    size = tp.size if tp is not None else 1
    with on_meta_device(), _missing_kernels_named():
        model: GPT | Stage
        if topology.pipeline_parallel_size > 1:
            data = config.data
            bounds = stage_bounds(
                config.model,
                topology.pipeline_parallel_size,
                balance=config.parallel.pipeline_balance,
                length=data.sequence_length,
                num_meta=data.num_meta_tokens,
            )
            model = Stage(config.model, bounds[topology.pipeline_parallel_rank], 128 * size)
            model.tensor_parallel = tp
        else:
            model = GPT(config.model, 128 * size)
    if tp is not None:
        apply_tensor_parallel(model, config.model, tp)
    model.to_empty(device="cpu")
    if weights is None:
        weights = DrawnWeights(config.model, config.run.seed)
    else:
        check_weights(config.model, weights)
    fill_parameters(model, config.model, weights, tp)
    if tp is not None:
        prepare_parameters(model, tp)
    model.activation_checkpointing = config.train.activation_checkpointing
    return model


@contextlib.contextmanager
def _missing_kernels_named() -> Iterator[None]:
    try:
        yield
    except ImportError as error:  # flash-attn's; its message has the remedy
        raise UserError(str(error)) from error


class DrawnWeights(Mapping[str, Tensor]):
    """Initial weights by canonical name, each drawn when it is asked for."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config, self._seed, self._shapes = config, seed, parameter_shapes(config)

    def __getitem__(self, name: str) -> Tensor:
        return draw_parameter(name, self._shapes[name], self._config, self._seed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def check_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Raise UserError where names or shapes are not those of the model."""
    expected = parameter_shapes(config)
    wrong = [f"{name}: missing" for name in expected.keys() - weights.keys()]
    wrong += [f"{name}: not in this model" for name in weights.keys() - expected.keys()]
    for name in expected.keys() & weights.keys():
        shape = shape_of(weights, name)
        if shape != expected[name]:
            wrong.append(f"{name}: shape {list(shape)}, the model has {list(expected[name])}")
    if wrong:
        raise UserError("\n  ".join(["the weights to start from do not fit the model:", *sorted(wrong)[:20]]))


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Shape of a tensor, from the file's header where the mapping is lazy."""
    lazy = getattr(tensors, "shape", None)
    return tuple(lazy(name) if lazy is not None else tensors[name].shape)


def read_shard(tensors: Mapping[str, Tensor], name: str, shard: Shard | None) -> Tensor:
    """A tensor, or its shard; of a lazy mapping only that is read."""
    if shard is None:
        return tensors[name]
    if (read := getattr(tensors, "read", None)) is not None:
        return read(name, shard.dim, shard.start, shard.stop)
    return tensors[name].narrow(shard.dim, shard.start, shard.stop - shard.start)


def fill_parameters(
    model: nn.Module, config: ModelConfig, weights: Mapping[str, Tensor], tp: TensorParallel | None
) -> None:
    """Copy weights, or this rank's shards of them, into parameters; rows that pad the vocabulary become zero."""
    shapes = parameter_shapes(config)
    rank, size = (tp.rank, tp.size) if tp is not None else (0, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            piece = read_shard(weights, name, shard_of(name, shapes[name], config, rank, size))
            parameter[: piece.shape[0]] = piece
            parameter[piece.shape[0] :] = 0


def initial_weights(config: RunConfig, topology: Topology) -> Mapping[str, Tensor] | None:
    """Weights of init.from_checkpoint or init.from_hf, None where the run starts from drawn ones. Collective."""
    if config.init.from_hf is not None:
        from megameta.hf.start import start_weights

        return start_weights(config.init.from_hf, config.model, config.run.seed)
    if config.init.from_checkpoint is None:
        return None
    return open_checkpoint(config.init.from_checkpoint, topology).weights()
