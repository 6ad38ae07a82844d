"""Model flops of a forward pass, a multiply–add counted as two (tested against torch's FlopCounterMode)."""

from megameta.model.config import ModelConfig


def forward_flops(config: ModelConfig, length: int, num_meta: float) -> float:
    """Flops of one sequence of ``length`` rows that holds ``num_meta`` meta-tokens; a backward pass costs twice that.

    Attention is counted in full, not halved for causality (the convention of PaLM's and nanoGPT's utilisation figures).
    The branch counts its M rows only (spec §2, whose ratios halve attention).
    """
    width, inner = config.hidden_size, config.intermediate_size
    key_value_width = config.num_key_value_heads * config.head_size
    projections = 2 * (2 * width * width + 2 * width * key_value_width)  # a row: query and output, key and value
    mlp = 2 * (3 if config.activation == "swiglu" else 2) * width * inner

    def attention(rows: float) -> float:
        return rows * projections + 2 * 2 * rows * rows * width

    layer = attention(length) + length * mlp + (attention(num_meta) if config.meta_attention else 0.0)
    head = 2 * length * width * config.vocab_size
    return config.num_layers * layer + head
