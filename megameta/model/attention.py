"""Multi-head attention, used by the causal and by the meta branch alike, over interchangeable kernels.

Letters: B batch, T query rows, S key rows, H query heads, G key–value heads, K head width, D model width. H and G
follow from the projections' widths, so that a tensor-parallel shard of the projections is a shard of the heads.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megameta.model.config import ModelConfig
from megameta.model.rope import Rotation, rotate

#: Dtypes that flash-attention kernels take.
HALVES = (torch.float16, torch.bfloat16)
#: Major CUDA compute capability from which torch's kernel for sequences of many lengths works.
VARLEN_CAPABILITY = 8
#: From this length on sdpa goes through a CPU's documents one by one, where kernels are slow and starts of them cheap.
#: A mask costs T² in time, and as a float copy that torch keeps for each layer's backward pass.
BY_DOCUMENT = 2048
#: Code that torch.compile makes is made anew for each number of runs and each bound of their length, so both are powers
#: of two, from these on.
FEWEST_RUNS, SHORTEST_BOUND = 256, 1024


#: flash-attn's packages by module, and which of them to take by a GPU's compute capability, the first that is there: 3
#: is made for Hopper; 4 for Blackwell, and younger elsewhere; on others there is 2.
FLASH = {"flash_attn": "flash-attn 2", "flash_attn_interface": "flash-attn 3", "flash_attn.cute": "flash-attn 4"}
FLASH_ON = {
    9: ("flash_attn_interface", "flash_attn", "flash_attn.cute"),
    10: ("flash_attn.cute", "flash_attn"),
    11: ("flash_attn.cute", "flash_attn"),
}


class Runs(NamedTuple):
    """Runs of neighbouring rows of one document; no run reaches from one sequence into the next."""

    bounds_N: Tensor
    """First row of each run in the flattened (B · T), then the number of all rows, again and again: int32. Runs
    of no rows, at the end, change nothing."""
    longest: int
    """No run is longer."""


def find_runs(document_BT: Tensor) -> Runs:
    """The runs of a batch's documents; of a tensor on a GPU, the host waits for it."""
    start_BT = torch.ones_like(document_BT, dtype=torch.bool)
    start_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    start_N = start_BT.flatten().nonzero().flatten()
    padding = _power_of_two(len(start_N), FEWEST_RUNS) + 1 - len(start_N)
    bounds_N = F.pad(start_N, (0, padding), value=document_BT.numel()).to(torch.int32)
    longest = _power_of_two(int(bounds_N.diff().max()), SHORTEST_BOUND)
    return Runs(bounds_N, min(longest, document_BT.shape[1]))


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << max(number - 1, 0).bit_length())


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of rows that attend inside them. What a kernel reads of them is made when first asked for."""

    document_BT: Tensor
    """Any numbers; the rows of a document are neighbours (of padding they may not be: nobody reads what it sees)."""
    known_runs: Runs | None = None
    """Where they are known beforehand."""
    has_varlen: bool = False
    """Whether torch has a kernel that goes by runs where the rows are."""

    @property
    def runs(self) -> Runs:
        """What kernels for sequences of many lengths go by."""
        # A compiler cannot enter the lock that a cached property has before Python 3.12.
        return self._found_runs if self.known_runs is None else self.known_runs

    @cached_property
    def _found_runs(self) -> Runs:
        return find_runs(self.document_BT)

    @cached_property
    def allowed_BTS(self) -> Tensor:
        """Which rows are of the same document and not later: T² a sequence, for kernels that need a mask."""
        return same_document(self.document_BT)


def same_document(document_BT: Tensor) -> Tensor:
    """Whether row T sees row S: it is of the same document and not later. Bool (B, T, S)."""
    row_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    return (row_T[None, :] <= row_T[:, None]) & (document_BT[:, :, None] == document_BT[:, None, :])


@dataclass(frozen=True)
class Mask:
    """Who attends to whom: as ``explicit_BTS`` says; without it all rows, or if ``causal`` those that are not later,
    and of the same document where there are ``documents`` (always causal)."""

    causal: bool = True
    explicit_BTS: Tensor | None = None
    documents: Documents | None = None

    @property
    def allowed_BTS(self) -> Tensor | None:
        """The mask as a bool tensor (B or 1, T, S); None where ``causal`` says it all."""
        if self.documents is None:
            return self.explicit_BTS
        # A compiler would take the kept one for an input that comes and goes.
        compiling = torch.compiler.is_compiling()
        return same_document(self.documents.document_BT) if compiling else self.documents.allowed_BTS


#: (q_BHTK, k_BGSK, v_BGSK, mask) -> o_BHTK, softmax(q kᵀ / √K) v over the rows that the mask allows.
Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
#: appends to a cache: (k_BGTK, v_BGTK) -> all keys and values so far
CacheUpdate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def attend_sdpa(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Mask) -> Tensor:
    """torch's scaled_dot_product_attention, on any device and dtype; documents by torch's varlen_attn where it can."""
    if mask.documents is not None:
        if mask.documents.has_varlen and q_BHTK.dtype in HALVES:
            return _attend_varlen(q_BHTK, k_BGSK, v_BGSK, mask.documents.runs)
        is_long = q_BHTK.device.type == "cpu" and q_BHTK.shape[2] >= BY_DOCUMENT
        # Not while compiling: each division into documents would make code of its own.
        if is_long and not torch.compiler.is_compiling():
            return _attend_by_document(q_BHTK, k_BGSK, v_BGSK, mask.documents.runs)
    allowed_BTS = mask.allowed_BTS
    allowed = allowed_BTS[:, None] if allowed_BTS is not None else None
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    causal = mask.causal and allowed is None
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=allowed, is_causal=causal, enable_gqa=grouped
    )


@cache
def has_varlen() -> bool:
    """Whether torch has an attention kernel for sequences of many lengths that works on the GPU here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    # torch 2.10 has one without them.
    has_options = {"window_size", "enable_gqa"} <= set(varlen_attn.__kwdefaults__ or ())
    return has_options and torch.cuda.get_device_capability()[0] >= VARLEN_CAPABILITY


