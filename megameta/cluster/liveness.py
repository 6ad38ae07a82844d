"""Whether the nodes of a run still answer, by small datagrams between them.

A node that loses power or its network leaves the others waiting in a collective, for as long as that may take (minutes
under NCCL, half an hour under gloo) and without a name. Here the first rank of every node tells those of the others
about once a second that it is there; one that was heard and then is not for ``limit`` seconds is lost. The lowest rank
that is left says so once, tells all ranks, and everyone leaves. No collective is used and the training thread takes no
part. Where datagrams cannot pass (a firewall), nobody is ever heard and so nobody is lost.
"""

import json
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.distributed as dist

from megameta.cluster.slurm.environment import host_name
from megameta.parallel.topology import Topology


@dataclass(frozen=True)
class Peer:
    """A rank, as the others reach it."""

    rank: int
    local_rank: int
    host: str
    address: tuple[str, int]


class Liveness(threading.Thread):
    """The watch of one rank over the other nodes.

    Args:
        on_lost: called once on this thread with (message, whether this rank is the one to say it); it ends the process.
        clock: seconds that only grow (tests put one that they move in its place).
    """

    def __init__(
        self,
        peers: Mapping[int, Peer],
        rank: int,
        channel: socket.socket,
        token: str,
        limit: float,
        on_lost: Callable[[str, bool], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="liveness", daemon=True)
        self._clock = clock
        self._peers, self._me, self._socket, self._token = peers, peers[rank], channel, token
        self._limit, self._interval, self._on_lost = limit, min(1.0, limit / 10), on_lost
        self._leaders = [peer for peer in peers.values() if peer.local_rank == 0 and peer.rank != rank]
        self._heard: dict[int, float] = {}
        self._left: set[int] = set()
        self._closing = threading.Event()
        self.lost = threading.Event()
        """Set when nodes are lost, just before ``on_lost``."""

    @property
    def limit(self) -> float:
        """Seconds of silence."""
        return self._limit

    def has_left(self, rank: int) -> bool:
        """Whether the first rank of this rank's node has said good-bye."""
        host = self._peers[rank].host
        return any(peer.rank in self._left for peer in self._leaders if peer.host == host)

    def run(self) -> None:
        """Beat and listen until ``close`` or a loss."""
        next_beat = looked = self._clock()
        while not self._closing.is_set():
            now = self._clock()
            if now - looked > 0.3 * self._limit:
                # This thread did not run (a stopped process, Python's lock held): the others' silence is its own.
                self._heard = dict.fromkeys(self._heard, now)
            looked = now
            if now >= next_beat:
                next_beat = now + self._interval
                if self._me.local_rank == 0:
                    self._tell(self._leaders, {"kind": "here"})
                    if self._judge(now):
                        return
            ready, _, _ = select.select([self._socket], [], [], max(0.0, next_beat - self._clock()))
            if ready and self._receive():
                return

    def close(self) -> None:
        """Say good-bye: this rank ends, and is not lost."""
        if self._closing.is_set() or self.lost.is_set():
            return
        self._closing.set()
        if self._me.local_rank == 0:
            for _ in range(3):
                self._tell(self._leaders, {"kind": "bye"})

    # --- datagrams --------------------------------------------------------------------------------------------------

    def _tell(self, peers: list[Peer], message: dict) -> None:
        data = json.dumps({"token": self._token, "rank": self._me.rank, **message}).encode()
        for peer in peers:
            try:
                self._socket.sendto(data, peer.address)
            except OSError:  # no route to it, say: its silence will tell
                continue

    def _receive(self) -> bool:
        """Take in a datagram; True where it tells of a loss."""
        try:
            message = json.loads(self._socket.recv(65536))
        except (OSError, ValueError):
            return False
        if not isinstance(message, dict) or message.get("token") != self._token:
            return False  # of another run
        rank = int(message.get("rank", -1))
        if message.get("kind") == "lost":
            self._leave(str(message.get("text")), speaks=False)
            return True
        if rank in self._peers:
            self._heard[rank] = self._clock()
            if message.get("kind") == "bye":
                self._left.add(rank)
        return False

    # --- judgement --------------------------------------------------------------------------------------------------

    def _judge(self, now: float) -> bool:
        watched = [peer for peer in self._leaders if peer.rank in self._heard and peer.rank not in self._left]
        silence = {peer.rank: now - self._heard[peer.rank] for peer in watched}
        if not any(quiet > self._limit for quiet in silence.values()):
            return False
        # Several nodes behind one switch are lost together: name them together.
        lost = [peer for peer in watched if silence[peer.rank] > 0.7 * self._limit]
        alive = [peer.rank for peer in watched if peer not in lost]
        speaks = self._me.rank < min(alive, default=self._me.rank + 1)
        text = self._message(lost, alone=not alive and len(lost) > 1)
        if speaks:
            for _ in range(3):
                self._tell(
                    [peer for peer in self._peers.values() if peer != self._me and peer not in lost], _lost(text)
                )
        else:
            # The one that speaks comes to the same conclusion about now; its message also reaches the other ranks here.
            end = self._clock() + 3.0
            while self._clock() < end:
                ready, _, _ = select.select([self._socket], [], [], 0.2)
                if ready and self._receive():
                    return True
        self._leave(text, speaks)
        return True

    def _leave(self, text: str, speaks: bool) -> None:
        self.lost.set()
        self._on_lost(text, speaks)

    def _message(self, lost: list[Peer], *, alone: bool) -> str:
        if alone:
            return (
                f"node {self._me.host} hears none of the {len(lost)} other nodes for {self._limit:g} s:"
                " it is cut off from them"
            )
        names = ", ".join(f"{peer.host} ({_ranks(self._peers, peer.host)})" for peer in lost)
        return (
            f"lost {'node' if len(lost) == 1 else 'nodes'} {names}: no sign of life for {self._limit:g} s;"
            " the others stop. Started again, the run goes on from its last checkpoint"
        )


def _lost(text: str) -> dict:
    return {"kind": "lost", "text": text}


def _ranks(peers: Mapping[int, Peer], host: str) -> str:
    ranks = sorted(peer.rank for peer in peers.values() if peer.host == host)
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}–{ranks[-1]}"


