"""The whole model once more, dense and slow, in float64: written from spec §2 and §3, not from megameta.model.

Every sequence is computed alone, with explicit T × T matrices; the meta branch is softmax(QKᵀ/√K + C + P)V over all T
rows, and a row that has no keys gives exactly zero, output bias included. Only the names of parameters and of
configuration keys are shared with the package. Angles, cosines and sines are float32, as the spec says.

Letters: T rows, D width, H query heads, K head width.
"""

import math

import torch
from torch import Tensor

from megameta.model.config import ModelConfig

State = dict[str, Tensor]


def forward(
    config: ModelConfig,
    state: State,
    token_BT: Tensor,
    position_BT: Tensor | None = None,
    document_BT: Tensor | None = None,
    forbidden_BTT: Tensor | None = None,
) -> Tensor:
    """Logits (B, T, vocab_size). ``state`` may hold leaves that require gradients; padding of the vocabulary is cut.

    ``forbidden_BTT`` (bool): further rows that a row may not look at, in either branch.
    """
    logits = []
    for row, token_T in enumerate(token_BT):
        length = len(token_T)
        position_T = torch.arange(length) if position_BT is None else position_BT[row % len(position_BT)]
        document_T = torch.zeros(length, dtype=torch.long) if document_BT is None else document_BT[row]
        forbidden_TT = None if forbidden_BTT is None else forbidden_BTT[row]
        logits.append(_sequence(config, state, token_T, position_T, document_T, forbidden_TT))
    return torch.stack(logits)


def _sequence(
    config: ModelConfig,
    state: State,
    token_T: Tensor,
    position_T: Tensor,
    document_T: Tensor,
    forbidden_TT: Tensor | None,
) -> Tensor:
    is_meta_T = token_T == config.meta_token_id
    x = embed(config, state, token_T, position_T)
    for layer in range(config.num_layers):
        block = f"blocks.{layer}."
        a = x + causal_branch(config, state, layer, x, is_meta_T, position_T, document_T, forbidden_TT)
        source = x if config.parallel_residual else a
        if config.meta_attention and (config.meta_layers is None or layer in config.meta_layers):
            a = a + meta_branch(config, state, layer, source, is_meta_T, position_T, document_T, forbidden_TT)
        source = x if config.parallel_residual else a
        x = a + mlp(config, state, block + "mlp.", norm(config, state, block + "norm_2", source))
    h = norm(config, state, "head.norm", x)
    table = state["embedding.tokens.weight" if config.tie_embeddings else "head.output.weight"]
    return h @ table[: config.vocab_size].T


def embed(config: ModelConfig, state: State, token_T: Tensor, position_T: Tensor) -> Tensor:
    """Token vectors, and position vectors under ape (T, D)."""
    keep_T1 = (token_T != config.meta_token_id)[:, None]
    x = state["embedding.tokens.weight"][token_T]
    if config.zero_meta_embedding:
        x = x * keep_T1
    if config.position == "ape":
        p = state["embedding.positions.weight"][position_T]
        x = x + (p * keep_T1 if config.zero_meta_positions else p)
    return x


def causal_mask(document_T: Tensor, forbidden_TT: Tensor | None = None) -> Tensor:
    """C, with document ends: 0 where row i may see row j, −∞ elsewhere (T, T), and where that is forbidden."""
    row = torch.arange(len(document_T))
    allowed = (row[None, :] <= row[:, None]) & (document_T[None, :] == document_T[:, None])
    if forbidden_TT is not None:
        allowed = allowed & ~forbidden_TT
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -math.inf)


def causal_branch(
    config: ModelConfig,
    state: State,
    layer: int,
    x: Tensor,
    is_meta_T: Tensor,
    position_T: Tensor,
    document_T: Tensor,
    forbidden_TT: Tensor | None = None,
) -> Tensor:
    """What causal attention adds to the residual stream (T, D)."""
    h = norm(config, state, f"blocks.{layer}.norm_1", x)
    mask = causal_mask(document_T, forbidden_TT)
    return _attention(config, state, f"blocks.{layer}.attention.", layer, h, is_meta_T, position_T, mask)


def meta_branch(
    config: ModelConfig,
    state: State,
    layer: int,
    x: Tensor,
    is_meta_T: Tensor,
    position_T: Tensor,
    document_T: Tensor,
    forbidden_TT: Tensor | None = None,
) -> Tensor:
    """What the meta branch adds to the residual stream (T, D)."""
    both = is_meta_T[:, None] & is_meta_T[None, :]
    meta_mask = torch.zeros(both.shape, dtype=torch.float64).masked_fill(~both, -math.inf)
    h = norm(config, state, f"blocks.{layer}.norm_meta", x)
    prefix = f"blocks.{layer}.meta_attention."
    mask = causal_mask(document_T, forbidden_TT) + meta_mask
    return _attention(config, state, prefix, layer, h, is_meta_T, position_T, mask)


