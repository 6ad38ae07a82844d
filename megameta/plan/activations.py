"""Bytes that one micro-batch keeps for its backward pass, tensor by tensor: derived from the model's code, not fitted.

What autograd saves (tests/plan/test_activations.py compares with what it did save, and with the peak of all live
tensors):

- A norm keeps its input, its statistics and, RMSNorm, the normalised rows (CUDA's fused RMSNorm does without those).
- The residual stream is float32 under autocast, and so is what norms return. The linear layers that it feeds keep one
  bf16 copy of it together.
- Linear layers under autocast keep a bf16 copy of their weight, once a micro-batch in flight; not under ZeRO 3.
- Attention keeps queries, keys, values, its output and a float32 log-sum a row and head; never a T × T matrix, except
  for the mask of documents of short sequences on a CPU, which sdpa converts in every layer. (Long ones on a CPU keep
  the output twice: by documents, and together. A GPU of compute capability 7 or less keeps masks that are not counted.)
- The loss keeps float32 log-probabilities of all rows; its backward pass needs two more of that size for a moment.
  Fused, it keeps the gradients of hidden states and output weight, and needs a chunk's logits for a moment; of torch's
  code, on a CPU, the same is assumed.

Letters: B batch, T rows, S rows of the residual stream here (T / n under sequence parallelism), M meta rows, D model
width, F feed-forward width, V vocabulary entries here, n tensor-parallel ranks.
"""

from dataclasses import dataclass

from megameta.config import RunConfig, device_of
from megameta.model import ModelConfig
from megameta.model.attention import BY_DOCUMENT
from megameta.parallel.losses import chunk_rows
from megameta.plan.layout import Layout, block_weights, table_rows


@dataclass(frozen=True)
class Widths:
    """Bytes of a number."""

    weight: int
    """Parameters and their gradients."""
    residual: int
    """Residual stream and outputs of norms."""
    linear: int
    """Outputs of linear layers, and what they feed."""
    copies: bool
    """Whether linear layers keep low-precision copies of inputs and weights (autocast outside ZeRO 3)."""

    @classmethod
    def of(cls, precision: str, zero_stage: int) -> "Widths":
        """fp16 with ZeRO runs in halves with float32 masters; bf16, and fp16 at ZeRO 0, is autocast over float32."""
        if precision == "auto":
            raise ValueError("train.precision is auto: settle the configuration for a device first")
        if precision == "fp32":
            return cls(4, 4, 4, False)
        if precision == "fp16" and zero_stage > 0:
            return cls(2, 2, 2, False)
        return cls(4, 4, 2, zero_stage < 3)


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank of one stage, for one micro-batch."""

    block_input: float
    """What a recomputed block keeps."""
    block: float
    """What a block without the meta branch keeps, its input included; without copies of weights."""
    block_copies: float
    """Low-precision copies of its weights."""
    branch: float
    """What the branch keeps, where a block has it; without copies of weights."""
    branch_copies: float
    """Low-precision copies of its weights."""
    shared: float
    """Kept once: ids, masks, rotations."""
    branch_shared: float
    """Kept once where any block has the branch: places and rotations of the meta rows."""
    head: float
    """Final norm, copy of the output weight, log-probabilities (fused: gradients in their place). Last stage only."""
    stage_output: float
    """Hidden states handed to the next stage, which the pipeline holds until their gradient is back."""
    block_temporary: float
    """Most that comes and goes while a block's backward pass runs."""
    head_temporary: float
    """The same for head and loss."""
    logits: float
    """Of which DeepSpeed's pipeline holds on to two micro-batches'; what they are made of, where the loss is fused."""

    def kept(self, num_blocks: int, num_branches: int, *, last: bool, recompute: bool) -> float:
        """Between a micro-batch's forward and backward pass. ``num_branches``: of the blocks, those with a branch."""
        blocks = num_blocks * self.block_input
        if not recompute:
            blocks = num_blocks * (self.block + self.block_copies) + num_branches * (self.branch + self.branch_copies)
        shared = self.shared + (self.branch_shared if num_branches else 0.0)
        return blocks + shared + (self.head if last else self.stage_output)

    def at_loss(self, num_blocks: int, num_branches: int, *, last: bool, recompute: bool) -> float:
        """Beyond ``kept``, between the forward and the backward pass, when the first gradients are still to come."""
        most = self.head_temporary if last else 0.0
        if recompute:
            # Autocast lets go of its copies of weights when the forward pass returns, not when a block does.
            copies = num_blocks * self.block_copies + num_branches * self.branch_copies
            most = max(most, copies + 0.75 * most)
        return most

    def in_block(self, num_branches: int, *, last: bool, recompute: bool) -> float:
        """Beyond ``kept``, in the backward pass of the last block, taken for one with a branch if any block has it; the
        head's are gone."""
        again = self.block + self.block_copies - self.block_input if recompute else 0.0
        if recompute and num_branches:
            again += self.branch + self.branch_copies
        return self.block_temporary + again - (self.head if last else 0.0)