def _attend_varlen(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, runs: Runs) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTK, k_BGTK, v_BGTK))
    grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
    bounds, longest = runs
    # (-1, 0): any number of rows to the left and none to the right, which is causal.
    attend: Callable[..., Tensor] = varlen_attn  # type: ignore[assignment]  # one tensor, where no more is asked for
    out = attend(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
    return out.unflatten(0, (q_BHTK.shape[0], q_BHTK.shape[2])).transpose(1, 2)


def _attend_by_document(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, runs: Runs) -> Tensor:
    """Causal attention inside each run."""
    grouped, length = q_BHTK.shape[1] != k_BGTK.shape[1], q_BHTK.shape[2]
    sizes: list[list[int]] = [[] for _ in q_BHTK]
    for start, size in zip(runs.bounds_N[:-1].tolist(), runs.bounds_N.diff().tolist(), strict=True):
        if size:
            sizes[start // length].append(size)
    out = []
    for row, sizes_of_row in enumerate(sizes):
        parts = zip(*(x[row : row + 1].split(sizes_of_row, dim=2) for x in (q_BHTK, k_BGTK, v_BGTK)), strict=True)
        runs_of_row = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped) for q, k, v in parts]
        out.append(torch.cat(runs_of_row, dim=2))
    return torch.cat(out)


class FlashKernels(NamedTuple):
    """The two functions of a flash-attn package. (Not the package: a model that holds one could not be copied.)"""

    dense: Callable[..., Any]
    varlen: Callable[..., Any]


def load_flash(module: str) -> FlashKernels:
    """Of a package in ``FLASH``.

    Raises:
        ImportError: with the remedy.
    """
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{FLASH[module]} is installed but does not load ({error}): install one that is built for torch"
            f" {torch.__version__}, or set model.attention_backend=sdpa"
        ) from error
    return FlashKernels(package.flash_attn_func, package.flash_attn_varlen_func)


