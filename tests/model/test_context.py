"""The compact index of meta rows, by properties that hold for every batch."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megameta.model import Context, MetaRows, find_document_runs, make_context
from tests.support.models import small_config

META = 11


@st.composite
def meta_masks(draw: st.DrawFn) -> Tensor:
    """A batch of one to four rows of one to nine places, any of which may be meta-tokens."""
    length = draw(st.integers(1, 9))
    return torch.tensor(
        draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=4))
    )


def context_of(is_meta: Tensor, extra: int | None, **given_: Tensor) -> tuple[Context, MetaRows]:
    columns = None if extra is None else int(is_meta.sum(dim=1).max()) + extra
    token = torch.where(is_meta, META, 3)
    context = make_context(small_config(), token, num_meta_columns=columns, **given_)
    assert context.meta is not None  # with gradients enabled the branch always has a column
    return context, context.meta


extras = st.sampled_from([None, 0, 1, 20])
quick = settings(max_examples=60, deadline=None, derandomize=True)


@quick
@given(meta_masks(), extras)
def test_index_lists_the_meta_rows_in_order(is_meta: Tensor, extra: int | None) -> None:
    _, rows = context_of(is_meta, extra)
    batch, length = is_meta.shape
    index = rows.index_R.view(rows.is_real_BM.shape)
    assert rows.is_real_BM.shape[1] <= max(length, 1)
    for b in range(batch):
        assert (index[b] // length == b).all()  # padding too stays in its own sequence
        real = index[b][rows.is_real_BM[b]] - b * length
        assert real.tolist() == is_meta[b].nonzero().flatten().tolist()
        count = len(real)
        assert rows.is_real_BM[b, :count].all() and not rows.is_real_BM[b, count:].any()


@quick
@given(meta_masks(), extras)
def test_take_and_add_are_adjoint(is_meta: Tensor, extra: int | None) -> None:
    """⟨take(x), y⟩ over real columns = ⟨x, add_(0, y)⟩, and add_ is the identity elsewhere."""
    _, rows = context_of(is_meta, extra)
    x = torch.randn(*is_meta.shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.randn(*rows.is_real_BM.shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left = (rows.take(x)[1] * y)[rows.is_real_BM].sum()
    right = (x * rows.add_(torch.zeros_like(x), y)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    added = rows.add_(x.clone(), y)
    assert torch.equal(added[~is_meta], x[~is_meta])
    torch.testing.assert_close(added[is_meta], x[is_meta] + y[rows.is_real_BM], rtol=0, atol=0)
    poisoned = y.masked_fill(~rows.is_real_BM[..., None], float("nan"))
    assert torch.equal(rows.add_(x.clone(), poisoned), added)


@quick
@given(meta_masks(), extras, st.booleans())
def test_the_gradients_of_taking_and_adding_are_those_of_plain_indexing(
    is_meta: Tensor, extra: int | None, has_two: bool
) -> None:
    """To the last bit, of a sum that later layers read and of its meta rows."""
    _, rows = context_of(is_meta, extra)
    generator = torch.Generator().manual_seed(0)
    shapes = [(*is_meta.shape, 3)] * 2 + [(*rows.is_real_BM.shape, 3)]
    x, y, scale = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    results = []
    for ours in (True, False):
        leaves = [z.clone().requires_grad_() for z in (x, y)[: 1 + has_two]]
        if ours:
            total, taken = rows.take(*leaves)
            out = rows.add_(total.clone() if len(leaves) == 1 else total, taken * scale)
        else:
            total = sum(leaves)
            taken = total.flatten(0, 1)[rows.index_R].view(scale.shape)
            added = torch.where(rows.is_real_BM[..., None], taken * scale, 0)
            out = total.flatten(0, 1).index_add(0, rows.index_R, added.flatten(0, 1)).view_as(total)
        (out + out.square()).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@quick
@given(meta_masks(), extras, st.booleans())
def test_no_query_is_left_without_a_key(is_meta: Tensor, extra: int | None, documents: bool) -> None:
    """Padding columns included: a softmax over nothing would be NaN, in the backward pass too."""
    document = (torch.arange(is_meta.shape[1]) // 3 - 1).expand(is_meta.shape) if documents else None
    given_ = {"document_BT": document} if document is not None else {}
    context, rows = context_of(is_meta, extra, **given_)
    if document is None:
        assert rows.mask.causal and rows.mask.allowed_BTS is None
        return
    assert rows.mask.allowed_BTS.any(dim=-1).all()
    assert context.mask.allowed_BTS.any(dim=-1).all()
    for b in range(len(is_meta)):
        places = is_meta[b].nonzero().flatten()
        count = len(places)
        expected = (places[None] <= places[:, None]) & (document[b, places][None] == document[b, places][:, None])
        assert torch.equal(rows.mask.allowed_BTS[b, :count, :count], expected)
        assert not rows.mask.allowed_BTS[b, :count, count:].any()
    runs = find_document_runs(torch.where(is_meta, META, 3), document, META, rows.is_real_BM.shape[1])
    for mine, known in ((context.mask.documents.runs, runs.rows), (rows.mask.documents.runs, runs.meta)):
        assert torch.equal(mine.bounds_N, known.bounds_N) and mine.longest == known.longest


def test_no_columns_only_where_nothing_needs_gradients() -> None:
    token = torch.zeros(2, 4, dtype=torch.long)
    assert make_context(small_config(), token).meta.is_real_BM.tolist() == [[False], [False]]
    with torch.no_grad():
        assert make_context(small_config(), token).meta is None
    assert make_context(small_config(meta_attention=False), token).meta is None
