"""``megameta status`` of runs in every state, from files as a run leaves them."""

import json
import time

import pytest

from megameta.__main__ import main
from megameta.cluster import status
from megameta.cluster.attempt import claim
from megameta.cluster.status import describe, run_status
from megameta.errors import UserError

NOW = 1_000_000.0


def beat(attempt, **values):
    record = {"attempt": attempt.number, "host": "n1", "pid": 5, "ranks": 2, "hosts": ["n1", "n2"], "num_steps": 100}
    record |= {"time": NOW - 3, "phase": "training", "step": 40, "loss": 2.5, "tokens_per_second": 1234.0}
    record |= {"eta_seconds": 3725.0, "saved_step": 30, "slowest_rank": None, "job": None}
    (attempt.folder / "heartbeat.json").write_text(json.dumps({**record, **values}))


def point(run, step):
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")


def test_not_started(tmp_path, capsys):
    for run in (tmp_path / "nowhere", tmp_path):
        found = run_status(run, NOW)
        assert found["state"] == "not started" and "next: megameta train" in "\n".join(describe(found))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a run directory"):
        run_status(tmp_path / "file", NOW)
    with pytest.raises(UserError, match="not a run directory"):
        run_status(tmp_path, NOW)


def test_submitted_and_not_started(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "submitted-20260101-000000.sbatch").write_text(
        "#!/bin/bash\n#SBATCH --job-name=megameta-x-1\n"
    )
    asked = []
    monkeypatch.setattr(status, "ask", lambda *words: asked.append(words) or "12 PENDING (Priority)\n")
    text = "\n".join(describe(run_status(tmp_path, NOW)))
    assert "job        12 PENDING (Priority)" in text and "next:" not in text and "--name=megameta-x-1" in asked[0]
    monkeypatch.setattr(status, "ask", lambda *words: None)
    assert "not in the queue" in "\n".join(describe(run_status(tmp_path, NOW)))


def test_under_way(tmp_path):
    attempt = claim(tmp_path)
    point(tmp_path, 30)
    slowest = {"rank": 1, "host": "n2", "seconds": 0.1, "times_median": 1.5, "slow": True}
    beat(attempt, slowest_rank=slowest)
    found = run_status(tmp_path, NOW)
    assert (found["state"], found["step"], found["saved_step"], found["attempt"]) == ("training", 40, 30, 1)
    text = "\n".join(describe(found))
    for wanted in (
        "40 of 100",
        "2.5000",
        "1,234",
        "1:02:05",
        "step 30",
        "2 on n1, n2",
        "rank 1 on n2, 1.50 ×",
        ": slow",
    ):
        assert wanted in text


@pytest.mark.parametrize(
    ("values", "end", "state"),
    [
        ({"phase": "done", "time": NOW - 9999}, None, "done"),
        ({"phase": "stopped", "time": NOW - 9999}, None, "stopped"),
        ({"phase": "failed"}, None, "failed"),
        ({"time": NOW - 9999}, None, "dead"),
        ({"phase": "saving", "time": NOW - 9999}, None, "dead"),
        ({"time": NOW - 30}, None, "training"),
        ({"time": NOW - 9999}, "lost", "failed"),
    ],
)
def test_ends(tmp_path, values, end, state):
    attempt = claim(tmp_path)
    beat(attempt, **values)
    if end:
        attempt.note_end(end, "lost node n2")
    found = run_status(tmp_path, NOW)
    assert found["state"] == state
    text = "\n".join(describe(found))
    assert ("no sign of life for 2:46:39 from n1" in text) == (state == "dead")
    assert ("lost: lost node n2" in text) == bool(end)
    assert "left" not in text or state == "training"


def test_the_newest_attempt_counts_and_the_last_loss_stays(tmp_path):
    beat(claim(tmp_path), phase="failed")
    beat(claim(tmp_path), phase="starting", step=30, loss=None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 30, "loss": 2.25}\n{"step": 30, "eval": {}}\n{"step": 31, "lo')
    found = run_status(tmp_path, NOW)
    assert (found["state"], found["attempt"]) == ("starting", 2)


def test_a_run_from_before_there_were_attempts(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 2.25, "tokens_per_second": 9}\n')
    found = run_status(tmp_path, NOW)
    assert (found["step"], found["loss"]) == (7, 2.25) and "7" in "\n".join(describe(found))


def test_damaged_files_are_no_error(tmp_path):
    attempt = claim(tmp_path)
    (attempt.folder / "heartbeat.json").write_text('{"phase": "tr')
    (attempt.folder / "end.json").write_text("[")
    now = attempt.folder.stat().st_mtime
    assert run_status(tmp_path, now)["state"] == "starting"
    assert run_status(tmp_path, now + 9999)["state"] == "dead"


def test_json(tmp_path, capsys):
    beat(claim(tmp_path), time=time.time() + 3600)  # however long the command takes to start
    with pytest.raises(SystemExit) as ended:
        main(["status", str(tmp_path), "--json"])
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out)["state"] == "training"
