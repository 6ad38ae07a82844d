"""The kit that starts ranks: results by rank, failures with their rank, hangs ended, nothing left behind."""

import os
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.support import ranks
from tests.support.ranks import RankError, run_ranks


def _sum_of_ranks(topology, offset):
    value = torch.tensor([topology.rank + offset])
    dist.all_reduce(value)
    return topology.rank, int(value), os.environ["OMP_NUM_THREADS"], torch.get_num_threads(), os.getpid()


def _fail_on_one(topology, failing):
    if topology.rank == failing:
        raise ValueError("the reason")
    dist.barrier()  # waits for the rank that is gone


def _hang_on_one(topology):
    if topology.rank == 0:
        time.sleep(1000)
    return topology.rank


def _die_on_one(topology):
    if topology.rank == 1:
        os._exit(7)
    dist.barrier()


def _children():
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
    assert "ValueError: the reason" in caught.value.failures[1]
    assert "ValueError" not in caught.value.failures.get(0, "")
    with pytest.raises(RankError) as caught:
        run_ranks(_die_on_one, 2)
    assert caught.value.failures[1] == "ended with code 7 and no result"


def test_a_hang_is_ended():
    start, before = time.monotonic(), _children()
    with pytest.raises(RankError) as caught:
        run_ranks(_hang_on_one, 2, timeout=12)
    assert caught.value.failures == {0: "did not end within 12 s"}
    assert time.monotonic() - start < 30
    assert {p for p in _children() - before if "tracker" not in " ".join(psutil.Process(p).cmdline())} == set()
