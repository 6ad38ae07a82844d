"""What watches a run from beside: nodes that fall silent, a run that is stuck, slow ranks, the heartbeat."""

import json
import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist

from megameta.attempt import claim, how_it_ended
from megameta.errors import EXIT_LOST
from megameta.parallel.liveness import Liveness, Peer
from megameta.parallel.topology import Topology
from megameta.train import monitor as monitors
from megameta.train.heartbeat import Heartbeat, SlowRanks, read_heartbeat
from megameta.train.monitor import Monitor
from tests.support.ranks import run_ranks

#: Seconds of silence in these tests; threads of a busy machine pause for a while.
LIMIT = 4.0


class Nodes:
    """The watches of several nodes of two ranks each, in one process."""

    def __init__(self, count):
        channels = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2 * count)]
        for channel in channels:
            channel.bind(("127.0.0.1", 0))
            channel.setblocking(False)
        peers = {r: Peer(r, r % 2, f"n{r // 2 + 1}", c.getsockname()) for r, c in enumerate(channels)}
        self.said, self.lock = {}, threading.Lock()
        self.channels = channels
        self.watches = [
            Liveness(peers, rank, channel, "word", LIMIT, lambda text, speaks, rank=rank: self.note(rank, text, speaks))
            for rank, channel in enumerate(channels)
        ]
        for watch in self.watches:
            watch.start()
        self.until(lambda: all(len(watch._heard) == count - 1 for watch in self.watches[::2]))

    def note(self, rank, text, speaks):
        with self.lock:
            self.said[rank] = (text, speaks)

    def until(self, what, seconds=60):
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, self.said
            time.sleep(0.02)

    def silence(self, *ranks):
        """As if their machine had no power: no good-bye."""
        for rank in ranks:
            self.watches[rank]._closing.set()

    def close(self):
        for watch in self.watches:
            watch.close()
            watch.join(20)
        for channel in self.channels:
            channel.close()


@pytest.fixture
def nodes():
    made = []
    yield lambda count: made.append(Nodes(count)) or made[-1]
    for found in made:
        found.close()


@pytest.mark.parametrize(("lost", "speaker"), [((4, 5), 0), ((0, 1), 2)])
def test_a_silent_node_is_named_once_and_all_ranks_leave(nodes, lost, speaker):
    found = nodes(3)
    found.silence(*lost)
    rest = set(range(6)) - set(lost)
    found.until(lambda: set(found.said) == rest)
    assert [rank for rank, (_, speaks) in found.said.items() if speaks] == [speaker]
    node = f"n{lost[0] // 2 + 1}"
    assert all(f"lost node {node} (ranks {lost[0]}–{lost[1]})" in text for text, _ in found.said.values())


def test_two_nodes_at_once_are_named_together_and_who_is_alone_says_so(nodes):
    found = nodes(3)
    found.silence(2, 3, 4, 5)
    found.until(lambda: set(found.said) == {0, 1})
    assert "node n1 hears none of the 2 other nodes" in found.said[0][0]


def test_who_says_goodbye_is_not_lost(nodes):
    found = nodes(2)
    found.watches[2].close()
    found.until(lambda: found.watches[0].has_left(2) and found.watches[0].has_left(3))
    time.sleep(LIMIT + 1.0)
    assert found.said == {}


