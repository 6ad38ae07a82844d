"""Model flops of a forward pass, a multiply–add counted as two (tested against torch's FlopCounterMode)."""

from megameta.model.config import ModelConfig


def block_flops(config: ModelConfig, length: int, num_meta: float, *, has_meta: bool) -> float:
    """Flops of one block with or without the branch, in a forward pass of one sequence (see ``forward_flops``)."""
    width, inner = config.hidden_size, config.intermediate_size
    key_value_width = config.num_key_value_heads * config.head_size
    projections = 2 * (2 * width * width + 2 * width * key_value_width)  # a row: query and output, key and value
    mlp = 2 * (3 if config.activation == "swiglu" else 2) * width * inner

    def attention(rows: float) -> float:
        return rows * projections + 2 * 2 * rows * rows * width

    return attention(length) + length * mlp + (attention(num_meta) if has_meta else 0.0)


def head_flops(config: ModelConfig, length: int) -> float:
    """Flops of the projection to the vocabulary in a forward pass of one sequence."""
    return 2.0 * length * config.hidden_size * config.vocab_size


def forward_flops(config: ModelConfig, length: int, num_meta: float) -> float:
    """Flops of one sequence of ``length`` rows that holds ``num_meta`` meta-tokens; a backward pass costs twice that.

    Attention is counted in full, not halved for causality (the convention of PaLM's and nanoGPT's utilisation figures).
    The branch counts its M rows only (spec §2, whose ratios halve attention).
    """
    with_meta = config.count_meta_layers()
    blocks = with_meta * block_flops(config, length, num_meta, has_meta=True)
    blocks += (config.num_layers - with_meta) * block_flops(config, length, num_meta, has_meta=False)
    return blocks + head_flops(config, length)
