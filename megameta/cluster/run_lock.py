"""The lock of a run directory: two runs in one would destroy each other's files.

The lock is flock's on RUN/.lock, which holds who has it. A process on a node that SLURM has given up may hold it for
ever: if SLURM says that its job is another restart of this one, or that it runs no longer, the lock is taken over. The
attempt number decides between two that want to (``megameta.cluster.attempt``), and stops the old one.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from megameta.cluster.attempt import Attempt, claim
from megameta.cluster.slurm.environment import ALIVE, host_name, job_state
from megameta.errors import UserError


def lock_run(directory: Path, environment: Mapping[str, str] = os.environ) -> tuple[IO[str], Attempt]:
    """Take the lock of a run directory and the next attempt number; (the open lock, the attempt).

    Raises:
        UserError: another run is using the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"
    while True:
        lock = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read_owner(lock)
            lock.close()
            return _take_over(directory, owner, environment)
        if path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
            break
        lock.close()  # someone put another file in its place meanwhile
    attempt = claim(directory)
    _write_owner(lock, attempt, environment)
    return lock, attempt


def _take_over(directory: Path, owner: dict[str, Any], environment: Mapping[str, str]) -> tuple[IO[str], Attempt]:
    if not is_gone(owner, environment):
        who = ", ".join(f"{key} {value}" for key, value in owner.items() if key in ("host", "pid", "job") and value)
        raise UserError(
            f"{directory}: another run is using this directory{f' ({who})' if who else ''}; wait for it or set run.dir"
        )
    try:
        attempt = claim(directory, owner["attempt"] + 1)
    except FileExistsError as error:
        raise UserError(f"{directory}: another run is just taking this directory over; wait for it") from error
    fresh = directory / ".lock.new"
    lock = fresh.open("w+", encoding="utf-8")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _write_owner(lock, attempt, environment)
    fresh.replace(directory / ".lock")
    return lock, attempt


def is_gone(owner: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """Whether SLURM says that the owner of a lock is not to run any more, whatever its processes do."""
    job, restart = owner.get("job"), owner.get("restart")
    if not isinstance(job, str) or not job or not isinstance(owner.get("attempt"), int):
        return False
    if job == environment.get("SLURM_JOB_ID"):
        return restart != environment.get("SLURM_RESTART_COUNT", "0")  # a job runs once at a time
    state = job_state(job)
    return state is not None and state not in ALIVE


def _read_owner(lock: IO[str]) -> dict[str, Any]:
    lock.seek(0)
    try:
        owner = json.loads(lock.read())
    except ValueError:  # of an older version, or just being written
        return {}
    return owner if isinstance(owner, dict) else {}


def _write_owner(lock: IO[str], attempt: Attempt, environment: Mapping[str, str]) -> None:
    owner = {
        "attempt": attempt.number,
        "host": host_name(environment),
        "pid": os.getpid(),
        "job": environment.get("SLURM_JOB_ID", ""),
        "restart": environment.get("SLURM_RESTART_COUNT", "0"),
    }
    lock.seek(0)
    lock.truncate()
    lock.write(json.dumps(owner) + "\n")
    lock.flush()