def attend_flash(kernels: FlashKernels, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Mask) -> Tensor:
    """flash-attn: causal, causal within documents (varlen), or all rows; other masks and dtypes fall to sdpa."""
    if q_BHTK.dtype not in HALVES or mask.explicit_BTS is not None:
        return attend_sdpa(q_BHTK, k_BGSK, v_BGSK, mask)
    q, k, v = (x.transpose(1, 2) for x in (q_BHTK, k_BGSK, v_BGSK))
    options: dict[str, Any] = {"causal": mask.causal}
    if torch.are_deterministic_algorithms_enabled():  # it does not ask torch, and would add up in any order
        options["deterministic"] = True
    if mask.documents is None:
        out = kernels.dense(q, k, v, **options)
    else:
        bounds, longest = mask.documents.runs
        options |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
        out = kernels.varlen(*(x.flatten(0, 1) for x in (q, k, v)), **options)
    out = out[0] if isinstance(out, tuple) else out  # with the logarithms of sums
    return out.view(q.shape).transpose(1, 2)


def find_flash() -> str | None:
    """The module of the flash-attn package to be used on this machine's GPU: of those that are installed the one that
    is made for it. None: none is. Nothing is imported."""
    installed = []
    if importlib.util.find_spec("flash_attn_interface") is not None:
        installed.append("flash_attn_interface")
    package = importlib.util.find_spec("flash_attn")
    if package is not None:
        # Version 4 puts itself into the folder of version 2, whether that is there or not.
        installed += ["flash_attn"] if package.origin is not None else []
        folders = package.submodule_search_locations or []
        installed += ["flash_attn.cute"] if any(Path(folder, "cute").is_dir() for folder in folders) else []
    capability = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    wanted = FLASH_ON.get(capability, ("flash_attn",))
    return next((module for module in wanted if module in installed), None)


def choose_attention(backend: str) -> tuple[str, Attend]:
    """The kernel by name; ``auto`` picks. Returns its name too, for the log.

    Raises:
        ImportError: flash is asked for and missing, or does not load.
    """
    wants_flash = backend == "flash" or (backend == "auto" and torch.cuda.is_available())
    module = find_flash() if wants_flash else None
    if backend == "flash" and module is None:
        raise ImportError(
            "model.attention_backend is flash, but no flash-attn for this machine's GPU is installed:"
            " pip install flash-attn --no-build-isolation, or set model.attention_backend=sdpa"
        )
    if module is not None:
        return FLASH[module], partial(attend_flash, load_flash(module))
    return "sdpa", attend_sdpa


def product_dtype(x: Tensor) -> torch.dtype:
    """In what linear layers multiply x: autocast's dtype where that is on."""
    kind = x.device.type
    # Autocast leaves float64 alone, and does not know the device of shapes without values.
    if x.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


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
        x_BTD = x_BTD.to(product_dtype(x_BTD))  # once; each projection would make and keep a copy of its own
        q_BHTK, k_BGTK, v_BGTK = (
            projection(x_BTD).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            # In the dtype of the weights, for which there is one fused kernel; torch has none for mixed ones.
            q_BHTK = self.q_norm(q_BHTK.to(self.q_norm.weight.dtype))
            k_BGTK = self.k_norm(k_BGTK.to(self.k_norm.weight.dtype))
        if self.uses_rope and rotation is not None:
            q_BHTK, k_BGTK = rotate(q_BHTK, rotation), rotate(k_BGTK, rotation)
        # A norm under autocast may have returned float32; kernels want one dtype.
        q_BHTK, k_BGTK = q_BHTK.to(v_BGTK.dtype), k_BGTK.to(v_BGTK.dtype)
        if update is not None:
            k_BGTK, v_BGTK = update(k_BGTK, v_BGTK)
        o_BHTK = self.attend(q_BHTK, k_BGTK, v_BGTK, mask)
        return self.o_proj(o_BHTK.transpose(1, 2).flatten(2))