def _attention(
    config: ModelConfig,
    state: State,
    prefix: str,
    layer: int,
    h: Tensor,
    is_meta_T: Tensor,
    position_T: Tensor,
    mask: Tensor,
) -> Tensor:
    size = config.hidden_size // config.num_heads
    share = config.num_heads // config.num_key_value_heads
    q = linear(state, prefix + "q_proj", h)
    k = linear(state, prefix + "k_proj", h)
    v = linear(state, prefix + "v_proj", h)
    rotated = config.position == "rope" or (config.position == "rnope" and layer % 2 == 0)
    has_keys_T = (mask > -math.inf).any(dim=1)
    heads = []
    for head in range(config.num_heads):
        kv = head // share
        q_TK = q[:, head * size : (head + 1) * size]
        k_TK, v_TK = (y[:, kv * size : (kv + 1) * size] for y in (k, v))
        if config.qk_norm:
            q_TK = rms(q_TK, config.norm_eps) * state[prefix + "q_norm.weight"]
            k_TK = rms(k_TK, config.norm_eps) * state[prefix + "k_norm.weight"]
        if rotated:
            angle_position_T = position_T
            if config.zero_meta_positions:
                angle_position_T = torch.where(is_meta_T, torch.zeros_like(position_T), position_T)
            q_TK, k_TK = (rope(config, y, angle_position_T) for y in (q_TK, k_TK))
        score = q_TK @ k_TK.T / math.sqrt(size) + mask
        # A row of nothing but −∞ would be 0/0: give it any finite scores, then take exactly nothing from it.
        score = torch.where(has_keys_T[:, None], score, 0.0)
        weight = torch.softmax(score, dim=1) * has_keys_T[:, None]
        heads.append(weight @ v_TK)
    out = linear(state, prefix + "o_proj", torch.cat(heads, dim=1))
    return torch.where(has_keys_T[:, None], out, 0.0)


def rope(config: ModelConfig, x_TK: Tensor, position_T: Tensor) -> Tensor:
    """Rotate the pairs (i, i + R/2) of the first R channels by position · θ^(−2i/R)."""
    size = round(config.rotary_fraction * x_TK.shape[1])
    half = size // 2
    frequency, scale = frequencies(config, size)
    angle = position_T[:, None].to(torch.float32) * frequency[None, :]
    cos, sin = (torch.cos(angle) * scale).double(), (torch.sin(angle) * scale).double()
    a, b = x_TK[:, :half], x_TK[:, half:size]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x_TK[:, size:]), dim=1)


def frequencies(config: ModelConfig, size: int) -> tuple[Tensor, float]:
    """Angle a position of each pair, float32, and what multiplies cos and sin, by the YaRN paper (§2 and §3): γ = 0,
    a ramp, or 1 by the turns of a pair in the original window; the ramp over whole pairs, as in its code.
    """
    if config.position_scaling == "none":
        return config.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size), 1.0
    factor = config.position_scaling_factor
    plain = [config.rope_theta ** -(2 * pair / size) for pair in range(size // 2)]
    if config.position_scaling == "linear":
        return torch.tensor([value / factor for value in plain], dtype=torch.float32), 1.0
    if config.position_scaling == "ntk":
        base = config.rope_theta * factor ** (size / (size - 2))
        return torch.tensor([base ** -(2 * pair / size) for pair in range(size // 2)], dtype=torch.float32), 1.0
    bounds = []
    for turns in (config.yarn_beta_fast, config.yarn_beta_slow):
        # turns = window · theta^(−2i / size) / 2π, solved for i
        wavelength = config.original_max_position_embeddings / (2 * math.pi * turns)
        bounds.append(math.log(wavelength, config.rope_theta) * size / 2)
    low, high = max(0, math.floor(bounds[0])), min(size - 1, math.ceil(bounds[1]))
    found = []
    for pair, value in enumerate(plain):
        keep = 1.0 if pair <= low else 0.0 if pair >= high else 1 - (pair - low) / (high - low)
        found.append(keep * value + (1 - keep) * value / factor)
    scale = config.yarn_attention_factor * (1 + math.log(factor) / 10)
    return torch.tensor(found, dtype=torch.float32), scale


def norm(config: ModelConfig, state: State, prefix: str, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm over D."""
    if config.norm == "layernorm":
        x = x - x.mean(dim=-1, keepdim=True)
    y = rms(x, config.norm_eps) * state[prefix + ".weight"]
    return y + state[prefix + ".bias"] if prefix + ".bias" in state else y


def rms(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)


def linear(state: State, prefix: str, x: Tensor) -> Tensor:
    y = x @ state[prefix + ".weight"].T
    return y + state[prefix + ".bias"] if prefix + ".bias" in state else y


def mlp(config: ModelConfig, state: State, prefix: str, x: Tensor) -> Tensor:
    up = linear(state, prefix + "up_proj", x)
    if config.activation == "swiglu":
        gate = linear(state, prefix + "gate_proj", x)
        h = gate / (1 + torch.exp(-gate)) * up
    elif config.activation == "gelu":
        h = up * (1 + torch.erf(up / math.sqrt(2))) / 2
    else:
        h = up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))) / 2
    return linear(state, prefix + "down_proj", h)
