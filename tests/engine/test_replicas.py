"""A bit that differs between ranks is found, and named."""

import dataclasses

import pytest
import torch

from megameta.engine.pipeline_engine import make_engine
from megameta.engine.replicas import check_replicas, checksum, differing_replicas
from megameta.errors import UserError
from tests.support.ranks import run_ranks
from tests.support.training import tiny_config


def test_any_bit_changes_the_checksum():
    for tensor in (torch.randn(7, 3), torch.randn(5).bfloat16(), torch.zeros(4), torch.randn(1)):
        before = checksum(tensor)
        assert checksum(tensor.clone()) == before
        flat = tensor.view(-1).view(torch.uint8)
        for byte in range(flat.numel()):
            for bit in (0, 3, 7):
                flat[byte] ^= 1 << bit
                assert checksum(tensor) != before
                flat[byte] ^= 1 << bit
    assert checksum(torch.tensor([1.0, 2.0])) != checksum(torch.tensor([2.0, 1.0])), "places count"


def _flip(topology, corpus, layout, name, guilty):
    tensor, pipeline, stage = layout
    config = tiny_config(
        corpus,
        parallel__tensor_parallel_size=tensor,
        parallel__pipeline_parallel_size=pipeline,
        parallel__zero_stage=stage,
    )
    topology = dataclasses.replace(topology, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    engine = make_engine(config, topology)
    clean = differing_replicas(engine.state)
    if topology.rank == guilty:
        parameter = engine.state.parameters[name]
        local = parameter.ds_tensor if stage == 3 else parameter.data
        local.view(-1)[0] += 1e-3
    found = differing_replicas(engine.state)
    try:
        check_replicas(engine.state, 7)
    except UserError as error:
        return clean, found, str(error)
    return clean, found, ""


#: Layout (TP, PP, ZeRO), parameter, what is said; ZeRO 3 last, as it patches torch for the rest of the process.
CASES = {
    "a data-parallel replica": ((1, 1, 1), "blocks.1.mlp.up_proj.weight", "ranks [0] / ranks [1]"),
    "a norm on a tensor-parallel rank": ((2, 1, 2), "blocks.0.norm_meta.weight", "ranks [0] / ranks [1]"),
    "a tied table": ((1, 2, 1), "embedding.tokens.weight", "ranks [0] / ranks [1]"),
    "a shard, of which there is one": ((2, 1, 1), "blocks.1.mlp.up_proj.weight", ""),
    "a norm under ZeRO 3": ((2, 1, 3), "head.norm.bias", "ranks [0] / ranks [1]"),
}


def _flip_each(topology, corpus):
    return {case: _flip(topology, corpus, layout, name, 1) for case, (layout, name, _) in CASES.items()}


@pytest.fixture(scope="module")
def outcomes(corpus):
    return run_ranks(_flip_each, 2, corpus)


@pytest.mark.parametrize("case", CASES)
def test_a_difference_is_named(outcomes, case):
    _, name, where = CASES[case]
    for clean, found, message in (rank[case] for rank in outcomes):
        assert clean == []
        assert found == ([f"{name}: {where}"] if where else [])
        assert ("step 7: 1 parameter(s) are not the same" in message and name in message) == bool(where)
