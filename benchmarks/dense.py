"""The paper's dense form of the meta branch, for comparison: projections of all T rows, a T × T mask a sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megameta.model import GPT, Context
from megameta.model.rope import rotate


def dense_add_meta(block: torch.nn.Module, context: Context, x_BTD: Tensor) -> Tensor:
    """x + softmax(Q Kᵀ / √K + C + P) V over all rows, zero where a row is no meta-token."""
    attention, is_meta = block.meta_attention, context.is_meta_BT
    h_BTD = block.norm_meta(x_BTD)
    q, k, v = (
        projection(h_BTD).unflatten(-1, (-1, attention.head_size)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if context.rotation is not None:
        q, k = rotate(q, context.rotation), rotate(k, context.rotation)
    both = is_meta[:, :, None] & is_meta[:, None, :]
    causal = torch.ones(both.shape[1:], dtype=torch.bool, device=both.device).tril()
    # A row without keys would be NaN; its own key is let in, and its output thrown away.
    allowed = (both & causal) | torch.eye(both.shape[1], dtype=torch.bool, device=both.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
    out = attention.o_proj(out.transpose(1, 2).flatten(2))
    return x_BTD + torch.where(is_meta[..., None], out, 0)


def make_dense(model: GPT) -> GPT:
    """Switch a model's blocks to the dense form, in place."""
    for block in model.blocks:
        if block.parallel_residual:
            raise ValueError("the dense form is that of a sequential residual")

        def forward(x_BTD: Tensor, context: Context, cache: None = None, block: torch.nn.Module = block) -> Tensor:
            out_BTD = x_BTD + block.attention(block.norm_1(x_BTD), context.rotation, context.mask)
            out_BTD = dense_add_meta(block, context, out_BTD)
            return out_BTD + block.mlp(block.norm_2(out_BTD))

        block.forward = forward
    return model
