"""What watches a run from beside: nodes that fall silent, a run that is stuck, slow ranks, the heartbeat."""

import functools
import json
import socket
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megameta.cluster import monitor as monitors
from megameta.cluster.attempt import claim, how_it_ended
from megameta.cluster.heartbeat import Heartbeat, SlowRanks, read_heartbeat
from megameta.cluster.liveness import Liveness, Peer
from megameta.cluster.monitor import Monitor
from megameta.errors import EXIT_LOST
from megameta.parallel.topology import Topology
from tests.support.ranks import run_ranks
from tests.support.waiting import LIMIT, wait_until

#: Seconds of silence and between beats, on a clock that tests move: as they are waited for too, they are small.
SILENCE, BEAT = 0.1, 0.01


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Channel:
    """A socket that notes how many datagrams each address was sent, and how many it took in."""

    def __init__(self, sent):
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.fileno, self.close, self.address = self._socket.fileno, self._socket.close, self._socket.getsockname()
        self.sent, self.received = sent, 0

    def sendto(self, data, address):
        self.sent[address] += 1
        self._socket.sendto(data, address)

    def recv(self, size):
        data = self._socket.recv(size)
        self.received += 1
        return data


class Turns(threading.Event):
    """The event that a watch looks at once a turn."""

    turns = 0

    def is_set(self):
        self.turns += 1
        return super().is_set()


class Nodes:
    """The watches of several nodes of two ranks each, in one process and on one clock, which stands still by itself."""

    def __init__(self, count):
        self.clock, sent = Clock(), Counter()
        self.channels = [Channel(sent) for _ in range(2 * count)]
        peers = {r: Peer(r, r % 2, f"n{r // 2 + 1}", c.address) for r, c in enumerate(self.channels)}
        self.said, self.lock = {}, threading.Lock()
        self.watches = [
            Liveness(peers, rank, channel, "word", SILENCE, functools.partial(self.note, rank), self.clock)
            for rank, channel in enumerate(self.channels)
        ]
        for watch in self.watches:
            watch._closing = Turns()
            watch.start()
        self.settle()
        assert all(len(watch._heard) == count - 1 for watch in self.watches[::2])

    def note(self, rank, text, speaks):
        with self.lock:
            self.said[rank] = (text, speaks)

    def settle(self, without=()):
        """Until every watch that goes on has made a whole turn at this time, and has taken in all it was sent."""
        for _ in range(2):
            turns = [watch._closing.turns for watch in self.watches]

            def settled(turns=turns):
                return all(
                    (watch._closing.turns >= before + 2 and channel.received == channel.sent[channel.address])
                    or watch.lost.is_set()
                    or not watch.is_alive()
                    or rank in without
                    for rank, (watch, channel, before) in enumerate(zip(self.watches, self.channels, turns))
                )

            wait_until(settled, pause=0.001)

    def let_pass(self, seconds, without=()):
        for _ in range(round(seconds / BEAT)):
            self.clock.now += BEAT
            self.settle(without)

    def silence(self, *ranks):
        """As if their machine had no power: no good-bye."""
        for rank in ranks:
            self.watches[rank]._closing.set()
            self.watches[rank].join()

    def close(self):
        for watch in self.watches:
            watch.close()
            watch.join()
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
    found.let_pass(3 * SILENCE)
    found.silence(*lost)
    found.let_pass(0.9 * SILENCE)
    assert found.said == {}, "all of them spoke within the limit"
    found.let_pass(0.3 * SILENCE)
    assert set(found.said) == set(range(6)) - set(lost)
    assert [rank for rank, (_, speaks) in found.said.items() if speaks] == [speaker]
    node = f"n{lost[0] // 2 + 1}"
    assert all(f"lost node {node} (ranks {lost[0]}–{lost[1]})" in text for text, _ in found.said.values())


def test_two_nodes_at_once_are_named_together_and_who_is_alone_says_so(nodes):
    found = nodes(3)
    found.silence(2, 3, 4, 5)
    found.let_pass(1.2 * SILENCE)
    assert set(found.said) == {0, 1}
    assert "node n1 hears none of the 2 other nodes" in found.said[0][0]


def test_who_says_goodbye_is_not_lost(nodes):
    found = nodes(2)
    found.watches[2].close()
    found.settle()
    assert found.watches[0].has_left(2) and found.watches[0].has_left(3)
    found.let_pass(2 * SILENCE)
    assert found.said == {} and found.watches[0].is_alive()


