"""What one rank sends in an optimiser step, collective by collective (tests count the bytes of real runs beside this).

The tensor-parallel part follows from where activations enter and leave sharded layers (megameta/parallel/
tensor_parallel.py), the data-parallel part from what DeepSpeed 0.19.8 calls:

- ZeRO 0 all-reduces gradients once a step; 1 too, and all-gathers parameters after the update.
- ZeRO 2 reduces gradients after every micro-batch, by all-reduce (its default, use_multi_rank_bucket_allreduce).
- ZeRO 3 all-gathers parameters for each micro-batch's forward and backward pass and reduce-scatters its gradients.
  Parameters used again within stage3_max_reuse_distance stay: the last layers are gathered once, not twice. Parameters
  up to stage3_param_persistence_threshold are gathered once a step.

Letters: B batch, T rows, M meta rows, D model width, n ranks of the group.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megameta.config import RunConfig
from megameta.config.deepspeed import zero_option
from megameta.model import ModelConfig
from megameta.plan.activations import Widths
from megameta.plan.layout import Layout, Weights, block_weights, stage_weights, table_rows

Group = Literal["tensor", "pipeline", "data", "embedding"]
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "send"]
GROUPS: tuple[Group, ...] = ("tensor", "pipeline", "data", "embedding")


@dataclass(frozen=True)
class Transfer:
    """Equal calls of one collective by one rank."""

    group: Group
    kind: Kind
    what: str
    num_bytes: float
    """Of one call: the whole tensor that is reduced, gathered to, scattered from or sent."""
    calls: float
    """In an optimiser step."""
    ranks: int
    """Of the group."""

    @property
    def payload(self) -> float:
        """Bytes that enter the collective in a step."""
        return self.num_bytes * self.calls

    @property
    def wire(self) -> float:
        """Bytes that the rank sends in a step by the ring algorithms."""
        share = (self.ranks - 1) / self.ranks
        return self.payload * {"all_reduce": 2 * share, "send": 1.0}.get(self.kind, share)


def transfers(config: RunConfig, layout: Layout, stage: int, blocks: tuple[int, int]) -> list[Transfer]:
    """All that a rank of ``stage``, which runs ``blocks`` [first, end), sends in an optimiser step."""
    weights = stage_weights(config.model, layout, blocks)
    found: list[Transfer] = []
    if layout.tensor > 1:
        found += _tensor(config, layout, stage, blocks, weights)
    if layout.pipeline > 1:
        found += _pipeline(config, layout, stage)
    if layout.data > 1:
        found += _data(config, layout, weights, blocks)
    return [transfer for transfer in found if transfer.payload > 0]


def by_group(found: Iterable[Transfer]) -> dict[Group, tuple[float, float]]:
    """(payload, wire) bytes of a step by group."""
    sums: dict[Group, tuple[float, float]] = {}
    for transfer in found:
        payload, wire = sums.get(transfer.group, (0.0, 0.0))
        sums[transfer.group] = (payload + transfer.payload, wire + transfer.wire)
    return sums


def _tensor(config: RunConfig, layout: Layout, stage: int, blocks: tuple[int, int], weights: Weights) -> list[Transfer]:
    widths = Widths.of(config.train.precision, layout.zero_stage)
    rows = layout.micro_batch_size * config.data.sequence_length
    full = rows * config.model.hidden_size
    micro = layout.accumulation
    first, last = stage == 0, stage == layout.pipeline - 1

    def one(kind: Kind, what: str, num_bytes: float, calls: float = 1) -> Transfer:
        return Transfer("tensor", kind, what, num_bytes, calls * micro, layout.tensor)

    branches = config.model.count_meta_layers(*blocks)
    found = _block_tensor(config, layout, widths, (blocks[1] - blocks[0]) * micro)
    found += _branch_tensor(config, layout, widths, branches * micro)
    if first:
        found.append(one("all_reduce", "embedding, forward", widths.residual * full))
        if layout.sequence_parallel:
            found.append(one("all_gather", "embedding, backward", widths.residual * full))
    if last:
        if layout.sequence_parallel:
            found.append(one("all_gather", "head, forward", widths.residual * full))
            found.append(one("reduce_scatter", "head, backward", widths.residual * full))
        else:
            found.append(one("all_reduce", "head, backward", widths.residual * full))
        found.append(one("all_reduce", "largest logit of a row", 4 * rows))
        found.append(one("all_reduce", "sum of exponentials, label's logit", 8 * rows))
    found += [one("all_reduce", "partial gradients", widths.weight * size) for size in weights.partial]
    return found


def _block_tensor(config: RunConfig, layout: Layout, widths: Widths, passes: float) -> list[Transfer]:
    """Of ``passes`` passes forward and backward through a block, the meta branch apart."""
    full = layout.micro_batch_size * config.data.sequence_length * config.model.hidden_size
    # Recomputation repeats the forward pass, but stops when it has what was not kept: before the MLP's last collective.
    again = 2 if layout.checkpointing else 1

    def one(kind: Kind, what: str, num_bytes: float, calls: float) -> Transfer:
        return Transfer("tensor", kind, what, num_bytes, calls * passes, layout.tensor)

    into, out = widths.residual * full, widths.linear * full
    if not layout.sequence_parallel:
        return [
            one("all_reduce", "attention, forward", out, again),
            one("all_reduce", "MLP, forward", out, 1),
            one("all_reduce", "attention and MLP, backward", into, 2),
        ]
    return [
        one("all_gather", "into attention and MLP, forward", into, 2 * again),
        one("reduce_scatter", "out of attention, forward", out, again),
        one("reduce_scatter", "out of MLP, forward", out, 1),
        one("all_gather", "out of attention and MLP, backward", out, 2),
        one("reduce_scatter", "into attention and MLP, backward", into, 2),
    ]


def _branch_tensor(config: RunConfig, layout: Layout, widths: Widths, passes: float) -> list[Transfer]:
    """Of ``passes`` passes forward and backward through a meta branch."""
    model = config.model
    meta = layout.micro_batch_size * max(1, config.data.num_meta_tokens) * model.hidden_size
    again = 2 if layout.checkpointing else 1

    def one(what: str, num_bytes: float, calls: float) -> Transfer:
        return Transfer("tensor", "all_reduce", what, num_bytes, calls * passes, layout.tensor)

    found = [
        one("meta-attention, forward", widths.linear * meta, again),
        one("meta-attention, backward", widths.residual * meta, 1),
    ]
    if layout.sequence_parallel:
        scattered = widths.residual if model.bias else widths.linear  # adding a float32 bias makes it float32
        found.append(one("meta rows, forward", widths.residual * meta, again))
        found.append(one("meta rows, backward", scattered * meta, 1))
    return found


def _pipeline(config: RunConfig, layout: Layout, stage: int) -> list[Transfer]:
    widths = Widths.of(config.train.precision, layout.zero_stage)
    rows = layout.micro_batch_size * config.data.sequence_length
    own_rows = rows / layout.tensor if layout.sequence_parallel else rows
    hidden = widths.residual * own_rows * config.model.hidden_size
    ids = 1 + (1 + config.data.reset_positions if config.data.document_mask else 0)

    def send(what: str, num_bytes: float) -> Transfer:
        return Transfer("pipeline", "send", what, num_bytes, layout.accumulation, 2)

    found = []
    if stage < layout.pipeline - 1:
        found += [send("hidden states", hidden), send("ids of tokens, documents, positions", 8 * rows * ids)]
    if stage > 0:
        found.append(send("gradient of hidden states", hidden))
    if config.model.tie_embeddings and stage in (0, layout.pipeline - 1):
        table = widths.weight * table_rows(config.model, layout.tensor) * config.model.hidden_size
        found.append(Transfer("embedding", "all_reduce", "gradient of the tied table", table, 1, 2))
        found.append(Transfer("embedding", "broadcast", "the tied table after the update", table, 1, 2))
    return found


def _data(config: RunConfig, layout: Layout, weights: Weights, blocks: tuple[int, int]) -> list[Transfer]:
    widths = Widths.of(config.train.precision, layout.zero_stage)
    size = widths.weight * weights.count
    micro = layout.accumulation

    def one(kind: Kind, what: str, num_bytes: float, calls: float) -> Transfer:
        return Transfer("data", kind, what, num_bytes, calls, layout.data)

    if layout.zero_stage == 3:
        held = live_parameters(config, layout, weights)
        persistent = _persistent(config, layout, blocks)
        again = max(0, weights.count - persistent - held)
        modules = max(1, _linear_layers(config.model, blocks))  # each is fetched by its own call
        split = widths.weight / modules
        return [
            one("all_gather", "parameters, forward", split * (weights.count - persistent), micro * modules),
            one("all_gather", "parameters, backward", split * again, micro * modules),
            one("all_gather", "small parameters", widths.weight * persistent, 1),
            one("reduce_scatter", "gradients", size, micro),
        ]
    found = [one("all_reduce", "gradients", size, micro if layout.zero_stage == 2 else 1)]
    if layout.zero_stage > 0:
        found.append(one("all_gather", "parameters", size, 1))
    return found


def _linear_layers(model: ModelConfig, blocks: tuple[int, int]) -> int:
    in_plain = 4 + (3 if model.activation == "swiglu" else 2)
    return (blocks[1] - blocks[0]) * in_plain + model.count_meta_layers(*blocks) * 4


def live_parameters(config: RunConfig, layout: Layout, weights: Weights) -> float:
    """Parameters that ZeRO 3 keeps gathered from the forward to the backward pass: those used again within the reuse
    distance, which is passed through once forward and once backward."""
    return min(weights.count, zero_option(config, "stage3_max_reuse_distance", 1e9) / 2)


def _persistent(config: RunConfig, layout: Layout, blocks: tuple[int, int]) -> int:
    """Parameters in tensors so small that ZeRO 3 keeps them whole; it runs without pipeline stages."""
    threshold = zero_option(config, "stage3_param_persistence_threshold", 1e5)
    model, n = config.model, layout.tensor
    width, inner = model.hidden_size, model.intermediate_size
    key_value = model.num_key_value_heads * model.head_size
    num_blocks, with_meta = blocks[1] - blocks[0], model.count_meta_layers(*blocks)
    found = [
        (2 * (num_blocks + with_meta), width * width // n),
        (2 * (num_blocks + with_meta), width * key_value // n),
        (num_blocks * (3 if model.activation == "swiglu" else 2), width * inner // n),
        (1 if model.tie_embeddings else 2, table_rows(model, n) * width),
        (1 if model.position == "ape" else 0, model.max_position_embeddings * width),
        (2 if model.bias and model.norm == "layernorm" else 1, width),
    ]
    small = sum(count * size for count, size in found if size <= threshold)
    if width <= threshold:  # the vectors of blocks are judged by a norm's size
        small += with_meta * block_weights(model, n, has_meta=True).other
        small += (num_blocks - with_meta) * block_weights(model, n, has_meta=False).other
    return small