def test_datagrams_of_others_are_not_believed(nodes):
    found = nodes(2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for data in (
            b"\xff",
            b"[]",
            b"{}",
            json.dumps({"token": "guess", "kind": "lost", "text": "x", "rank": 2}).encode(),
        ):
            stranger.sendto(data, found.channels[0].getsockname())
    time.sleep(1.0)
    assert found.said == {} and found.watches[0].is_alive()


def test_a_pause_of_its_own_is_not_the_silence_of_others(nodes, monkeypatch):
    found = nodes(2)
    watch = found.watches[0]
    receive, paused = watch._receive, []

    def pausing():
        if not paused:
            paused.append(time.sleep(1.5 * LIMIT))
        return receive()

    monkeypatch.setattr(watch, "_receive", pausing)
    found.until(lambda: paused)
    time.sleep(1.0)
    assert 0 not in found.said


# --- stuck, superseded ----------------------------------------------------------------------------------------------


def watched(tmp_path, rank, world, timeout, **options):
    attempt = claim(tmp_path) if rank == 0 else None
    left = threading.Event()
    codes = []

    def leave(code):
        codes.append(code)
        left.set()

    monitor = Monitor(attempt, Topology(world, rank, 0), ["n1", "n2"][:world], None, timeout, leave, 0.1, **options)
    return monitor, left, codes


def test_progress_keeps_the_watchdog_quiet_and_its_lack_ends_the_run(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(monitors, "STACK_SECONDS", 0.2)
    monitor, left, codes = watched(tmp_path, 0, 1, 3.0)
    monitor.start()
    end = time.monotonic() + 5.0
    while time.monotonic() < end:
        monitor.progress()
        time.sleep(0.05)
    assert codes == []
    assert left.wait(60)
    monitor._closing.set()
    assert set(codes) == {EXIT_LOST}
    said = capfd.readouterr().err
    assert "no step, evaluation or checkpoint has ended for 0.05 minutes" in said
    assert "test_watch.py" in said and "rank 0 on n1 · collectives begun: none yet" in said, "the stack of this thread"
    attempt = monitor._attempt
    assert "test_watch.py" in (attempt.folder / "stack_rank_0.txt").read_text()
    assert how_it_ended(attempt)["kind"] == "stuck"


def test_a_superseded_attempt_leaves(tmp_path, capfd):
    monitor, left, codes = watched(tmp_path, 0, 1, 0.0)
    monitor.start()
    time.sleep(0.5)
    assert codes == []
    claim(tmp_path)
    assert left.wait(30) and codes[0] == EXIT_LOST
    monitor._closing.set()
    assert "attempt 2 has started" in capfd.readouterr().err
    assert how_it_ended(monitor._attempt)["kind"] == "superseded"


def _one_rank_lags(topology, folder):
    """Rank 1 makes two collectives fewer than rank 0 waits for; both are seen by their watchdogs."""
    from pathlib import Path

    from megameta.attempt import Attempt

    number, path = 1, Path(folder) / "logs" / "attempt_0001"
    if topology.is_main:
        claim(Path(folder))
    dist.barrier()
    left = threading.Event()
    monitor = Monitor(
        Attempt(number, path), topology, ["n1", "n2"], None, 2.0, lambda code: left.set() or time.sleep(3600), 0.1
    )
    monitor.groups = {"world": dist.group.WORLD}
    for _ in range(3):
        dist.all_reduce(torch.ones(1))
    monitor.start()
    if topology.is_main:  # hangs in a collective that the other one never joins
        threading.Thread(target=lambda: dist.all_reduce(torch.ones(1)), daemon=True).start()
    assert left.wait(60)
    if not topology.is_main:
        dist.all_reduce(torch.ones(1))
    return how_it_ended(Attempt(number, path))


def test_the_rank_that_is_waited_for_can_be_told(tmp_path):
    said = run_ranks(_one_rank_lags, 2, str(tmp_path))[0]["message"]
    counts = [int(line.rpartition("world ")[2]) for line in said.splitlines() if line.strip().startswith("rank ")]
    assert len(counts) == 2 and counts[0] == counts[1] + 1, said
    assert "rank 1 on n2" in said


# --- heartbeat and slow ranks ---------------------------------------------------------------------------------------


def test_slow_ranks():
    slow = SlowRanks(["n1", "n1", "n2", "n2"], factor=1.3)
    for _ in range(9):
        slow.add([1.0, 1.1, 1.6, 0.9])
        assert slow.slowest() is None, "too few steps to tell"
    for step in range(20):
        slow.add([1.0, 1.1, 9.0 if step == 3 else 1.6, 0.9])
    found = slow.slowest()
    assert (found["rank"], found["host"], found["slow"]) == (2, "n2", True)
    assert found["times_median"] == pytest.approx(1.6)
    for _ in range(20):
        slow.add([1.0, 1.1, 1.2, 0.9])
    assert slow.slowest()["slow"] is False
    for _ in range(20):
        slow.add([1.0, 1.1, 0.0, 0.9])  # a layout that does not measure
    assert slow.slowest() is None


def test_the_heartbeat_is_whole_at_every_moment(tmp_path):
    path = tmp_path / "heartbeat.json"
    heartbeat = Heartbeat(path, {"attempt": 3}, SlowRanks(["n1"], 1.3))
    assert read_heartbeat(tmp_path) is None
    stop = threading.Event()

    def writing():
        while not stop.is_set():
            heartbeat.step += 1
            heartbeat.write()

    thread = threading.Thread(target=writing)
    thread.start()
    try:
        deadline, last = time.monotonic() + 30, 0
        while last < 200 and time.monotonic() < deadline:
            found = read_heartbeat(tmp_path)
            if found is not None:
                assert found["attempt"] == 3 and found["step"] >= last
                last = found["step"]
    finally:
        stop.set()
        thread.join()
    assert last >= 200
