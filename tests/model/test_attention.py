"""Kernels: the choice between them, varlen bounds, and flash-attn's calling convention (with a stand-in on a CPU)."""

import copy
import importlib.machinery
import importlib.util
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megameta.model import DecodingCache, Documents, Mask, attention
from megameta.model.attention import attend_sdpa, choose_attention, find_flash, find_runs, has_varlen
from tests.support.models import (
    LENGTH,
    assert_close,
    make_documents,
    make_positions,
    make_tokens,
    small_config,
    small_model,
)


def attend_flash(*rows: Any, module: str = "flash_attn") -> Tensor:
    return attention.attend_flash(attention.load_flash(module), *rows)


class FakeFlash(types.ModuleType):
    """flash-attn's two functions by their documented contract, in float64, noting each call."""

    def __init__(self, name: str = "flash_attn") -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="a file")
        self.calls: list[str] = []

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, deterministic: bool = False
    ) -> Tensor:
        """(B, T, H, K) and twice (B, S, G, K); a causal mask is aligned to the bottom right corner."""
        self.calls.append(("causal" if causal else "full") + ", deterministic" * deterministic)
        self._check(q, k, v, 4)
        return torch.stack([_dense(*rows, causal) for rows in zip(q, k, v)])

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        causal: bool = False,
        deterministic: bool = False,
    ) -> Tensor:
        """(rows, H, K): sequences one after another, whose bounds are int32 with 0 and the number of rows in them."""
        self.calls.append("varlen" + ", deterministic" * deterministic)
        self._check(q, k, v, 3)
        for bounds, rows, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
            assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(rows)
            assert isinstance(longest, int) and longest >= bounds.diff().max()
        parts = zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist())
        return torch.cat([_dense(q[a:b], k[a:b], v[a:b], causal) for a, b in parts])

    def _check(self, q: Tensor, k: Tensor, v: Tensor, ndim: int) -> None:
        for x in (q, k, v):
            assert x.dtype in (torch.float16, torch.bfloat16) and x.ndim == ndim and x.stride(-1) == 1
        assert q.shape[-2] % k.shape[-2] == 0 and k.shape == v.shape


def _dense(q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, causal: bool) -> Tensor:
    share = q_THK.shape[1] // k_SGK.shape[1]
    k, v = (x.double().repeat_interleave(share, dim=1) for x in (k_SGK, v_SGK))
    score = torch.einsum("thk,shk->hts", q_THK.double(), k) / math.sqrt(q_THK.shape[-1])
    if causal:
        hidden = torch.ones(score.shape[1:], dtype=torch.bool).triu(1 + len(k) - len(q_THK))
        score = score.masked_fill(hidden, -math.inf)
    return torch.einsum("hts,shk->thk", score.softmax(-1), v).to(q_THK.dtype)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFlash]:
    module = FakeFlash()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    yield module


def qkv(kv_heads: int, rows: int = LENGTH, queries: int = LENGTH, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, queries, 4, 8), (4, rows, kv_heads, 8), (4, rows, kv_heads, 8)]
    return [torch.randn(s, generator=generator).to(dtype).transpose(1, 2) for s in shapes]  # as projections give them


def document_mask(document: Tensor) -> Mask:
    return Mask(documents=Documents(document))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["causal", "packed", "left_pad", "right_pad", "one_row"])
def test_flash_equals_sdpa(kind: str, kv_heads: int, flash: FakeFlash) -> None:
    q, k, v = qkv(kv_heads, queries=1 if kind == "one_row" else LENGTH)
    document = make_documents(kind) if kind not in ("causal", "one_row") else None
    mask = Mask(causal=kind == "causal") if document is None else document_mask(document)
    out = attend_flash(q, k, v, mask)
    assert flash.calls == [{"causal": "causal", "one_row": "full"}.get(kind, "varlen")]
    expected = attend_sdpa(q.double(), k.double(), v.double(), mask)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, 1e-2, kind)


