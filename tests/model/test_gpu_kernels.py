"""Attention kernels that need a CUDA device, against a mask in float64. Without packages that a GPU's image lacks."""

import pytest
import torch

from megameta.model.attention import Documents, Mask, attend_sdpa, choose_attention, find_flash, has_varlen
from tests.support.models import LENGTH, assert_close, make_documents


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("kind", ["causal", "packed", "left_pad"])
@pytest.mark.parametrize("kernel", ["flash-attn", "torch's"])
def test_real_kernels_equal_a_mask(kernel: str, kind: str, kv_heads: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: attention kernels are compared on a GPU only")
    if kernel == "flash-attn" and find_flash() is None:
        pytest.skip("flash-attn is not installed: pip install flash-attn --no-build-isolation")
    if kernel != "flash-attn" and kind != "causal" and not has_varlen():
        pytest.skip("torch has no varlen_attn here: torch 2.11 and compute capability 8 are needed")
    generator = torch.Generator().manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    inputs = [torch.randn(4, LENGTH, h, 64, generator=generator).cuda().bfloat16().transpose(1, 2) for h in heads]
    document = None if kind == "causal" else make_documents(kind).cuda()
    mask = Mask(causal=True) if document is None else Mask(documents=Documents(document, has_varlen=has_varlen()))
    results = []
    attend_halves = choose_attention("flash" if kernel == "flash-attn" else "sdpa")[1]
    for attend, dtype in ((attend_halves, torch.bfloat16), (attend_sdpa, torch.float64)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        out = attend(*leaves, mask)
        out.double().square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results):
        assert_close(got.cpu(), expected.cpu(), 2e-2, kind)
