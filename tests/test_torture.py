"""A short ``make torture``: three kills of a run and a hundred damages to its checkpoint."""

import random
from types import SimpleNamespace

import pytest
import torch

from megameta.checkpoint import TrainerState, write_checkpoint
from megameta.checkpoint.store import point_latest, step_name
from tests import torture
from tests.support.damages import KINDS, damaged
from tests.support.killed_run import Run
from tests.support.kills import AIMS, TARGETS, Plan, Torturer
from tests.support.training import tiny_config

STEPS = 8
#: Everything while it starts, one rank while it saves, the other when the checkpoint has its name.
PLANS = [
    Plan("everything", "start-up", steps=0, share=0.9, interval=1),
    Plan("rank 1", "writing", steps=1, share=0.3, interval=2),
    Plan("rank 0", "renaming", steps=0, share=0.3, interval=1),
]


@pytest.mark.slow
def test_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(torture, "STEPS", STEPS)
    torturer = Torturer(tmp_path, STEPS)
    torturer.run_undisturbed()
    damages = torture.run_damages(torturer, 100, random.Random(0))
    assert [problems for _, problems in damages.values()] == [[], []]
    assert sum(sum(counts.values()) for counts, _ in damages.values()) == 100
    assert any("00002-of-00002" in file for counts, _ in damages.values() for file, _ in counts), "by two ranks"
    outcome = torturer.torture(PLANS)
    assert outcome.problems == []
    assert [kill.target for kill in outcome.kills] == [plan.target for plan in PLANS]
    assert {kill.moment for kill in outcome.kills} <= set(torture.MOMENTS)
    assert outcome.completed >= 1 and outcome.starts >= len(PLANS) + 1
    arguments = SimpleNamespace(kills=len(PLANS), damages=100, seed=0)
    text = torture.report(arguments, outcome, damages, 1.0)
    assert "3 kills" in text and "100 of 100 were refused so" in text and "None in this run." in text


def test_what_is_lost_is_seen(tmp_path):
    """The judges judge: a checkpoint that is gone, one that is older than it was, and files that are left."""
    run = Run(tmp_path, "run")
    assert run.check_after_kill() == []
    for step in (3, 4):
        state = TrainerState(step=step, next_batch=step, tokens=1, targets=1, optimizer_step=step)
        write_checkpoint(run.checkpoints / step_name(step), tiny_config("x"), {"a": torch.ones(2)}, None, state)
        point_latest(run.checkpoints / step_name(step))
        assert run.check_after_kill() == [] and run.saved == step
    (run.directory / "metrics.jsonl").write_text("")
    assert run.check_completed(run) == []
    (run.checkpoints / ".step_00000005.writing").mkdir()
    (run.directory / ".config.yaml.writing").touch()
    (left, beside) = run.check_completed(run)
    assert ".step_00000005.writing" in left and ".config.yaml.writing" in beside
    point_latest(run.checkpoints / step_name(3))
    assert run.check_after_kill() == ["step 4 was saved, and 3 is left"]
    (run.checkpoints / step_name(3) / "trainer.json").unlink()
    (problem,) = run.check_after_kill()
    assert "no checkpoint after step 3" in problem and "trainer.json" in problem


def test_damage_changes_a_file():
    draw, data = random.Random(1), bytes(range(256))
    for kind in KINDS:
        results = [damaged(data, kind, draw) for _ in range(50)]
        assert data not in results
        assert (None in results) == (kind == "deletion")
    assert sum(KINDS.values()) == sum(AIMS.values()) == sum(TARGETS.values()) == pytest.approx(1.0)
