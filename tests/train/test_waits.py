"""How often a step's host waits for the device: counted on a CPU (tests/support/host_waits.py)."""

import pytest

from megameta.train.pipeline_engine import make_engine
from tests.support.host_waits import HostWaits
from tests.support.ranks import run_ranks
from tests.support.training import step_loader, take_steps, tiny_config

READING = "tolist in train/engine.py:_gather"
#: Of batches before they are copied to the device.
ON_THE_HOST = {"_local_scalar_dense in data/loader.py:num_targets"}


def _waits(topology, corpus, cases):
    """Of the third step, in two micro-batches, by case."""
    found = {}
    for name, changes in cases.items():
        changes = {"data__document_mask": False, "data__reset_positions": False, **changes}
        config = tiny_config(corpus, train__micro_batch_size=4, **changes)
        engine, loader = make_engine(config, topology), step_loader(config, topology)
        take_steps(engine, loader, config, 1, 2)
        with HostWaits() as waits:
            take_steps(engine, loader, config, 3, 3)
        found[name] = {site: count for site, count in waits.sites.items() if site not in ON_THE_HOST}
        loader.close()
        engine.destroy()
    return found


CASES = {
    **{f"ZeRO {stage}": {"parallel__zero_stage": stage} for stage in (0, 1, 2)},
    "bf16": {"parallel__zero_stage": 1, "train__precision": "bf16"},
    "fused loss": {"parallel__zero_stage": 0, "train__fused_loss": True},
    "not clipped": {"parallel__zero_stage": 1, "optimizer__clip_grad_norm": 0.0},
    "recomputed": {"parallel__zero_stage": 0, "train__activation_checkpointing": True},
}


@pytest.fixture(scope="module")
def alone(corpus):
    return run_ranks(_waits, 1, corpus, CASES)[0]


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_once(alone, case):
    """For loss, forward time and norm together. Who adds a wait knows why, and writes it into docs/performance.md."""
    assert alone[case] == {READING: 1}


def _two_ranks(topology, corpus, stage):
    """Of a step: waits by call site; and what the ranks have heard of rank 1's flags."""
    config = tiny_config(corpus, parallel__zero_stage=stage, data__document_mask=False, data__reset_positions=False)
    engine, loader = make_engine(config, topology), step_loader(config, topology)
    engine.flags = lambda: (topology.rank == 1, False)
    take_steps(engine, loader, config, 1, 2)
    with HostWaits() as waits:
        take_steps(engine, loader, config, 3, 3)
    loader.close()
    return {site: count for site, count in waits.sites.items() if site not in ON_THE_HOST}, engine.flagged


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_of_two_ranks_it_waits_once_too(corpus, stage):
    """Targets are counted on the device; flags come with the losses. What DeepSpeed reads is not in this (ZeRO 0 to 2
    read nothing); collectives that nothing is read from do not hold up the host of a GPU."""
    for waits, flagged in run_ranks(_two_ranks, 2, corpus, stage):
        assert waits == {READING: 1}
        assert flagged == [True, False]
