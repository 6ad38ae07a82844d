"""The sections of a configuration: keys, types, defaults, what each means."""

import json
from fractions import Fraction
from typing import Any, Literal, get_args

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from megameta.config.yaml_format import dump_yaml
from megameta.model.config import ModelConfig


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _number_is_not_yes(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        allowed = annotation is bool or any(value is choice for choice in get_args(annotation))
        if isinstance(value, bool) and not allowed:
            raise ValueError("true or false (yes and no in YAML) where another kind of value belongs")
        return value


class RunSection(Section):
    """Where the run lives."""

    dir: str = "runs/default"
    """Directory of the run: config.yaml, metrics.jsonl, checkpoints/, tensorboard/, logs/."""
    seed: int = Field(1234, ge=0)
    """Seed of the initial weights, the order of the data and the places of meta-tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: the GPUs that are there, else the CPU."""
    deterministic: bool = False
    """Only kernels that give the same bits every time: a run on GPUs that is stopped and started again is then bitwise
    the one that was not, as on a CPU. Slower: attention's backward pass most of all."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _source(name: str, entry: Any) -> Any:
    """A source from its short forms: PREFIX: weight, NAME: PREFIX, NAME: [PREFIX, …]; others are left to be checked."""
    if entry is None or _is_number(entry):
        return {"prefixes": [name], "weight": entry}
    return {"prefixes": entry} if isinstance(entry, str | list) else entry


class Source(Section):
    """One source of a mixture."""

    prefixes: list[str]
    """Prefixes of its tokenised datasets; their documents are pooled."""
    weight: float | None = Field(None, gt=0)
    """Its share of the samples, in any scale."""

    @pydantic.field_validator("prefixes", mode="before")
    @classmethod
    def _one_prefix(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class DataSection(Section):
    """What is read."""

    train: list[str] | dict[str, Source] = []
    """Prefixes of tokenised datasets (PREFIX.bin and PREFIX.idx), whose documents are pooled; or a mixture:
    {PREFIX: weight, …}, {NAME: {prefixes: […], weight: w}, …}, or Megatron's list [weight, PREFIX, …]."""
    temperature: float = Field(1.0, gt=0)
    """Where the sources of a mixture have no weights: shares are as tokens^(1 / temperature)."""
    split: tuple[float, float, float] | None = None
    """Shares of each training dataset's documents for training, for the held-out set "valid" and for "test", in any
    scale, in the order on disk (Megatron's --split). "test" is evaluated once, at the end."""
    cross_documents: bool = True
    """Samples run on from one document into the next; false: each holds a piece of one document, padded at the end."""
    cache_dir: str | None = None
    """Where the orders of large corpora are kept; runs may share it. Default: cache/ in run.dir."""
    valid: dict[str, list[str]] = {}
    """Held-out sets by name, each a list of prefixes; a bare list is named "valid"."""
    tokenizer: str | None = None
    """Tokenizer directory or file. Gives model.vocab_size and model.meta_token_id, and bits per byte."""
    sequence_length: int = Field(1024, ge=2)
    """Slots T of a sequence, meta-tokens included."""
    meta_token_fraction: float = Field(0.1, ge=0.0, le=0.5)
    """k: a sequence holds floor(k · T) meta-tokens."""
    meta_token_placement: Literal["random", "periodic"] = "random"  # noqa: S105
    """Where they stand: drawn anew for every sample, or evenly spaced, the same in all."""
    document_mask: bool = False
    """Keep attention and loss inside documents."""
    reset_positions: bool = False
    """Restart positions at document ends (needs document_mask)."""
    skip: list[tuple[int, int]] = []
    """Ranges [first, end) of global batches to pass over, counted from 0 (after a loss spike)."""

    @pydantic.field_validator("train", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and len(value) > 1 and _is_number(value[0]):
            weights, prefixes = value[::2], value[1::2]
            fits = all(map(_is_number, weights)) and all(isinstance(prefix, str) for prefix in prefixes)
            if not fits or len(weights) != len(prefixes) or len({*prefixes}) < len(prefixes):
                raise ValueError("a list that begins with a weight is weight, prefix, weight, prefix, …")
            value = dict(zip(prefixes, weights, strict=True))
        if isinstance(value, dict):
            return {name: _source(name, entry) for name, entry in value.items()}
        return value

    @property
    def sources(self) -> dict[str, list[str]]:
        """Prefixes by the name of their source; a bare list is one source without a name."""
        if isinstance(self.train, list):
            return {"": self.train} if self.train else {}
        return {name: source.prefixes for name, source in self.train.items()}

    @pydantic.field_validator("valid", mode="before")
    @classmethod
    def _one_set(cls, value: Any) -> Any:
        if isinstance(value, str | list):
            value = {"valid": value} if value else {}
        if isinstance(value, dict):
            return {name: [prefix] if isinstance(prefix, str) else prefix for name, prefix in value.items()}
        return value

    @property
    def num_meta_tokens(self) -> int:
        """M = floor(k · T), in exact arithmetic on the decimal k (0.29 · 100 is 29, not 28)."""
        return int(Fraction(str(self.meta_token_fraction)) * self.sequence_length)

    @property
    def text_per_sample(self) -> int:
        """L = T − M, the text tokens of a sequence."""
        return self.sequence_length - self.num_meta_tokens


class TrainSection(Section):
    """How long, how large, how precise."""

    num_steps: int = Field(1000, ge=1)
    """Optimiser steps of the whole run."""
    micro_batch_size: int = Field(8, ge=1)
    """Sequences of one forward pass on one rank."""
    global_batch_size: int = Field(8, ge=1)
    """Sequences of one optimiser step, over all ranks and accumulation steps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """fp32; bf16 or fp16: autocast over float32 weights (fp16 with dynamic loss scaling, GPU only). auto: bf16 on GPUs
    of compute capability 8 (Ampere) or later, else fp32; a resumed run keeps what it began with."""
    tf32: bool = False
    """Multiply float32 matrices on a GPU in TF32, on its tensor cores: 10 bits of mantissa in place of 23."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    compile: Literal["auto", "none", "blocks"] = "auto"
    """Compile the model's blocks with torch.compile, once at the start of training; evaluations are not compiled. auto:
    where a compiler works and the run is long enough to win back the time; never for tasks, whose lengths differ. A
    resumed run keeps what it began with."""
    fused_loss: Literal["auto", True, False] = "auto"
    """Loss and its gradient a few rows at a time, so that the logits of a micro-batch are never held. auto: from 2 M
    logits a micro-batch on, on a CPU, and on GPUs where blocks are compiled; a resumed run keeps what it began with."""
    check_replicas_every: int = Field(0, ge=0)
    """Steps between checks that replicas of every parameter are bitwise equal on all ranks; 0: never."""
    peak_tflops: float | None = Field(None, gt=0)
    """The device's peak for mfu, in TFLOP/s. Default: measured with matrix products at the start of the run."""

    @property
    def products(self) -> str:
        """In what matrix products are made: the precision, or tf32."""
        return "tf32" if self.tf32 and self.precision == "fp32" else self.precision


class OptimizerSection(Section):
    """AdamW and its schedule."""

    implementation: Literal["torch", "apex"] = "torch"
    """torch's fused AdamW, or FusedAdam of an installed NVIDIA apex."""
    lr: float = Field(6e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(6e-5, ge=0)
    """Learning rate at the end of the schedule."""
    warmup_steps: int = Field(2000, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to min_lr, warm-up–stable–decay (linear over the last decay_steps), or constant."""
    decay_steps: int = Field(0, ge=0)
    """wsd: steps of the final decay. Default: a tenth of train.num_steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.1, ge=0)
    """Decay of matrices (norms and biases have none)."""
    clip_grad_norm: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0: no clipping."""


class ParallelSection(Section):
    """How the work is divided."""

    tensor_parallel_size: int = Field(1, ge=1)
    """Ranks that share one layer's matrices."""
    pipeline_parallel_size: int = Field(1, ge=1)
    """Stages that share the layers among them."""
    pipeline_balance: Literal["parameters", "time"] = "parameters"
    """What the stages get equal shares of: parameters (memory) or time (model flops)."""
    sequence_parallel: bool = False
    """Shard norms and residuals along the sequence inside a tensor-parallel group."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What DeepSpeed ZeRO partitions: 0 nothing, 1 optimiser state, 2 and gradients, 3 and parameters. Left out: 1, and
    0 where a single data-parallel rank has nobody to share with (not with pipeline stages, fp16 or offloading)."""


class CheckpointSection(Section):
    """What is kept."""

    interval: int = Field(1000, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that stay on disk."""
    async_save: bool = False
    """Copy the state to host memory and write it while training goes on; needs 12 bytes a parameter there, shared among
    the ranks as the state is on their devices. The checkpoint counts from the first step at which every rank has
    finished."""


class EvalSection(Section):
    """Evaluation on the held-out sets."""

    interval: int = Field(1000, ge=1)
    """Steps between evaluations; the last step is always evaluated."""
    num_samples: int = Field(256, ge=0)
    """Sequences of each set, evenly spread over it; 0: all of it."""
    without_injection: bool = True
    """Also evaluate without meta-tokens where training has them."""


class AnalysisSection(Section):
    """What meta-tokens do inside the model, recorded while it trains (``megameta analyze`` shows more)."""

    interval: int = Field(0, ge=0)
    """Steps between measurements of entropy drop, logit boost and meta mass on held-out text; 0: never."""
    num_samples: int = Field(4, ge=1)
    """Sequences of the first held-out set that are measured, the same each time, read three times by every rank."""


class FinetuneSection(Section):
    """Fine-tuning on tasks (``megameta finetune``), in phases of growing length."""

    directory: str | None = None
    """Directory of ``megameta tasks generate``."""
    tasks: list[str] = []
    """Tasks to train and evaluate on. Default: all in the directory."""
    phases: list[int] = [128, 256, 512, 1024]
    """Length bins by phase: phase p trains on examples of bins up to its own; all phases have equally many steps."""
    markers: bool = True
    """Markers become meta-tokens; false: examples are rendered for models without them."""
    eval_examples: int = Field(200, ge=0)
    """Test examples of each task and bin that are evaluated; 0: all."""
    eval_bins: list[int] = []
    """Bins that are evaluated. Default: those of the phases, and twice the last."""


class InitSection(Section):
    """Where the weights start."""

    from_checkpoint: str | None = None
    """Start anew from the weights (alone) of this checkpoint or run directory."""
    from_hf: str | None = None
    """Start anew from a HuggingFace directory: a GPT-2 or GPT-NeoX, which gets a meta-token and a meta branch that adds
    nothing at first, or an export. Gives model, and data.tokenizer where that is left out."""


class LogSection(Section):
    """What is shown and recorded."""

    tensorboard: bool = True
    """Write RUN/tensorboard."""
    interval: int = Field(10, ge=1)
    """Steps between printed lines where there is no terminal, and between TensorBoard points."""


class ClusterSection(Section):
    """Many machines: checks before the first step, and what is watched while the run is under way."""

    preflight: Literal["auto", "always", "never"] = "auto"
    """Check every node before the first step, as `megameta slurm check` does. auto: in a SLURM job, and
    where there is more than one."""
    preflight_seconds: float = Field(120.0, gt=0)
    """Seconds that each of these checks may take."""
    min_free_gpu_memory: float = Field(0.9, ge=0, le=1)
    """Share of every GPU's memory that must be free before the first step."""
    min_all_reduce_gbps: float = Field(0.0, ge=0)
    """Bandwidth in GB/s below which the all-reduce over all ranks is refused before the first step; 0: any will do."""
    lost_node_seconds: float = Field(30.0, ge=0)
    """Seconds of silence after which a node counts as lost and the others stop; 0: not watched."""
    step_timeout_minutes: float = Field(30.0, ge=0)
    """Minutes without a finished step, evaluation or checkpoint after which every rank prints its stack and the run
    stops; 0: not watched."""
    slow_rank_factor: float = Field(1.3, gt=1)
    """A rank whose forward passes take this many times the median of all ranks is reported."""


class RunConfig(Section):
    """Everything that a run depends on."""

    run: RunSection = RunSection()
    model: ModelConfig = ModelConfig()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    analysis: AnalysisSection = AnalysisSection()
    finetune: FinetuneSection = FinetuneSection()
    init: InitSection = InitSection()
    log: LogSection = LogSection()
    cluster: ClusterSection = ClusterSection()
    deepspeed: dict[str, Any] = {}
    """Passed through to DeepSpeed; may not contradict what is derived from the other sections."""

    @property
    def zero_options(self) -> dict[str, Any]:
        """DeepSpeed's zero_optimization as passed through; what is no section there is refused elsewhere."""
        own = self.deepspeed.get("zero_optimization")
        return own if isinstance(own, dict) else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain values by section, as YAML and JSON hold them."""
        return json.loads(self.model_dump_json())

    def to_yaml(self) -> str:
        """Every value, in the order of the sections."""
        return dump_yaml(self.to_dict())
