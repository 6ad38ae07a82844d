"""The judges of ``make torture`` see what is lost; tests/scenarios/test_torture.py is a short one."""

import random

import pytest
import torch

from megameta.checkpoint import TrainerState, write_checkpoint
from megameta.checkpoint.store import point_latest, step_name
from tests.support.damages import KINDS, damaged
from tests.support.killed_run import Run
from tests.support.kills import AIMS, TARGETS
from tests.support.training import tiny_config


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