@pytest.mark.parametrize("module", attention.FLASH)
def test_every_flash_equals_sdpa(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 4 returns the logarithms of sums, too, and has other arguments in between."""
    flash = FakeFlash(module)
    if module == "flash_attn.cute":
        for name in ("flash_attn_func", "flash_attn_varlen_func"):
            function = getattr(flash, name)
            monkeypatch.setattr(flash, name, lambda q, k, v, *, f=function, **options: (f(q, k, v, **options), None))
    monkeypatch.setitem(sys.modules, module, flash)
    q, k, v = qkv(2)
    for mask in (Mask(causal=True), Mask(causal=False), document_mask(make_documents("packed"))):
        expected = attend_sdpa(q.double(), k.double(), v.double(), mask)
        assert_close(attend_flash(q, k, v, mask, module=module), expected, 1e-2, module)
    assert flash.calls == ["causal", "full", "varlen"]


def test_a_flash_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_flash", lambda: "flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # an import of it fails
    with pytest.raises(
        ImportError, match=r"flash-attn 3 is installed but does not load .*set model.attention_backend=sdpa"
    ):
        small_model(small_config(attention_backend="flash"))


def test_a_model_with_flash_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None, origin="a file")
    module.flash_attn_func = module.flash_attn_varlen_func = small_model  # a function, as the package has
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    model = small_model(small_config(attention_backend="flash"))
    assert copy.deepcopy(model).blocks[0].attention.name == "flash-attn 2"


@pytest.mark.parametrize(
    ("files", "by_capability"),
    [
        ([], {}),
        (["flash_attn/__init__.py"], dict.fromkeys((8, 9, 10, 11, 12, None), "flash_attn")),
        (["flash_attn_interface.py"], {9: "flash_attn_interface"}),
        # Version 4 alone: the folder is there, and version 2 is not.
        (["flash_attn/cute/__init__.py"], dict.fromkeys((9, 10, 11), "flash_attn.cute")),
        (
            ["flash_attn/__init__.py", "flash_attn/cute/__init__.py", "flash_attn_interface.py"],
            {
                **dict.fromkeys((8, 12, None), "flash_attn"),
                9: "flash_attn_interface",
                **dict.fromkeys((10, 11), "flash_attn.cute"),
            },
        ),
    ],
)
def test_which_flash_is_taken(
    files: list[str], by_capability: dict[int | None, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("flash_attn") or importlib.util.find_spec("flash_attn_interface"):
        pytest.skip("flash-attn is installed, and would be found beside the test's")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for capability in (8, 9, 10, 11, 12, None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=capability is not None: there)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda major=capability: (major, 0))
        assert find_flash() == by_capability.get(capability), capability


def test_flash_is_told_to_be_deterministic(flash: FakeFlash) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for mask in (Mask(causal=True), document_mask(make_documents("packed"))):
            attend_flash(*qkv(4), mask)
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash.calls == ["causal, deterministic", "varlen, deterministic"]


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("kind", ["packed", "left_pad"])
def test_varlen_equals_a_mask(kind: str, kv_heads: int, flash: FakeFlash, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel by its documented contract, of which flash-attn's has all but the names."""

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa or q.shape[1] == k.shape[1]
        return flash.flash_attn_varlen_func(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, causal=window_size == (-1, 0))

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    q, k, v = qkv(kv_heads)
    documents = Documents(make_documents(kind))
    out = attention._attend_varlen(q, k, v, documents.runs)
    assert_close(out, attend_sdpa(q.double(), k.double(), v.double(), Mask(documents=documents)), 1e-2, kind)


def test_varlen_is_taken_where_it_can_do_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(capability: int = 9) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
        return has_varlen.__wrapped__()

    assert found() and found(8) and not found(7)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda *rows, is_causal=False: None)  # torch 2.10
    assert not found()
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert not found()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_flash_falls_back_for_wide_dtypes(dtype: torch.dtype, flash: FakeFlash) -> None:
    q, k, v = qkv(2, dtype=dtype)
    for mask in (Mask(causal=True), document_mask(make_documents("packed"))):
        assert torch.equal(attend_flash(q, k, v, mask), attend_sdpa(q, k, v, mask))
    assert flash.calls == []


def test_flash_falls_back_for_cache_masks(flash: FakeFlash) -> None:
    """A chunk after a cache: the mask is neither causal from the first row nor one of documents alone."""
    q, k, v = qkv(2, queries=3)
    allowed = torch.ones(1, 3, LENGTH, dtype=torch.bool).tril(LENGTH - 3)
    out = attend_flash(q, k, v, Mask(causal=False, explicit_BTS=allowed))
    assert flash.calls == []
    assert_close(out, attend_sdpa(q.double(), k.double(), v.double(), Mask(False, allowed)), 1e-2, "cache")


