"""Multi-head attention, used by the causal and by the meta branch alike, over interchangeable kernels.

Letters: B batch, T query rows, S key rows, H query heads, G key–value heads, K head width, D model width. H and G
follow from the projections' widths, so that a tensor-parallel shard of the projections is a shard of the heads.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megameta.model.config import ModelConfig
from megameta.model.context import Mask
from megameta.model.rope import Rotation, rotate

#: (q_BHTK, k_BGSK, v_BGSK, mask) -> o_BHTK, softmax(q kᵀ / √K) v over the rows that the mask allows.
Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
#: appends to a cache: (k_BGTK, v_BGTK) -> all keys and values so far
CacheUpdate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


#: From this length on sdpa goes through a CPU's documents one by one, where kernels are slow and starts of them cheap.
#: A mask costs T² in time, and as a float copy that torch keeps for each layer's backward pass.
BY_DOCUMENT = 2048


def attend_sdpa(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Mask) -> Tensor:
    """torch's scaled_dot_product_attention, on any device and dtype."""
    is_long = q_BHTK.device.type == "cpu" and q_BHTK.shape[2] >= BY_DOCUMENT
    # Not while compiling: each division into documents would make code of its own.
    if mask.document_BT is not None and is_long and not torch.compiler.is_compiling():
        return _attend_by_document(q_BHTK, k_BGSK, v_BGSK, mask.document_BT)
    allowed = mask.allowed_BTS[:, None] if mask.allowed_BTS is not None else None
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=allowed, is_causal=mask.causal, enable_gqa=grouped
    )


def _attend_by_document(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, document_BT: Tensor) -> Tensor:
    """Causal attention inside each run of rows of one document."""
    grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
    out = []
    for row, document_T in enumerate(document_BT.expand(len(q_BHTK), -1)):
        sizes = segment_bounds(document_T[None])[0].diff().tolist()
        runs = zip(*(x[row : row + 1].split(sizes, dim=2) for x in (q_BHTK, k_BGTK, v_BGTK)), strict=True)
        parts = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped) for q, k, v in runs]
        out.append(torch.cat(parts, dim=2))
    return torch.cat(out)


def segment_bounds(document_BT: Tensor) -> tuple[Tensor, int]:
    """Bounds of the runs of equal documents in the flattened rows, int32, and the longest run (varlen kernels)."""
    start_BT = torch.ones_like(document_BT, dtype=torch.bool)
    start_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    start = start_BT.flatten().nonzero().flatten().to(torch.int32)
    bounds = torch.cat((start, start.new_tensor([document_BT.numel()])))
    return bounds, int(bounds.diff().max())


def attend_flash(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Mask) -> Tensor:
    """flash-attn 2: causal, causal within documents (varlen), or all rows; other masks and dtypes fall to sdpa."""
    if q_BHTK.dtype not in (torch.float16, torch.bfloat16) or (
        mask.allowed_BTS is not None and mask.document_BT is None
    ):
        return attend_sdpa(q_BHTK, k_BGSK, v_BGSK, mask)
    try:  # inside a try, because transformers refuses remote code whose other imports cannot all be satisfied
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    except ImportError as error:
        raise ImportError(f"flash-attn is installed but does not load: {error}") from error

    q, k, v = (x.transpose(1, 2) for x in (q_BHTK, k_BGSK, v_BGSK))
    if mask.document_BT is None:
        return flash_attn_func(q, k, v, causal=mask.causal).transpose(1, 2)
    bounds, longest = segment_bounds(mask.document_BT)
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    out = flash_attn_varlen_func(*rows, bounds, bounds, longest, longest, causal=True)
    return out.view(q.shape).transpose(1, 2)


def choose_attention(backend: str) -> tuple[str, Attend]:
    """The kernel by name; ``auto`` picks. Returns its name too, for the log.

    Raises:
        ImportError: flash is asked for and missing.
    """
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if backend == "flash" and not has_flash:
        raise ImportError(
            "model.attention_backend is flash, but flash-attn is not installed:"
            " pip install flash-attn --no-build-isolation, or set model.attention_backend=sdpa"
        )
    if backend == "flash" or (backend == "auto" and has_flash and torch.cuda.is_available()):
        return "flash", attend_flash
    return "sdpa", attend_sdpa


class Attention(nn.Module):
    """Query, key, value and output projections around a kernel. ``name`` is the kernel that was picked."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, key_value_width = config.hidden_size, config.num_key_value_heads * config.head_size
        self.q_proj = nn.Linear(width, width, bias=config.bias)
        self.k_proj = nn.Linear(width, key_value_width, bias=config.bias)
        self.v_proj = nn.Linear(width, key_value_width, bias=config.bias)
        self.o_proj = nn.Linear(width, width, bias=config.bias)
        self.q_norm = nn.RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None
        self.head_size = config.head_size
        self.uses_rope = config.layer_uses_rope(layer)
        self.name, self.attend = choose_attention(config.attention_backend)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation | None, mask: Mask, update: CacheUpdate | None = None
    ) -> Tensor:
        """(B, T, D) to (B, T, D); with ``update``, keys and values join a cache and all of it is attended to."""
        q_BHTK, k_BGTK, v_BGTK = (
            projection(x_BTD).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BHTK, k_BGTK = self.q_norm(q_BHTK), self.k_norm(k_BGTK)
        if self.uses_rope and rotation is not None:
            q_BHTK, k_BGTK = rotate(q_BHTK, rotation), rotate(k_BGTK, rotation)
        # A norm under autocast may have returned float32; kernels want one dtype.
        q_BHTK, k_BGTK = q_BHTK.to(v_BGTK.dtype), k_BGTK.to(v_BGTK.dtype)
        if update is not None:
            k_BGTK, v_BGTK = update(k_BGTK, v_BGTK)
        o_BHTK = self.attend(q_BHTK, k_BGTK, v_BGTK, mask)
        return self.o_proj(o_BHTK.transpose(1, 2).flatten(2))
