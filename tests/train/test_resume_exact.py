"""Stop, start again: every later number is bitwise that of the run that was not stopped, at every ZeRO stage.

In fresh processes but without the command line (test_run.py has that): many runs in one process save their starts.
"""

import pytest
import torch

from megameta.checkpoint import open_checkpoint
from megameta.config import RunConfig
from megameta.errors import EXIT_INTERRUPTED, EXIT_OK
from tests.support.ranks import run_ranks
from tests.support.runs import hashes, records
from tests.support.training import tiny_config

STAGES = (0, 1, 2, 3)
STEPS = 10


def run_until(config: RunConfig, topology, stop_at: int | None) -> tuple[int, list[list[int]]]:
    """One start of a run; ``stop_at``: as if a signal came during that step. (exit code, sample ids of every step)."""
    from megameta.train.loop import Trainer

    trainer = Trainer(config, topology)
    seen, step, read = [], trainer._step, trainer.loader.read

    def stepping():
        step()
        if trainer.state.step == stop_at and topology.rank == topology.world_size - 1:
            trainer.stop.request(15, None)  # on one rank alone: all have to agree

    def reading(*numbers):
        batches = read(*numbers)
        seen.append((torch.initial_seed(), [i for batch in batches for i in batch.sample_ids]))
        return batches

    trainer._step, trainer.loader.read = stepping, reading
    code = trainer.run()
    trainer.engine.destroy()
    return code, seen


def _all_stages(topology, corpus, root):
    report = {}
    for stage in STAGES:
        values = {
            "data__valid": corpus,
            "parallel__zero_stage": stage,
            "train__num_steps": STEPS,
            "checkpoint__interval": 100,
            "eval__interval": 4,
            "eval__num_samples": 8,
            "train__peak_tflops": 1.0,  # not measured in each of the many starts
        }
        whole = tiny_config(corpus, run__dir=f"{root}/whole{stage}", **values)
        parts = tiny_config(corpus, run__dir=f"{root}/parts{stage}", **values)
        code, seen = run_until(whole, topology, None)
        codes, seen_in_parts = [code], []
        for stop_at in (3, 8, None):
            code, part = run_until(parts, topology, stop_at)
            codes.append(code)
            seen_in_parts += part
        report[stage] = (codes, seen, seen_in_parts)
    return report


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def runs(request, tmp_path_factory, corpus):
    root = tmp_path_factory.mktemp("resume")
    return root, run_ranks(_all_stages, request.param, corpus, str(root))


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_bitwise_the_whole_one(runs, stage):
    root, ranks = runs
    for codes, seen, seen_in_parts in (rank[stage] for rank in ranks):
        assert codes == [EXIT_OK, EXIT_INTERRUPTED, EXIT_INTERRUPTED, EXIT_OK]
        assert seen == seen_in_parts and len(seen) == STEPS
        assert len({seed for seed, _ in seen}) == STEPS, "every step draws from a seed of its own"
    whole, parts = records(root / f"whole{stage}"), records(root / f"parts{stage}")
    assert [line["step"] for line in whole if "eval" not in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in whole if "eval" in line] == [4, 8, 10]
    assert parts == whole
    assert hashes(root / f"parts{stage}") == hashes(root / f"whole{stage}")
    assert len(hashes(root / f"whole{stage}")) == 2 * len(ranks), (
        "every rank writes a file of weights and one of moments"
    )
    state = open_checkpoint(root / f"parts{stage}").trainer()
    assert (state.step, state.next_batch, state.optimizer_step, state.tokens) == (STEPS, STEPS, STEPS, STEPS * 8 * 32)
    assert state.targets == sum(line["targets"] for line in whole if "eval" not in line)


def test_stages_agree(runs):
    root, _ = runs
    losses = [[line["loss"] for line in records(root / f"whole{stage}") if "eval" not in line] for stage in STAGES]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)
