"""Checks before the first step: each fault is refused with its node's name."""

import json
import os
from dataclasses import replace

import pytest

from megameta.cluster.preflight import Facts, Needs, judge, remarks, table
from megameta.errors import UserError
from tests.support.ranks import run_ranks
from tests.support.training import tiny_config

NEEDS = Needs(disk=10**9, free_share=0.9)


def facts(rank, host, **changes):
    values = {"device": "H100", "free_memory": 79 * 10**9, "total_memory": 80 * 10**9, "disk_free": 10**12}
    values |= {
        "flops": 5e14,
        "source": "aa" if rank % 2 == 0 else "",
        "packages": {"torch": "2"} if rank % 2 == 0 else {},
    }
    return Facts(rank, host, **{**values, **changes})


def cluster(**changes_of_rank_4):
    good = [facts(rank, f"n{rank // 2 + 1}") for rank in range(8)]
    good[4] = facts(4, "n3", **changes_of_rank_4)
    return good


def test_nothing_wrong():
    assert judge(cluster(), NEEDS) == [] and remarks(cluster()) == []
    rows = table(cluster(), [1e9 * (rank + 1) for rank in range(8)])
    assert len(rows) == 5 and rows[3].split()[:5] == ["n3", "4–5", "2", "×", "H100"]
    assert "5.00" in rows[3]  # the slower of the node's two ranks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"free_memory": 40 * 10**9}, ["40.0 of 80.0 GB", "min_free_gpu_memory"]),
        ({"disk_free": 10**8}, ["0.1 GB free", "1.0", "checkpoint.keep"]),
        ({"sees_run_dir": False}, ["does not see run.dir"]),
        ({"source": "bb"}, ["source"]),
        ({"packages": {"torch": "1"}}, ["torch 1 not 2"]),
        ({"packages": {"torch": "2", "extra": "3"}}, ["extra 3 not None"]),
        ({"problem": "CUDA error: no device"}, ["CUDA error"]),
    ],
)
def test_one_bad_node_is_named(changes, words):
    (problem,) = judge(cluster(**changes), NEEDS)
    assert problem.startswith("node n3") and all(word in problem for word in words)


def test_most_nodes_are_right():
    """Rank 0's own node may be the odd one."""
    found = [facts(2 * n, f"n{n + 1}", source="old" if n == 0 else "new") for n in range(3)]
    (problem,) = judge(found, NEEDS)
    assert problem.startswith("node n1")


def test_a_slow_node_is_remarked_upon():
    (line,) = remarks(cluster(flops=3e14))
    assert "node n3, rank 4" in line and "300.00" in line


# --- between real ranks ---------------------------------------------------------------------------------------------


def _check(topology, folder, fault):
    from megameta.cluster import preflight

    hosts = ["n1", "n1", "n1" if fault in ("at home", "one node") else "n2"]
    if fault == "one node":
        os.environ.update(SLURM_STEP_ID="0", SLURM_PROCID=str(topology.rank))
    topology = replace(topology, local_rank=(0, 1, 0)[topology.rank])
    config = tiny_config("x", run__dir=folder, cluster__preflight_seconds=3600)
    if topology.rank == 2 and fault == "other source":
        preflight.source_digest = lambda: "0" * 64
    if fault == "hangs":  # rank 2 does not come to the all-reduce over all; the others soon give up
        real = preflight.bandwidth

        def bandwidth(topology, size, group, limit):
            if size < 3:
                return real(topology, size, group, limit)
            return None if topology.rank == 2 else real(topology, size, group, 0.5)

        preflight.bandwidth = bandwidth
    if topology.rank == 2 and fault == "no run.dir":
        preflight._appears = lambda path: False
    if fault == "too slow":
        config = tiny_config("x", run__dir=folder, cluster__min_all_reduce_gbps=1e6)
    if fault == "never":
        config = tiny_config("x", run__dir=folder, cluster__preflight="never")
    lines = []
    preflight.LOG.info = lambda text, *words: lines.append(text % words)
    try:
        preflight.check_nodes(config, topology, hosts)
    except UserError as error:
        return str(error), lines
    return None, lines


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (None, None),
        ("never", None),
        ("at home", None),
        ("one node", None),  # of a job
        ("other source", ["node n2", "source"]),
        ("no run.dir", ["node n2, rank 2", "does not see run.dir"]),
        ("hangs", ["n2", "did not end within 3600 s"]),
        ("too slow", ["2 nodes", "min_all_reduce_gbps"]),
    ],
)
def test_every_rank_refuses_with_the_same_words(tmp_path, fault, words):
    results = run_ranks(_check, 3, str(tmp_path), fault)
    messages = {message for message, _ in results}
    assert len(messages) == 1
    (message,) = messages
    lines = results[0][1]
    assert results[1][1] == [] == results[2][1]
    if words is None:
        assert message is None
        assert bool(lines) == (fault in (None, "one node"))
        if fault is None:
            assert lines[1].startswith("n1    0–1") and lines[2].startswith("n2    2")
            assert any("all-reduce over 3 ranks on 2 nodes" in line for line in lines)
    else:
        assert all(word in message for word in words), message
    assert not list(tmp_path.glob(".probe*")), json.dumps([str(path) for path in tmp_path.iterdir()])
