"""Places of ranks, groups, and what DeepSpeed's own topology says of them."""

import pytest

from megameta.parallel.topology import Topology

SHAPES = [(t, p, d) for t in (1, 2, 4) for p in (1, 2, 3) for d in (1, 2)]


def world(tensor, pipeline, data):
    size = tensor * pipeline * data
    return [Topology(size, rank, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline) for rank in range(size)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_place_is_taken_once(shape):
    ranks = world(*shape)
    places = [(t.pipeline_parallel_rank, t.data_parallel_rank, t.tensor_parallel_rank) for t in ranks]
    assert len(set(places)) == len(ranks)
    for topology, (pipeline, data, tensor) in zip(ranks, places):
        assert topology.rank_of(pipeline=pipeline, data=data, tensor=tensor) == topology.rank
        assert topology.data_parallel_size == shape[2]


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_divide_the_world(shape):
    ranks = world(*shape)
    for groups, size in ((ranks[0].tensor_parallel_groups(), shape[0]), (ranks[0].data_parallel_groups(), shape[2])):
        assert sorted(rank for group in groups for rank in group) == list(range(len(ranks)))
        assert {len(group) for group in groups} == {size}
    for group in ranks[0].tensor_parallel_groups():
        assert group == list(range(group[0], group[0] + shape[0])), "ranks that share layers are neighbours"
        assert len({(ranks[r].pipeline_parallel_rank, ranks[r].data_parallel_rank) for r in group}) == 1
    for group in ranks[0].data_parallel_groups():
        assert len({(ranks[r].pipeline_parallel_rank, ranks[r].tensor_parallel_rank) for r in group}) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_deepspeed_numbers_ranks_the_same_way(shape):
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    theirs = PipeModelDataParallelTopology(shape[1], shape[0], shape[2])
    for topology in world(*shape):
        place = theirs.get_coord(topology.rank)
        ours = (topology.pipeline_parallel_rank, topology.data_parallel_rank, topology.tensor_parallel_rank)
        assert (place.pipe, place.data, place.model) == ours


def test_one_rank_of_each_replica_has_the_loss():
    topology = world(2, 2, 3)[0]
    assert topology.loss_ranks() == [6, 8, 10]
    assert Topology().loss_ranks() == [0]


def test_a_world_that_does_not_divide():
    with pytest.raises(ValueError, match="6 processes do not divide by 4 a replica"):
        Topology(6, 0, tensor_parallel_size=2, pipeline_parallel_size=2)
