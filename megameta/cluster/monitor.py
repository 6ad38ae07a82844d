"""What watches a rank from beside its training thread: heartbeat, fence, watchdog, slow ranks.

A thread wakes every few seconds. It reads what the training thread has assigned and takes no lock; a step costs the
assignment of a few values. Where it ends the process it says why, and every rank comes to the same end by itself.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megameta.cluster.attempt import STUCK, SUPERSEDED, Attempt
from megameta.cluster.heartbeat import INTERVAL, Heartbeat
from megameta.errors import EXIT_LOST, Superseded
from megameta.log import LOG
from megameta.parallel.topology import Topology

#: Seconds after its own stack in which a rank leaves the others time to write theirs.
STACK_SECONDS = 6.0
#: Seconds between two reports of a slow rank.
SLOW_REPORT_SECONDS = 600.0


class Monitor(threading.Thread):
    """The watch over one rank.

    Args:
        timeout: seconds without progress after which the run is stuck; 0: not watched.
        hosts: host names by rank.
        leave: ends the process with an exit code (tests put another in its place).
        clock: seconds that only grow (tests put one that they move in its place).
    """

    def __init__(
        self,
        attempt: Attempt,
        topology: Topology,
        hosts: list[str],
        heartbeat: Heartbeat | None,
        timeout: float,
        leave: Callable[[int], Any] = os._exit,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="monitor", daemon=True)
        self._attempt, self._topology, self._hosts = attempt, topology, hosts
        self.heartbeat = heartbeat
        self._timeout, self._leave, self._interval = timeout, leave, interval
        self._clock = clock
        self._progress = clock()
        self._closing = threading.Event()
        self._reported_slow = -SLOW_REPORT_SECONDS
        self.groups: Mapping[str, Any] = {}
        """Process groups by name, whose position the watchdog tells."""

    def progress(self) -> None:
        """A step, an evaluation or a checkpoint has ended."""
        self._progress = self._clock()

    def run(self) -> None:
        """Watch until ``close``."""
        pause = min(self._interval, self._timeout / 4) if self._timeout else self._interval
        while not self._closing.wait(pause):
            if self._timeout:
                # Should the training thread never let go of Python's lock, this one cannot run; C code can.
                faulthandler.dump_traceback_later(self._timeout + 60, exit=True)
            self._look()
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        if self._topology.local_rank == 0:
            try:
                self._attempt.check()
            except Superseded as error:
                self._stop_superseded(error)
        if self.heartbeat is not None:
            self.beat()
        if self._timeout and self._clock() - self._progress > self._timeout:
            self._stop_stuck()

    def beat(self) -> None:
        """Write the heartbeat now, and report a slow rank at times."""
        if self.heartbeat is None:
            return
        try:
            slowest = self.heartbeat.write()["slowest_rank"]
        except OSError:  # a full disk stops the run where it matters: at the next checkpoint, with a message
            return
        if slowest and slowest["slow"] and time.monotonic() - self._reported_slow > SLOW_REPORT_SECONDS:
            self._reported_slow = time.monotonic()
            LOG.info(
                "slow rank: %d on %s takes %.2f times as long as the others for a forward pass (%.0f ms)",
                slowest["rank"],
                slowest["host"],
                slowest["times_median"],
                1e3 * slowest["seconds"],
            )

    def close(self, phase: str) -> None:
        """The attempt has ended: the last heartbeat says how."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=2 * INTERVAL)
        if self.heartbeat is not None:
            self.heartbeat.phase = phase
            self.beat()

    # --- ends -------------------------------------------------------------------------------------------------------

    def _stop_superseded(self, error: Superseded) -> None:
        LOG.info("%s", error)
        self._attempt.note_end(SUPERSEDED, str(error))
        print(f"error: {error}", file=sys.stderr, flush=True)
        self._leave(EXIT_LOST)

    def _stop_stuck(self) -> None:
        """Print this rank's stack and place; rank 0 also says who is behind. Every rank does this by itself."""
        rank, minutes = self._topology.rank, self._timeout / 60
        begun = positions(self.groups)
        head = f"rank {rank} on {self._hosts[rank]} · collectives begun: {begun}"
        path = self._attempt.folder / f"stack_rank_{rank}.txt"
        with contextlib.suppress(OSError):
            with path.with_suffix(".writing").open("w", encoding="utf-8") as file:
                file.write(head + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            os.replace(path.with_suffix(".writing"), path)
        print(f"\n{head}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        end = time.monotonic() + STACK_SECONDS
        world = self._topology.world_size
        while time.monotonic() < end and len(_stacks(self._attempt.folder)) < world:
            time.sleep(0.2)
        if rank == 0:
            said = [
                self._heads().get(other, f"rank {other} on {host}: said nothing")
                for other, host in enumerate(self._hosts)
            ]
            message = "\n  ".join(
                [
                    f"no step, evaluation or checkpoint has ended for {minutes:g} minutes: the run is stuck and stops."
                    f" Stacks are in {self._attempt.folder}/stack_rank_N.txt; ranks whose count of collectives is lower"
                    " than others' are the ones that are waited for:",
                    *said[:64],
                    *([f"… and {len(said) - 64} more"] if len(said) > 64 else []),
                ]
            )
            self._attempt.note_end(STUCK, message)
            print(f"error: {message}", file=sys.stderr, flush=True)
        else:
            time.sleep(1.0)  # rank 0 speaks before the launcher ends it for a rank that has left
        self._leave(EXIT_LOST)

    def _heads(self) -> dict[int, str]:
        found = {}
        for path in _stacks(self._attempt.folder):
            with contextlib.suppress(OSError, ValueError, IndexError):
                found[int(path.stem.rpartition("_")[2])] = path.read_text(encoding="utf-8").splitlines()[0]
        return found


def _stacks(folder: Path) -> list[Path]:
    return list(folder.glob("stack_rank_*.txt"))


def positions(groups: Mapping[str, Any]) -> str:
    """How many collectives this rank has begun in each process group: torch's own sequence numbers."""
    parts = []
    for name, group in groups.items():
        try:
            parts.append(f"{name} {group._get_sequence_number_for_group()}")
        except RuntimeError:  # a backend that does not count
            parts.append(f"{name} ?")
    return ", ".join(parts) or "none yet"