def watch_nodes(topology: Topology, limit: float, on_lost: Callable[[str, bool], None]) -> Liveness | None:
    """Start the watch: collective. None where all ranks are on one machine, or ``limit`` is 0."""
    hosts = gather_hosts(topology)
    if limit <= 0 or len(set(hosts)) == 1:
        return None
    channel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    channel.bind(("", 0))
    channel.setblocking(False)
    peers, token = _exchange(topology, hosts, channel.getsockname()[1])
    watch = Liveness(peers, topology.rank, channel, token, limit, on_lost)
    watch.start()
    return watch


def gather_hosts(topology: Topology) -> list[str]:
    """Host names by rank: collective."""
    hosts: list[str] = [""] * topology.world_size
    dist.all_gather_object(hosts, host_name())
    return hosts


def _exchange(topology: Topology, hosts: list[str], port: int) -> tuple[dict[int, Peer], str]:
    """Everyone's address, and a word that datagrams of this start carry."""
    # The way to rank 0's host says which of its own addresses a machine uses; rank 0's finds it by the way to another.
    first = hosts[0]
    other = next(host for host in hosts if host != first)
    target = first if hosts[topology.rank] != first else other
    address = (_own_address(target), port)
    gathered: list = [None] * topology.world_size
    dist.all_gather_object(gathered, (topology.local_rank, address, secrets.token_hex(8)))
    peers = {
        rank: Peer(rank, local, hosts[rank], (place[0], place[1])) for rank, (local, place, _) in enumerate(gathered)
    }
    return peers, gathered[0][2]


def _own_address(host: str) -> str:
    """The address of this machine on the way to another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:  # a name that does not resolve, say: this rank will not be heard, and so not be missed
            return "127.0.0.1"
        return probe.getsockname()[0]
