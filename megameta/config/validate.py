"""Every check across fields of a configuration: pure, before anything is started."""

import math

from megameta.config.automatic import assume
from megameta.config.deepspeed import deepspeed_config, zero_stage
from megameta.config.derived import data_parallel_size
from megameta.config.sections import RunConfig
from megameta.errors import UserError


def problems(config: RunConfig, *, world_size: int, device: str) -> list[str]:
    """What is wrong with a configuration for a world of this size on "cpu" or "cuda": keys and a remedy, each."""
    found = [*_model_and_data(config), *_batch(config, world_size), *_steps(config), *_finetune(config)]
    found += _analysis(config)
    if config.init.from_checkpoint is not None and config.init.from_hf is not None:
        found.append("init.from_checkpoint and init.from_hf both say where the weights start: take one away")
    return found + _async_save(config) + layout_problems(config, device) + _deepspeed(config, world_size, device)


def validate(config: RunConfig, *, world_size: int, device: str) -> None:
    """Raise UserError with every problem at once."""
    found = problems(config, world_size=world_size, device=device)
    if found:
        raise UserError("\n  ".join([f"the configuration has {len(found)} problem(s):", *found]))


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
    found += _sources(config)
    for first, end in data.skip:
        if not 0 <= first < end:
            found.append(f"data.skip [{first}, {end}]: a range is [first, end) with first below end")
    return found


def _sources(config: RunConfig) -> list[str]:
    data = config.data
    found = []
    if isinstance(data.train, dict):
        without = [name for name, source in data.train.items() if source.weight is None]
        if 0 < len(without) < len(data.train):
            found.append(
                f"data.train: {', '.join(without[:5])} without a weight, others with one; give all of them a weight, or"
                " none, and data.temperature sets the shares"
            )
        if data.temperature != 1.0 and not without:
            found.append("data.temperature is for sources without weights; take it or data.train's weights away")
        found += [f"data.train.{name}: no prefixes" for name, source in data.train.items() if not source.prefixes]
    elif data.temperature != 1.0:
        found.append(
            "data.temperature needs sources: data.train is a list, whose documents are pooled; write a mapping"
        )
    if data.split is not None:
        if min(data.split) < 0 or data.split[0] <= 0:
            found.append(f"data.split {list(data.split)}: shares are 0 or more, that of training above 0")
        taken = sorted({"valid", "test"} & {name.partition("/")[0] for name in data.valid})
        if taken:
            found.append(f"data.valid.{taken[0]}: data.split makes a set of that name; give yours another")
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
            f" {train.micro_batch_size} × {data_parallel} data-parallel ranks = {per_pass}:"
            f" {_batch_remedy(train.global_batch_size, train.micro_batch_size, data_parallel)}"
        ]
    return []


def _batch_remedy(batch: int, micro: int, ranks: int) -> str:
    enough = f"train.global_batch_size={-(-batch // (micro * ranks)) * micro * ranks} would do"
    smaller = [size for size in range(micro, 0, -1) if batch % (size * ranks) == 0]
    return f"{enough}, or train.micro_batch_size={smaller[0]}" if smaller else enough


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


def _finetune(config: RunConfig) -> list[str]:
    tuning, found = config.finetune, []
    if tuning.directory is None:
        return []
    if not tuning.phases or tuning.phases != sorted(set(tuning.phases)):
        found.append(f"finetune.phases {tuning.phases}: length bins, ascending, at least one")
    elif config.train.num_steps % len(tuning.phases):
        found.append(
            f"train.num_steps {config.train.num_steps} does not divide by the {len(tuning.phases)} phases of"
            f" finetune.phases: {-(-config.train.num_steps // len(tuning.phases)) * len(tuning.phases)} would do"
        )
    elif tuning.phases[-1] > config.data.sequence_length:
        found.append(
            f"finetune.phases end at {tuning.phases[-1]} tokens, data.sequence_length is {config.data.sequence_length}:"
            " raise it"
        )
    if config.train.compile == "blocks":
        found.append(
            "train.compile=blocks compiles for batches of one length, and those of tasks differ: set train.compile=none"
        )
    if config.data.tokenizer is None:
        found.append("finetune.directory needs data.tokenizer, which encodes the examples")
    if tuning.markers is False and config.model.meta_attention:
        found.append(
            "finetune.markers=false leaves the meta branch nothing to do: set model.meta_attention=false, or keep them"
        )
    return found


