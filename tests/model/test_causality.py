"""No row sees what comes after it, nor another document, through either branch.

Changed text leaves earlier logits bitwise the same. Where the number of meta-tokens changes, so do the shapes of the
compact matrices, and matrix kernels may then sum in another order: 1e-12 of the largest logit in float64.
"""

import pytest
import torch
from torch import Tensor

from megameta.model import GPT, make_context
from tests.support.models import (
    BATCH,
    LENGTH,
    assert_close,
    make_documents,
    make_positions,
    make_tokens,
    small_config,
    small_model,
)

META = 11


def changed(token: Tensor, start: int, kind: str) -> Tensor:
    """Every row from ``start`` on is changed; text→text changes no meta-token, the others change each in question."""
    tail = token[:, start:]
    is_meta = tail == META
    other = (tail + 5) % 37
    new = {
        "text_to_text": torch.where(is_meta, tail, torch.where(other == META, 0, other)),
        "text_to_meta": torch.full_like(tail, META),
        "meta_to_text": torch.where(is_meta, 3, tail),
        "anything": torch.where(is_meta, 3, META),
    }[kind]
    assert (new != tail).any()
    return torch.cat((token[:, :start], new), dim=1)


@pytest.mark.parametrize("documents", ["one", "packed", "left_pad"])
@pytest.mark.parametrize("kind", ["text_to_text", "text_to_meta", "meta_to_text", "anything"])
@pytest.mark.parametrize("position", ["rope", "ape", "rnope"])
def test_future_tokens_change_no_earlier_logits(position: str, kind: str, documents: str) -> None:
    model = small_model(small_config(position=position, bias=True))
    token, document = make_tokens(model.config, "ragged", seed=3), make_documents(documents)
    token[1:, -1] = META  # so that every tail has a meta-token to lose
    token[:, -2] = 20  # and text to turn into one
    for start in (1, 6, LENGTH - 2):
        with torch.no_grad():
            before = model(token, document_BT=document)
            after = model(changed(token, start, kind), document_BT=document)
        assert_close(after[:, :start], before[:, :start], 1e-12, kind)
        if kind == "text_to_text":
            assert torch.equal(after[:, :start], before[:, :start])
        assert (after[:, start:] != before[:, start:]).any()


def embedding_gradient(model: GPT, token: Tensor, document: Tensor | None, t: int) -> Tensor:
    """Gradient of all logits at row ``t`` with respect to the embedded rows (B, T, D)."""
    context = make_context(model.config, token, document_BT=document)
    leaf = model.embedding(token, context).detach().requires_grad_()
    x = leaf
    for block in model.blocks:
        x = block(x, context)
    logits = model.head(x, model.embedding.tokens.weight)
    weight = torch.randn(logits.shape[-1], dtype=logits.dtype, generator=torch.Generator().manual_seed(0))
    (logits[:, t] * weight).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("parallel_residual", [False, True])
@pytest.mark.parametrize("documents", ["one", "packed", "left_pad", "right_pad"])
@pytest.mark.parametrize("metas", ["ragged", "all", "none"])
def test_gradient_reaches_only_the_past_of_the_same_document(
    metas: str, documents: str, parallel_residual: bool
) -> None:
    model = small_model(small_config(parallel_residual=parallel_residual, bias=True))
    token, document = make_tokens(model.config, metas), make_documents(documents)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long) if document is None else document
    for t in range(LENGTH):
        grad = embedding_gradient(model, token, document, t)
        visible = (torch.arange(LENGTH)[None] <= t) & (ids == ids[:, t : t + 1])
        reached = (grad != 0).any(dim=-1)
        assert torch.equal(reached, visible), t


def test_the_branch_carries_only_meta_to_meta() -> None:
    """With causal attention silenced, a meta row depends on earlier meta rows and itself, a text row on itself."""
    model = small_model(small_config())
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.o_proj.weight)
    token = make_tokens(model.config, "ragged")
    is_meta = token == META
    row = torch.arange(LENGTH)
    for t in range(LENGTH):
        reached = (embedding_gradient(model, token, None, t) != 0).any(dim=-1)
        expected = (row == t)[None] | (is_meta[:, t : t + 1] & is_meta & (row < t)[None])
        assert torch.equal(reached, expected), t


@pytest.mark.parametrize("position", ["rope", "ape", "none"])
@pytest.mark.parametrize("metas", ["ragged", "all"])
def test_packed_documents_equal_documents_alone(metas: str, position: str) -> None:
    """With positions that restart, a packed document has the logits that it has by itself, whatever its neighbours."""
    model = small_model(small_config(position=position))
    token, document = make_tokens(model.config, metas, seed=4), make_documents("packed")
    places = make_positions("restart", document)
    with torch.no_grad():
        packed = model(token, document_BT=document, position_BT=places)
        for row in range(BATCH):
            for one in document[row].unique():
                part = document[row] == one
                alone = model(token[row : row + 1, part])
                assert_close(packed[row, part], alone[0], 1e-12, f"row {row} document {one}")


def test_document_order_does_not_matter() -> None:
    """Documents exchange places, ids and positions: their logits go with them, forwards and backwards."""
    model = small_model(small_config())
    token = make_tokens(model.config, "ragged", seed=6)
    cut = 5
    document = (torch.arange(LENGTH) >= cut).long().expand(BATCH, LENGTH)
    swap = torch.cat((torch.arange(cut, LENGTH), torch.arange(cut)))
    places = make_positions("restart", document)
    with torch.no_grad():
        before = model(token, document_BT=document, position_BT=places)
        after = model(token[:, swap], document_BT=document[:, swap], position_BT=places[:, swap])
        renamed = model(token, document_BT=7 - 3 * document, position_BT=places)
    assert_close(after, before[:, swap], 1e-12, "swapped")
    assert torch.equal(renamed, before)


def test_rows_of_a_batch_do_not_touch() -> None:
    """Also not through padding columns of the meta branch, which point at row 0 of their own sequence."""
    model = small_model(small_config(bias=True))
    token = make_tokens(model.config, "ragged")
    other = token.clone()
    other[2] = changed(token, 0, "anything")[2]
    with torch.no_grad():
        before, after = model(token), model(other)
    keep = [0, 1, 3]
    assert_close(after[keep], before[keep], 1e-12, "other rows")
    leaf_rows = (embedding_gradient(model, token, None, LENGTH - 1) != 0).any(dim=-1)
    assert leaf_rows.all()
    context = make_context(model.config, token)
    leaf = model.embedding(token, context).detach().requires_grad_()
    model.blocks[0](leaf, context)[0].sum().backward()
    assert not leaf.grad[1:].any()
