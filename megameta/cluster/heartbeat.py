"""RUN/logs/attempt_N/heartbeat.json: where an attempt stands, for ``megameta status``; and which rank is slow.

The training thread assigns plain values; a thread of its own writes them every few seconds. Nothing here waits for a
device or talks to another rank.
"""

import json
import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megameta.errors import EXIT_INTERRUPTED, EXIT_OK

#: Seconds between two heartbeats.
INTERVAL = 5.0
#: Phases of an attempt. Those of the second line are ends.
STARTING, TRAINING, EVALUATING, SAVING = "starting", "training", "evaluating", "saving"
DONE, STOPPED, FAILED = "done", "stopped", "failed"
PHASE_OF = {EXIT_OK: DONE, EXIT_INTERRUPTED: STOPPED}


class SlowRanks:
    """Seconds of each rank's forward pass over the last steps; the engine gathers them with the losses."""

    def __init__(self, hosts: Sequence[str], factor: float, window: int = 20) -> None:
        self._hosts, self._factor = hosts, factor
        self._steps: deque[Sequence[float]] = deque(maxlen=window)

    def add(self, seconds: Sequence[float]) -> None:
        """One step's, by rank; 0 where a rank has none."""
        self._steps.append(seconds)

    def slowest(self) -> dict[str, Any] | None:
        """The slowest rank by its median, with its host and how many times the median rank it takes; None so far."""
        steps = [step for step in list(self._steps) if len(step) == len(self._hosts) and min(step) > 0]
        if len(steps) < 10 or len(self._hosts) < 2:
            return None
        medians = [statistics.median(ranks) for ranks in zip(*steps)]
        rank = max(range(len(medians)), key=medians.__getitem__)
        # Against the others: among two, the median of both would hide half of the difference.
        typical = statistics.median(medians[:rank] + medians[rank + 1 :])
        return {
            "rank": rank,
            "host": self._hosts[rank],
            "seconds": medians[rank],
            "times_median": medians[rank] / typical,
            "slow": medians[rank] > self._factor * typical,
        }


@dataclass
class Heartbeat:
    """What the file holds. The training thread sets fields; ``write`` runs on another."""

    path: Path
    fixed: dict[str, Any]
    """Of the attempt: number, host, pid, job, ranks, hosts, num_steps."""
    slow_ranks: SlowRanks
    phase: str = STARTING
    step: int = 0
    numbers: dict[str, Any] = field(default_factory=dict)
    """loss, tokens_per_second, eta_seconds of the last step."""
    saved_step: int = 0

    def write(self) -> dict[str, Any]:
        """Replace the file; what it holds now. It is not synced: after a power cut an older one will do."""
        record = {
            **self.fixed,
            "time": time.time(),
            "phase": self.phase,
            "step": self.step,
            **self.numbers,
            "saved_step": self.saved_step,
            "slowest_rank": self.slow_ranks.slowest(),
        }
        work = self.path.with_name(f".{self.path.name}.writing")
        work.write_text(json.dumps(record) + "\n", encoding="utf-8")
        os.replace(work, self.path)
        return record


def read_heartbeat(folder: Path) -> dict[str, Any] | None:
    """The last heartbeat of an attempt; None where there is none that can be read."""
    try:
        record = json.loads((folder / "heartbeat.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