@pytest.mark.parametrize("documents", ["one", "packed", "left_pad"])
def test_flash_in_the_model(documents: str, flash: FakeFlash) -> None:
    """The whole model in bfloat16: as near to float64 through flash as through sdpa, gradients too; then decoding."""
    config = small_config(num_key_value_heads=2)
    token, document = make_tokens(config, "ragged"), make_documents(documents)
    position = make_positions("restart", document)
    given_ = {"document_BT": document, "position_BT": position}
    exact = small_model(config)(token, **given_)
    errors = {}
    for backend in ("sdpa", "flash"):
        model = small_model(small_config(num_key_value_heads=2, attention_backend=backend), torch.bfloat16)
        name = {"sdpa": "sdpa", "flash": "flash-attn 2"}[backend]
        assert model.blocks[0].attention.name == model.blocks[0].meta_attention.name == name
        logits = model(token, **given_)
        logits.float().square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        errors[backend] = (logits.double() - exact).abs().max() / exact.abs().max()
        calls, flash.calls = flash.calls, []
    # Causal attention and the branch in each of two layers.
    assert calls == ["causal" if documents == "one" else "varlen"] * 4
    assert errors["flash"] < 2 * errors["sdpa"] + 1e-3 < 0.05, errors
    cache = DecodingCache()
    with torch.no_grad():
        parts = [
            model(
                token[:, a:b],
                position_BT=position[:, a:b],
                document_BT=None if document is None else document[:, a:b],
                cache=cache,
            )
            for a, b in ((0, 6), (6, 7), (7, 11), (11, 13))
        ]
    assert (torch.cat(parts, dim=1).double() - exact).abs().max() / exact.abs().max() < 0.05


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(-1, 2), min_size=5, max_size=5), min_size=1, max_size=4))
def test_runs_of_documents(rows: list[list[int]]) -> None:
    document = torch.tensor(rows)
    bounds, longest = find_runs(document)
    assert bounds.dtype == torch.int32 and len(bounds) == attention.FEWEST_RUNS + 1
    expected, flat = [0], [(i, d) for i, row in enumerate(rows) for d in row]
    for at in range(1, len(flat)):
        if flat[at] != flat[at - 1]:
            expected.append(at)
    assert bounds.tolist() == expected + [len(flat)] * (len(bounds) - len(expected))
    assert longest == 5, "a bound: all of a short sequence"


@pytest.mark.parametrize(
    ("sizes", "runs", "longest"),
    [
        ([300] * 20, 256, 1024),
        ([1025, 1975], 256, 2048),
        ([20] * 300, 512, 1024),
        ([6000], 256, 6000),
        ([1] * 1025, 2048, 1024),
    ],
)
def test_runs_and_their_bound_take_few_values(sizes: list[int], runs: int, longest: int) -> None:
    document = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[None]
    found = find_runs(document)
    assert (len(found.bounds_N), found.longest) == (runs + 1, longest)
    assert found.bounds_N.diff()[: len(sizes)].tolist() == sizes


def test_flash_that_is_missing_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(ImportError, match=r"pip install flash-attn"):
        choose_attention("flash")
    with pytest.raises(ImportError, match=r"attention_backend=sdpa"):
        small_model(small_config(attention_backend="flash"))
    assert choose_attention("auto") == choose_attention("sdpa") == ("sdpa", attend_sdpa)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_long_sequences_go_document_by_document(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same outputs and gradients as with a dense mask; documents of one row, other ones in each sequence."""
    length, generator = attention.BY_DOCUMENT, torch.Generator().manual_seed(0)
    document = torch.stack([torch.arange(length) // 700, torch.cat((torch.arange(5), torch.full((length - 5,), 9)))])
    shapes = [(2, heads, length, 8) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    taken: list[Tensor] = []
    by_document = attention._attend_by_document
    monkeypatch.setattr(attention, "_attend_by_document", lambda *x: (taken.append(x[0]), by_document(*x))[1])
    results = []
    for threshold in (length, length + 1):
        monkeypatch.setattr(attention, "BY_DOCUMENT", threshold)
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend_sdpa(*leaves, document_mask(document))
        out.square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    assert len(taken) == 1, "from this length on, and not below"
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_nothing_is_as_large_as_rows_times_rows_where_nothing_reads_it() -> None:
    """Forward and backward of a whole model on long sequences of documents."""
    length = attention.BY_DOCUMENT
    config = small_config(max_position_embeddings=length)
    model = small_model(config, torch.float32)
    token = make_tokens(config, "one", batch=1, length=length)
    token[0, ::10] = config.meta_token_id
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
            return out

    with Watch():
        model(token, document_BT=torch.arange(length)[None] // 500).square().mean().backward()
    assert length * config.hidden_size < largest < length * length / 8


def test_auto_takes_flash_only_with_a_gpu(flash: FakeFlash, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_attention("flash")[0] == "flash-attn 2"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_attention("auto") == ("sdpa", attend_sdpa)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert choose_attention("auto")[0] == "flash-attn 2"
    assert choose_attention("sdpa") == ("sdpa", attend_sdpa)