def _analysis(config: RunConfig) -> list[str]:
    if not config.analysis.interval:
        return []
    remedy = "set analysis.interval=0, and look at checkpoints with megameta analyze"
    if config.parallel.tensor_parallel_size > 1 or config.parallel.pipeline_parallel_size > 1:
        return [
            "analysis.interval needs every layer and head in one process: no tensor or pipeline parallelism (ZeRO 0 to"
            f" 3 are fine); {remedy}"
        ]
    if config.finetune.directory is not None:
        return [f"analysis.interval reads held-out text, and fine-tuning has none: {remedy}"]
    if not config.data.num_meta_tokens:
        return ["analysis.interval measures meta-tokens, and data.meta_token_fraction leaves none: set it to 0"]
    if not config.data.valid and not (config.data.split is not None and config.data.split[1] > 0):
        return [f"analysis.interval needs a held-out set: give data.valid or data.split, or {remedy}"]
    return []


def layout_problems(config: RunConfig, device: str) -> list[str]:
    """What is wrong with ``parallel`` and its precision, whatever the number of processes."""
    return [*_tensor_parallel(config), *_pipeline(config), *_precision(config, device)]


def _tensor_parallel(config: RunConfig) -> list[str]:
    model, size = config.model, config.parallel.tensor_parallel_size
    found = []
    if size == 1 and config.parallel.sequence_parallel:
        found.append(
            "parallel.sequence_parallel shards between tensor-parallel ranks, of which there is one:"
            " set parallel.tensor_parallel_size, or sequence_parallel=false"
        )
    shared = ("num_heads", "num_key_value_heads", "intermediate_size")
    uneven = [f"model.{key} {getattr(model, key)}" for key in shared if getattr(model, key) % size]
    if uneven:
        found.append(
            f"parallel.tensor_parallel_size {size} does not divide {' and '.join(uneven)}, which the ranks share:"
            f" use {_degrees(config)}"
        )
    length = config.data.sequence_length
    if config.parallel.sequence_parallel and length % size:
        found.append(
            f"data.sequence_length {length} does not divide by parallel.tensor_parallel_size {size}, as"
            " parallel.sequence_parallel needs: change the length or set sequence_parallel=false"
        )
    return found


def _degrees(config: RunConfig) -> str:
    model = config.model
    fits = math.gcd(model.num_heads, model.num_key_value_heads, model.intermediate_size)
    return " or ".join(str(degree) for degree in range(1, min(fits, 64) + 1) if fits % degree == 0)


def _pipeline(config: RunConfig) -> list[str]:
    stages, zero = config.parallel.pipeline_parallel_size, config.parallel.zero_stage
    found: list[str] = []
    if stages == 1:
        return found
    if stages > config.model.num_layers:
        found.append(
            f"parallel.pipeline_parallel_size {stages} is above model.num_layers {config.model.num_layers}:"
            " every stage needs a layer"
        )
    if zero == 0:
        found.append(
            "parallel.zero_stage 0 with pipeline stages: DeepSpeed clips by a wrong norm there, which leaves out the"
            " parameters of all stages but the first; set parallel.zero_stage=1"
        )
    if zero is not None and zero > 1:
        found.append(
            f"parallel.zero_stage {zero} with pipeline stages: DeepSpeed refuses it, as gradients would be reduced in"
            " every micro-batch; set parallel.zero_stage=1, or pipeline_parallel_size=1"
        )
    if config.train.precision == "fp16":
        found.append(
            "train.precision fp16 with pipeline stages has never been run and compared: use bf16, or"
            " pipeline_parallel_size=1"
        )
    return found


def _async_save(config: RunConfig) -> list[str]:
    """Threads copy what is in memory; what is offloaded further, DeepSpeed brings in for the calling thread alone."""
    offloads = {key: config.zero_options.get(key) for key in ("offload_optimizer", "offload_param")}
    on_disk = [key for key, target in offloads.items() if isinstance(target, dict) and target.get("device") == "nvme"]
    if not config.checkpoint.async_save or not on_disk:
        return []
    return [
        f"checkpoint.async_save with deepspeed.zero_optimization.{on_disk[0]}.device nvme: the state is not in memory"
        " to be copied; set checkpoint.async_save=false"
    ]


def _precision(config: RunConfig, device: str) -> list[str]:
    if config.train.precision != "fp16":
        return []
    found = []
    if device != "cuda":
        found.append("train.precision fp16 needs a CUDA device; on this machine use fp32 or bf16")
    if config.parallel.tensor_parallel_size > 1 and config.parallel.zero_stage == 0:
        found.append(
            "train.precision fp16 with tensor parallelism and parallel.zero_stage 0: an overflow on one shard would"
            " change the loss scale on that rank alone; set parallel.zero_stage=1, or train.precision=bf16"
        )
    return found


def _deepspeed(config: RunConfig, world_size: int, device: str) -> list[str]:
    config = assume(config, device)  # what is "auto" is settled when the run starts
    ranks = data_parallel_size(config, world_size)
    accumulation = config.train.global_batch_size // (config.train.micro_batch_size * max(1, ranks))
    try:
        deepspeed_config(config, accumulation, zero_stage(config, ranks))
    except UserError as error:
        return [str(error)]
    return []
