"""RUN/metrics.jsonl through kills and resumes, and the measures of speed."""

import json
import os
from types import SimpleNamespace

import pytest

from megameta.checkpoint import TrainerState
from megameta.config.derived import step_flops
from megameta.errors import UserError
from megameta.model.flops import forward_flops
from megameta.parallel.topology import Topology
from megameta.train import saving
from megameta.train.metrics import MetricsFile, read_metrics
from tests.support.training import tiny_config


def write(path, steps, tail=""):
    lines = [{"step": s, "loss": 1 / s} for s in steps] + [{"step": steps[-1], "eval": {"valid": {"loss": 0.1 + 0.2}}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return lines


@pytest.mark.parametrize("tail", ["", '{"step": 7, "lo', '{"step": 7, "loss": 0.5'])
def test_cut_back_to_the_resumed_step(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    lines = write(path, [1, 2, 3, 4, 5], tail)
    file = MetricsFile(path, 3)
    assert read_metrics(path) == lines[:3]
    file.write({"step": 4, "loss": 9.0})
    assert read_metrics(path) == [*lines[:3], {"step": 4, "loss": 9.0}], "a record is there before the next step"
    file.close()


def test_the_lines_are_on_the_disk_before_latest_names_their_checkpoint(tmp_path, monkeypatch):
    """A power cut would leave a hole otherwise: the run goes on after lines that were never written."""
    done = []
    topology, state = Topology(), TrainerState(step=3, next_batch=3, tokens=1, targets=1, optimizer_step=3)
    engine = SimpleNamespace(state=SimpleNamespace(optimizer_step=3), loss_scale_state=lambda: None)
    records = SimpleNamespace(sync=lambda: done.append("sync"))
    monkeypatch.setattr(saving, "save_distributed", lambda *_: done.append("save"))
    monkeypatch.setattr(saving, "point_latest", lambda *_: done.append("latest"))
    monkeypatch.setattr(saving, "prune", lambda *_: done.append("prune"))
    monkeypatch.setattr(saving.dist, "broadcast_object_list", lambda values: None)
    attempt = SimpleNamespace(check=lambda: done.append("still the newest attempt?"))
    monitor = SimpleNamespace(heartbeat=None)
    session = SimpleNamespace(attempt=attempt, monitor=monitor, enter=lambda phase: None)
    config = tiny_config("x", run__dir=str(tmp_path))
    saving.RunCheckpoints(config, topology, session, engine, records).save(state)
    asked = "still the newest attempt?"
    assert done == ["save", "sync", asked, "latest", asked, "prune"]
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1})
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(descriptor))
    file.sync()
    assert done[-1] == file._file.fileno()


def test_evaluation_at_the_resumed_step_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = write(path, [1, 2])
    MetricsFile(path, 2).close()
    assert read_metrics(path) == lines
    MetricsFile(path, 0).close()
    assert read_metrics(path) == []


def test_floats_survive_exactly(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    values = [0.1 + 0.2, 1e-310, 4.123456789012345]
    for step, value in enumerate(values, 1):
        file.write({"step": step, "loss": value})
    file.close()
    MetricsFile(path, 9).close()
    assert [line["loss"] for line in read_metrics(path)] == values


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not JSON"):
        MetricsFile(path, 3)
    assert len(path.read_text().splitlines()) == 3, "nothing was lost"


def test_flops_of_a_step():
    config = tiny_config("x")
    one = forward_flops(config.model, 32, 4)
    assert step_flops(config) == 3 * 8 * one
