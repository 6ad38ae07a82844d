"""The table: what is sharded and how, that shards make up the whole, and that nobody holds the whole in a step."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megameta.config import build_config
from megameta.engine.pipeline_engine import make_engine
from megameta.model import GPT, Block, ModelConfig
from megameta.model.shapes import parameter_shapes
from megameta.parallel.tensor_parallel import TABLE, kind_of, shard_dim, shard_of
from tests.support.layouts import ALL_ON, FACTORS, Case, make_config, make_corpus
from tests.support.ranks import run_ranks
from tests.support.training import step_loader

FULL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=1,
    num_heads=8,
    num_key_value_heads=4,
    bias=True,
    qk_norm=True,
    activation="swiglu",
    tie_embeddings=False,
    position="ape",
    max_position_embeddings=16,
)


def test_every_projection_is_in_the_table_and_nothing_else():
    with torch.device("meta"):
        model = GPT(FULL)
    sharded = {path for path, module in model.named_modules() if kind_of(path)}
    matrices = {
        path
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and path != "embedding.positions"
    }
    assert sharded == matrices
    assert len(TABLE) == 6


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_make_up_every_parameter(size):
    for name, shape in parameter_shapes(FULL).items():
        shards = [shard_of(name, shape, FULL, rank, size) for rank in range(size)]
        dim = shard_dim(name)
        if size == 1 or dim is None:
            assert shards == [None] * size
            continue
        assert all(shard is not None and shard.dim == dim for shard in shards)
        assert [shard.start for shard in shards] == [0, *(shard.stop for shard in shards[:-1])]
        assert shards[-1].stop == shape[dim]


def test_which_dimension():
    assert shard_dim("blocks.0.attention.q_proj.bias") == shard_dim("blocks.0.mlp.up_proj.weight") == 0
    assert shard_dim("blocks.0.meta_attention.o_proj.weight") == shard_dim("blocks.3.mlp.down_proj.weight") == 1
    assert shard_dim("blocks.0.meta_attention.o_proj.bias") is None
    assert shard_dim("embedding.tokens.weight") == shard_dim("head.output.weight") == 0
    for name in ("embedding.positions.weight", "blocks.0.norm_meta.weight", "blocks.0.attention.q_norm.weight"):
        assert shard_dim(name) is None


def test_the_vocabulary_is_padded_to_128_a_rank():
    shards = [shard_of("embedding.tokens.weight", (300, 32), FULL, rank, 4) for rank in range(4)]
    assert [(s.start, s.stop) for s in shards] == [(0, 128), (128, 256), (256, 300), (300, 300)]


class Shapes(TorchDispatchMode):
    """Shapes of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return out


def odd_config(case, corpus):
    """Rows of a batch in numbers that are no width of a weight."""
    raw = make_config(case, corpus).to_dict()
    raw["data"]["sequence_length"], raw["train"]["micro_batch_size"] = 26, 1
    return build_config(raw)


def _shapes(topology, corpus, cases):
    found = []
    for case in cases:
        config = odd_config(case, corpus)
        here = dataclasses.replace(topology, tensor_parallel_size=case.tensor, pipeline_parallel_size=case.pipeline)
        engine = make_engine(config, here)
        loader = step_loader(config, here)
        with Shapes() as shapes:
            engine.train_step(loader.read(0), 1e-3)
        found.append(shapes.seen)
        loader.close()
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("parity"))


def whole_things(config, padded):
    """Shapes that no rank may ever see, and dimensions: whole sharded weights, anything as wide as the vocabulary."""
    shapes = {
        tuple(shape)
        for name, shape in parameter_shapes(config.model).items()
        if shard_dim(name) is not None and len(shape) == 2
    }
    return shapes | {shape[::-1] for shape in shapes}, {config.model.vocab_size, padded}


def test_no_rank_ever_holds_a_whole_weight_or_whole_logits(corpus):
    levels = [{**ALL_ON, "sequence": level, "embedding": "untied", "block": "swiglu"} for level in FACTORS["sequence"]]
    cases = [Case(2, 1, 1, zero, tuple(factors.items())) for zero in (0, 1, 2, 3) for factors in levels]
    whole, wide = whole_things(odd_config(cases[0], corpus), 1024)
    assert whole, wide
    for seen in (shapes for rank in run_ranks(_shapes, 2, corpus, cases) for shapes in rank):
        assert len(seen) > 50
        assert sorted(seen & whole) == []
        assert not [shape for shape in seen if wide & set(shape)]
        assert any(512 in shape for shape in seen), "the shard of the vocabulary has not been seen either"


def test_one_process_does_hold_them(corpus):
    (seen,) = run_ranks(_shapes, 1, corpus, [Case(1, 1, 1, 1)])[0]
    whole, wide = whole_things(odd_config(Case(1, 1, 1, 1), corpus), 1024)
    assert seen & whole and [shape for shape in seen if wide & set(shape)]


def test_a_block_is_made_parallel_without_a_line_of_its_own():
    import inspect

    source = inspect.getsource(Block)
    assert "parallel" not in source.replace("parallel_residual", "")
