"""Attempt numbers, the lock of a run directory, and the fence: a stale attempt renames nothing and writes no line."""

import fcntl
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from megameta.checkpoint.ranks import Alone
from megameta.checkpoint.save import _InMemory, save_distributed
from megameta.checkpoint.store import TrainerState, open_checkpoint, point_latest, step_name
from megameta.cluster import run_lock
from megameta.cluster.attempt import claim, how_it_ended, newest_attempt, newest_number, saved_step
from megameta.cluster.run_lock import is_gone, lock_run
from megameta.config import build_config
from megameta.errors import Superseded, UserError
from megameta.parallel.topology import Topology
from megameta.train.metrics import MetricsFile, read_metrics
from megameta.train.saving import RunCheckpoints
from tests.support.paths import ROOT

CONFIG = build_config({"data": {"train": "x"}})


def save(run, step, attempt, value):
    state = TrainerState(step=step, next_batch=step, tokens=1, targets=1, optimizer_step=step)
    source = _InMemory({"a": torch.full((2,), value)}, {})
    save_distributed(run / "checkpoints" / step_name(step), CONFIG, source, state, Alone(), attempt)


def test_numbers_are_taken_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        taken = [attempt.number for attempt in pool.map(lambda _: claim(tmp_path), range(40))]
    assert sorted(taken) == list(range(1, 41)) and newest_number(tmp_path) == 40
    with pytest.raises(FileExistsError):
        claim(tmp_path, 40)
    assert newest_attempt(tmp_path).folder == tmp_path / "logs" / "attempt_0040"
    assert newest_attempt(tmp_path / "elsewhere") is None


def test_the_first_reason_stays(tmp_path):
    attempt = claim(tmp_path)
    assert how_it_ended(attempt) is None
    attempt.note_end("lost", "n2")
    attempt.note_end("mistake", "a collective broke off")
    assert (how_it_ended(attempt)["kind"], how_it_ended(attempt)["message"]) == ("lost", "n2")


def test_a_stale_attempt_gives_no_checkpoint_its_name(tmp_path):
    stale = claim(tmp_path)
    save(tmp_path, 10, stale, 1.0)
    newer = claim(tmp_path)
    with pytest.raises(Superseded, match="attempt 2 has started"):
        save(tmp_path, 20, stale, 1.0)
    with pytest.raises(Superseded):
        save(tmp_path, 10, stale, 7.0)  # nor in the place of one that is there
    save(tmp_path, 20, newer, 2.0)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [step_name(10), step_name(20)]
    assert torch.equal(open_checkpoint(folder / step_name(10)).weights()["a"], torch.full((2,), 1.0))
    assert torch.equal(open_checkpoint(folder / step_name(20)).weights()["a"], torch.full((2,), 2.0))


def test_two_attempts_write_apart(tmp_path, monkeypatch):
    """Both are in the middle of the same step's checkpoint: the stale one began before it was superseded."""
    stale = claim(tmp_path)
    seen = []

    def meanwhile(*arguments):
        if not seen:
            seen.append(claim(tmp_path))
            save(tmp_path, 30, seen[0], 2.0)
        return complete(*arguments)

    from megameta.checkpoint import save as module

    complete = module._complete
    monkeypatch.setattr(module, "_complete", meanwhile)
    with pytest.raises(Superseded):
        save(tmp_path, 30, stale, 1.0)
    assert torch.equal(open_checkpoint(tmp_path / "checkpoints" / step_name(30)).weights()["a"], torch.full((2,), 2.0))