def activations(config: RunConfig, layout: Layout) -> Activations:
    """Of a micro-batch under this layout; the configuration's own layout plays no part."""
    fused = config.train.fused_loss is True
    model, widths = config.model, Widths.of(config.train.precision, layout.zero_stage)
    rows = layout.micro_batch_size * config.data.sequence_length
    own_rows = rows / layout.tensor if layout.sequence_parallel else rows
    meta_rows = layout.micro_batch_size * max(1, config.data.num_meta_tokens)
    width = model.hidden_size
    block_input = widths.residual * own_rows * width
    block = block_input * (1 if model.parallel_residual else 2)
    block += 2 * _norm(model, widths, own_rows)
    block += _linear_input(widths, rows, width) + _attention(model, widths, rows, layout.tensor)
    block += _mlp(model, widths, rows, layout.tensor)
    branch: float = widths.residual * meta_rows * width + meta_rows  # the rows taken; which of them are padding
    branch += _norm(model, widths, meta_rows) + _linear_input(widths, meta_rows, width)
    branch += _attention(model, widths, meta_rows, layout.tensor)
    if config.data.document_mask and device_of(config) == "cpu":
        length, columns = config.data.sequence_length, meta_rows / layout.micro_batch_size
        block += widths.linear * rows * (length if length < BY_DOCUMENT else width / layout.tensor)
        branch += widths.linear * meta_rows * (columns if columns < BY_DOCUMENT else width / layout.tensor)
    linear_weights = block_weights(model, layout.tensor, has_meta=False).linear
    branch_weights = block_weights(model, layout.tensor, has_meta=True).linear - linear_weights
    inner = model.intermediate_size / layout.tensor
    # What the activation's backward makes beyond what it frees, and the gradient of the largest weight, which under
    # autocast exists in both dtypes for a moment.
    inside = (2 if model.activation == "swiglu" else 1) * widths.linear * rows * inner
    inside += (widths.linear + (0 if widths.linear == widths.weight else 4)) * max(inner, width) * width
    return Activations(
        block_input=block_input,
        block=block,
        block_copies=2.0 * linear_weights if widths.copies else 0.0,
        branch=branch,
        branch_copies=2.0 * branch_weights if widths.copies else 0.0,
        shared=_shared(config, layout, rows),
        branch_shared=_branch_shared(model, meta_rows),
        head=(_fused_head if fused else _head)(model, widths, layout, rows, own_rows),
        stage_output=block_input,
        block_temporary=4 * block_input + inside,
        head_temporary=_fused_temporary(config, widths, layout, rows)
        if fused
        else _head_temporary(model, widths, layout, rows),
        logits=widths.residual * rows * width if fused else widths.linear * rows * _columns(model, layout),
    )


def _norm(model: ModelConfig, widths: Widths, rows: float) -> float:
    """Beside its input."""
    return 4 * rows + widths.residual * rows * model.hidden_size if model.norm == "rmsnorm" else 8 * rows


def _linear_input(widths: Widths, rows: float, width: int) -> float:
    """What linear layers keep of the norm's output that feeds them: all of them one tensor, in their dtype."""
    return widths.linear * rows * width


