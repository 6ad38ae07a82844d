"""The kit that starts ranks: results by rank, failures with their rank, hangs ended, nothing left behind."""

import os
import time
from multiprocessing.connection import wait
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.support import ranks, server
from tests.support.ranks import RankError, run_ranks


def _sum_of_ranks(topology, offset):
    value = torch.tensor([topology.rank + offset])
    dist.all_reduce(value)
    return topology.rank, int(value), os.environ["OMP_NUM_THREADS"], torch.get_num_threads(), os.getpid()


def _fail_on_one(topology, failing):
    if topology.rank == failing:
        print("what it had printed", flush=True)
        raise ValueError("the reason")
    dist.barrier()  # waits for the rank that is gone


def _hang_on_one(topology):
    if topology.rank == 0:
        time.sleep(1_000_000)
    return topology.rank


def _die_on_one(topology):
    if topology.rank == 1:
        os._exit(7)
    dist.barrier()


def _children():
    server.start()  # it stays
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_results_come_back_by_rank():
    before = _children()
    results = run_ranks(_sum_of_ranks, 2, 10)
    assert [r[:4] for r in results] == [(0, 21, "1", 1), (1, 21, "1", 1)]
    assert not any(psutil.pid_exists(r[4]) for r in results)
    assert {p for p in _children() - before if "tracker" not in " ".join(psutil.Process(p).cmdline())} == set()
    assert "RANK" not in os.environ


def test_an_exception_names_its_rank_and_a_death_its_code(monkeypatch):
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 1.0)
    with pytest.raises(RankError, match="the reason") as caught:
        run_ranks(_fail_on_one, 2, 1)
    monkeypatch.undo()
    assert "ValueError: the reason" in caught.value.failures[1]
    assert any("rank 1 printed:\nwhat it had printed" in note for note in caught.value.__notes__)
    assert "ValueError" not in caught.value.failures.get(0, "")
    with pytest.raises(RankError) as caught:
        run_ranks(_die_on_one, 2)
    assert caught.value.failures[1] == "ended with code 7 and no result"


def test_a_hang_is_ended(monkeypatch):
    """The time is over as soon as the other rank has returned: the clock jumps then."""
    before, returned = _children(), []

    def waiting(pipes, timeout):
        returned.extend(wait(pipes, timeout))
        return returned[-1:]

    monkeypatch.setattr(ranks, "wait", waiting)
    clock = SimpleNamespace(sleep=time.sleep, monotonic=lambda: time.monotonic() + 1e6 * bool(returned))
    monkeypatch.setattr(ranks, "time", clock)
    with pytest.raises(RankError) as caught:
        run_ranks(_hang_on_one, 2, timeout=3600)
    assert caught.value.failures == {0: "did not end within 3600 s"}
    assert {p for p in _children() - before if "tracker" not in " ".join(psutil.Process(p).cmdline())} == set()