def test_a_stale_attempt_moves_no_pointer_and_removes_nothing(tmp_path):
    stale = claim(tmp_path)
    for step in (10, 20, 30):
        save(tmp_path, step, stale, 1.0)
    folder = tmp_path / "checkpoints"
    point_latest(folder / step_name(30))
    config = build_config({"run": {"dir": str(tmp_path)}, "data": {"train": "x"}, "checkpoint": {"keep": 1}})
    session = SimpleNamespace(monitor=SimpleNamespace(heartbeat=None))
    checkpoints = RunCheckpoints(config, Topology(), session, None, None)
    claim(tmp_path)
    with pytest.raises(Superseded):
        checkpoints._publish(folder / step_name(10), stale)
    assert saved_step(tmp_path) == 30 and len(list(folder.glob("step_*"))) == 3
    # Superseded between the two: the pointer was its own, what follows is not.
    newer = newest_attempt(tmp_path)
    calls = []
    late = SimpleNamespace(check=lambda: calls.append(1) or (newer.check() if len(calls) < 2 else stale.check()))
    with pytest.raises(Superseded):
        checkpoints._publish(folder / step_name(30), late)
    assert len(list(folder.glob("step_*"))) == 3


def test_a_stale_attempt_writes_no_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    stale = claim(tmp_path)
    old = MetricsFile(path, 0, stale)
    for step in (1, 2, 3):
        old.write({"step": step, "loss": 1.0})
    new = MetricsFile(path, 2, claim(tmp_path))
    old._next_check = float("inf")  # it has not looked yet
    old.write({"step": 4, "loss": 666.0})
    new.write({"step": 3, "loss": 2.0})
    old._next_check = 0.0
    with pytest.raises(Superseded):
        old.write({"step": 5, "loss": 666.0})
    assert [line["loss"] for line in read_metrics(path)] == [1.0, 1.0, 2.0]


# --- the lock -------------------------------------------------------------------------------------------------------


def job(number, restart="0"):
    return {"SLURM_JOB_ID": number, "SLURM_RESTART_COUNT": restart, "SLURMD_NODENAME": f"node-of-{number}"}


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run, as a job's or as a person's."""
    processes = []

    def hold(environment):
        code = (
            "import sys, json; from pathlib import Path; from megameta.cluster.run_lock import lock_run;"
            "lock = lock_run(Path(sys.argv[1]), json.loads(sys.argv[2])); print('held', flush=True); sys.stdin.read()"
        )
        words = [sys.executable, "-c", code, str(tmp_path / "run"), json.dumps(environment)]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_held_lock_is_refused_and_a_free_one_taken(tmp_path, holder):
    process = holder({})
    with pytest.raises(UserError, match=rf"another run is using this directory \(host .*, pid {process.pid}\)"):
        lock_run(tmp_path / "run", {})
    with pytest.raises(UserError, match="another run"):
        lock_run(tmp_path / "run", job("5"))
    process.kill()
    process.wait()
    lock, attempt = lock_run(tmp_path / "run", {})
    assert attempt.number == 2
    lock.close()


def test_the_lock_of_a_former_restart_is_taken_over_once(tmp_path, holder):
    holder(job("5"))
    lock, attempt = lock_run(tmp_path / "run", job("5", "1"))
    assert attempt.number == 2
    with (tmp_path / "run" / ".lock").open() as again, pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(UserError, match="another run"):
        lock_run(tmp_path / "run", job("5", "1"))  # a second step of the same restart
    lock.close()
    # A third attempt finds the lock free: the stale process holds a file without a name.
    lock, attempt = lock_run(tmp_path / "run", job("5", "2"))
    assert attempt.number == 3
    lock.close()


def test_two_that_want_to_take_over(tmp_path, holder):
    holder(job("5"))
    owner = json.loads((tmp_path / "run" / ".lock").read_text())
    claim(tmp_path / "run")  # the other one was faster
    with pytest.raises(UserError, match="just taking this directory over"):
        run_lock._take_over(tmp_path / "run", owner, job("5", "1"))


@pytest.mark.parametrize(
    ("state", "gone"),
    [("RUNNING", False), ("COMPLETING", False), (None, False), ("", True), ("CANCELLED", True), ("PENDING", True)],
)
def test_of_another_job_slurm_is_asked(monkeypatch, state, gone):
    monkeypatch.setattr(run_lock, "job_state", lambda number: {"5": state}[number])
    owner = {"job": "5", "restart": "0", "attempt": 3}
    assert is_gone(owner, job("6")) is gone
    assert not is_gone({**owner, "job": ""}, job("6")) and not is_gone({}, job("6"))
    assert not is_gone(owner, job("5")), "the same restart of the same job"