def _attention(model: ModelConfig, widths: Widths, rows: float, tensor: int) -> float:
    """From the projections' outputs to the output projection's input."""
    query = rows * model.hidden_size / tensor
    key = rows * model.num_key_value_heads * model.head_size / tensor
    kept = widths.linear * (2 * query + 2 * key) + 4 * rows * model.num_heads / tensor
    if model.qk_norm:  # the input in float32, the normalised rows, their statistics
        kept += 8 * (query + key) + 4 * (query + key) / model.head_size
    if model.qk_norm or (model.uses_rope and model.rotary_size < model.head_size):
        kept += widths.linear * query  # queries are dense by heads then, as is the output, which is copied to rows
    return kept


def _mlp(model: ModelConfig, widths: Widths, rows: float, tensor: int) -> float:
    gated = model.activation == "swiglu"
    hidden = widths.linear * rows * model.intermediate_size / tensor
    return _linear_input(widths, rows, model.hidden_size) + hidden * (4 if gated else 2)


def _shared(config: RunConfig, layout: Layout, rows: float) -> float:
    model = config.model
    kept = 8 * rows  # token ids
    if layout.tensor > 1:
        kept += 9 * rows  # ids within the shard, and whether they are
    if model.uses_rope:
        # Angles are the same in every sequence, unless positions depend on its tokens or documents.
        own = config.data.reset_positions or model.zero_meta_positions
        kept += 2 * 4 * (rows if own else rows / layout.micro_batch_size) * model.rotary_size
    return kept


def _branch_shared(model: ModelConfig, meta_rows: float) -> float:
    """Places of the meta rows, whether they are real, and their rotations."""
    return 9 * meta_rows + (2 * 4 * meta_rows * model.rotary_size if model.uses_rope else 0)


def _columns(model: ModelConfig, layout: Layout) -> int:
    """Columns of the logits on the rank that has most."""
    return min(model.vocab_size, table_rows(model, layout.tensor))


def _head(model: ModelConfig, widths: Widths, layout: Layout, rows: float, own_rows: float) -> float:
    width, columns = model.hidden_size, _columns(model, layout)
    kept = widths.residual * own_rows * width + _norm(model, widths, own_rows)
    kept += _linear_input(widths, rows, width)
    kept += 2 * columns * width if widths.copies else 0
    return kept + 4 * rows * columns + (8 if layout.tensor == 1 else 0) * rows


def _head_temporary(model: ModelConfig, widths: Widths, layout: Layout, rows: float) -> float:
    logits, columns = rows * _columns(model, layout), _columns(model, layout)
    # Whole: the gradients of the log-probabilities and of the logits. Sharded: the logits as they come, beside the
    # copy that becomes their gradient and is kept.
    loss = logits * (8 if layout.tensor == 1 else widths.linear)
    # The gradient of the output weight, in the dtype of the product, of the parameter, and padded to the whole table;
    # the log-probabilities are gone by then.
    table = columns * model.hidden_size
    weight = (widths.linear + 4 + (4 if widths.linear == 2 else 0)) * table + (widths.linear - 4) * logits
    return max(loss, weight)


def _fused_head(model: ModelConfig, widths: Widths, layout: Layout, rows: float, own_rows: float) -> float:
    """The final norm, and the gradients that wait for the backward pass."""
    kept = widths.residual * own_rows * model.hidden_size + _norm(model, widths, own_rows)
    return kept + (widths.residual * rows + widths.weight * _columns(model, layout)) * model.hidden_size


def _fused_temporary(config: RunConfig, widths: Widths, layout: Layout, rows: float) -> float:
    columns, width = _columns(config.model, layout), config.model.hidden_size
    table = table_rows(config.model, layout.tensor)
    # In the forward pass: a chunk's logits in float32, beside their product or gradient where that is shorter; the
    # norm's output, and the short form of the weight.
    chunk = chunk_rows(int(rows), width, table, device_of(config))
    forward = (4 if widths.linear == 4 else 6) * chunk * columns + widths.residual * rows * width
    if widths.linear == 2:
        forward += 2 * columns * width
    # In the backward pass the weight's gradient is padded to the whole table.
    return max(forward, widths.weight * table * width)
