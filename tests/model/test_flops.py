"""forward_flops against torch's FlopCounterMode, and the branch's share of the arithmetic (spec §2).

The counter knows matrix products and a GPU's attention kernels; on a CPU it misses the fused one, so attention runs as
sdpa's plain mathematics here, whose two products it counts in full, not halved for causality: the formula's convention.
"""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megameta.model import GPT, ModelConfig
from megameta.model.flops import forward_flops
from tests.support.models import small_config, small_model


def counted(model: GPT, batch: int, length: int, num_meta: int, *, backward: bool = False) -> float:
    """Flops of one sequence, by torch's counter."""
    token = torch.randint(12, 30, (batch, length))
    for row in range(batch):
        token[row, torch.randperm(length)[:num_meta]] = model.config.meta_token_id
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(token)
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / batch


@pytest.mark.parametrize("num_meta", [1, 10, 48])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"meta_attention": False},
        {"meta_layers": (1,), "num_layers": 3},
        {"activation": "swiglu"},
        {"num_key_value_heads": 1},
        {"bias": True, "qk_norm": True, "norm": "rmsnorm", "position": "ape", "num_layers": 3},
        {"tie_embeddings": False, "parallel_residual": True, "hidden_size": 64, "intermediate_size": 256},
    ],
    ids=str,
)
def test_formula_counts_what_torch_counts(changes: dict[str, Any], num_meta: int) -> None:
    config = small_config(**changes)
    model = small_model(config, torch.float32, vocab_multiple=64)
    expected = forward_flops(config, 48, num_meta)
    assert counted(model, 2, 48, num_meta) == pytest.approx(expected, rel=1e-3)


def test_backward_costs_twice_the_forward() -> None:
    config = small_config(num_key_value_heads=2)
    model = small_model(config, torch.float32, vocab_multiple=64)
    total = counted(model, 2, 48, 5, backward=True)
    assert total == pytest.approx(3 * forward_flops(config, 48, 5), rel=1e-3)


def test_fewer_rows_cost_less() -> None:
    config = small_config()
    costs = [forward_flops(config, 64, m) for m in (0, 1, 6.4, 64)]
    assert costs == sorted(costs) and costs[0] < costs[1]
    assert costs[0] == forward_flops(small_config(meta_attention=False), 64, 64)


def test_share_of_the_branch_at_the_papers_shape() -> None:
    """spec §2: 1.031 per layer and 1.022 with the head, with attention halved for causality.

    Counted in full, as ``forward_flops`` does, the same shape gives 1.029 and 1.021: both are held here.
    """
    length, num_meta, rows = 1024, 102, 50304
    both = ModelConfig(vocab_size=rows)
    twin = ModelConfig(vocab_size=rows, meta_attention=False)

    def products_of_scores(n: float) -> float:
        """The part of a layer's attention that causality halves: twice n × n × D, from the formula's own curvature."""
        curvature = forward_flops(twin, 2 * int(n), 0) - 2 * forward_flops(twin, int(n), 0)
        return curvature / 2 / twin.num_layers

    assert products_of_scores(length) == 2 * 2 * length**2 * 768
    head = 2 * length * 768 * rows
    full_both, full_twin = (forward_flops(c, length, num_meta) for c in (both, twin))
    assert full_both / full_twin == pytest.approx(1.021, abs=5e-4)
    assert (full_both - head) / (full_twin - head) == pytest.approx(1.029, abs=5e-4)
    half = 12 * products_of_scores(length) / 2
    half_meta = 12 * products_of_scores(num_meta) / 2
    half_both, half_twin = full_both - half - half_meta, full_twin - half
    assert half_both / half_twin == pytest.approx(1.022, abs=5e-4)
    assert (half_both - head) / (half_twin - head) == pytest.approx(1.031, abs=5e-4)
