"""How often a step's host waits for the device: counted on a CPU (tests/support/host_waits.py)."""

import dataclasses
from unittest import mock

import pytest

from megameta.engine.pipeline_engine import make_engine
from megameta.model import find_document_runs
from megameta.parallel import pipeline
from tests.support.host_waits import HostWaits
from tests.support.ranks import run_ranks
from tests.support.training import step_loader, take_steps, tiny_config

READING = "tolist in engine/engine.py:_gather"
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


def _stage_runs(topology, corpus):
    """What a pipeline's stages are told of documents, in two steps and an evaluation, and what they were to be told."""
    topology = dataclasses.replace(topology, pipeline_parallel_size=2)
    config = tiny_config(corpus, parallel__pipeline_parallel_size=2, data__document_mask=True)
    engine, loader = make_engine(config, topology), step_loader(config, topology)
    told, found, make, read = [], [], pipeline.make_context, loader.read
    # As from page-locked memory, for which a loader finds the runs.
    loader.read = lambda *numbers: [batch.with_runs(config.model.meta_token_id) for batch in read(*numbers)]

    def noting(model, token_BT, **given):
        told.append(given["document_runs"])
        found.append(find_document_runs(token_BT, given["document_BT"], model.meta_token_id, given["num_meta_columns"]))
        return make(model, token_BT, **given)

    with mock.patch.object(pipeline, "make_context", noting):
        take_steps(engine, loader, config, 1, 2)
        batches = loader.read(2, 3)
        engine.evaluate(iter(batches[:3]), None)
    loader.close()
    engine.destroy()
    return [(_numbers(one), _numbers(other)) for one, other in zip(told, found, strict=True)]


def _numbers(runs):
    return runs and [(part.bounds_N.tolist(), part.longest) for part in (runs.rows, runs.meta)]


def test_stages_are_told_the_runs_of_documents(corpus):
    """From a device's tensors each would be a wait a micro-batch and stage."""
    for report in run_ranks(_stage_runs, 2, corpus):
        assert len(report) == 2 * 4 + 3, "micro-batches"
        assert all(told == found for told, found in report)
        assert len({str(told) for told, _ in report}) > 8, "they are all alike: order does not show"