def test_datagrams_of_others_are_not_believed(nodes):
    found = nodes(2)
    for data in (
        b"\xff",
        b"[]",
        b"{}",
        json.dumps({"token": "guess", "kind": "lost", "text": "x", "rank": 2}).encode(),
    ):
        found.channels[3].sendto(data, found.channels[0].address)
    found.settle()
    assert found.said == {} and found.watches[0].is_alive()


def test_a_pause_of_its_own_is_not_the_silence_of_others(nodes, monkeypatch):
    found = nodes(2)
    watch = found.watches[0]
    receive, paused, goes_on = watch._receive, threading.Event(), threading.Event()

    def pausing():
        if paused.is_set():
            return receive()
        paused.set()
        return not goes_on.wait(LIMIT)

    monkeypatch.setattr(watch, "_receive", pausing)
    found.clock.now += BEAT
    wait_until(paused.is_set)
    found.let_pass(1.5 * SILENCE, without=(0,))
    assert set(found.said) == {1, 2, 3}, "to the others it was lost"
    goes_on.set()
    found.settle()
    assert 0 not in found.said and watch.is_alive()


# --- stuck, superseded ----------------------------------------------------------------------------------------------


def watched(tmp_path, timeout):
    """A monitor of a lone rank, on a clock that tests move: (it, its looks so far, set when it leaves, its codes)."""
    left, codes, looks = threading.Event(), [], []

    def leave(code):
        codes.append(code)
        left.set()

    monitor = Monitor(claim(tmp_path), Topology(1, 0, 0), ["n1"], None, timeout, leave, 0.01, Clock())
    look = monitor._look
    monitor._look = lambda: looks.append(look())
    return monitor, looks, left, codes


def look_again(looks):
    """Until it has looked once more, from beginning to end."""
    seen = len(looks)
    wait_until(lambda: len(looks) >= seen + 2)


def test_progress_keeps_the_watchdog_quiet_and_its_lack_ends_the_run(tmp_path, capfd):
    monitor, looks, left, codes = watched(tmp_path, 1800.0)
    monitor.start()
    for _ in range(3):
        monitor._clock.now += 1799.0
        look_again(looks)
        assert codes == []
        monitor.progress()
    monitor._clock.now += 1801.0
    assert left.wait(LIMIT)
    monitor.close("failed")
    assert set(codes) == {EXIT_LOST}
    said = capfd.readouterr().err
    assert "no step, evaluation or checkpoint has ended for 30 minutes" in said
    assert "test_watch.py" in said and "rank 0 on n1 · collectives begun: none yet" in said, "the stack of this thread"
    attempt = monitor._attempt
    assert "test_watch.py" in (attempt.folder / "stack_rank_0.txt").read_text()
    assert how_it_ended(attempt)["kind"] == "stuck"


def test_a_superseded_attempt_leaves(tmp_path, capfd):
    monitor, looks, left, codes = watched(tmp_path, 0.0)
    monitor.start()
    look_again(looks)
    assert codes == []
    claim(tmp_path)
    assert left.wait(LIMIT) and codes[0] == EXIT_LOST
    monitor.close("failed")
    assert "attempt 2 has started" in capfd.readouterr().err
    assert how_it_ended(monitor._attempt)["kind"] == "superseded"


def _one_rank_lags(topology, folder):
    """Rank 1 makes two collectives fewer than rank 0 waits for; both are seen by their watchdogs."""
    from megameta.cluster.attempt import Attempt

    monitors.STACK_SECONDS = LIMIT
    number, path = 1, Path(folder) / "logs" / "attempt_0001"
    if topology.is_main:
        claim(Path(folder))
    dist.barrier()
    left, clock, group = threading.Event(), Clock(), dist.group.WORLD

    def leave(code):
        left.set()
        threading.Event().wait()

    monitor = Monitor(Attempt(number, path), topology, ["n1", "n2"], None, 1800.0, leave, 0.01, clock)
    monitor.groups = {"world": group}
    for _ in range(3):
        dist.all_reduce(torch.ones(1))
    monitor.start()
    begun = group._get_sequence_number_for_group()
    if topology.is_main:  # hangs in a collective that the other one never joins
        threading.Thread(target=lambda: dist.all_reduce(torch.ones(1)), daemon=True).start()
        wait_until(lambda: group._get_sequence_number_for_group() > begun)
    clock.now += 1801.0
    assert left.wait(LIMIT)
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
        last = 0
        while last < 200:
            found = read_heartbeat(tmp_path)
            if found is None:  # not there, or not whole
                assert last == 0
                continue
            assert found["attempt"] == 3 and found["step"] >= last
            last = found["step"]
    finally:
        stop.set()
        thread.join()
