"""``megameta slurm run``: what a batch script becomes. It starts srun, passes the warning on, and decides at the end.

The batch script gets the signal that ``--signal=B:USR1@SECONDS`` asks for; the ranks do not. So this process stands
where the batch shell was (``exec``), runs srun as its child and sends the warning to it, which sends it to every task.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megameta.cluster.attempt import attempt, how_it_ended, newest_number, saved_step
from megameta.cluster.slurm.decide import Action, Decision, Ended, decide
from megameta.cluster.slurm.environment import ask, expand_hosts, job_state
from megameta.errors import UserError

#: RUN/logs/jobs.jsonl: a line for every end of a job's ranks.
LEDGER = "jobs.jsonl"
#: Seconds in which SLURM should have requeued a job whose node it has noticed to be gone, beyond its own timeout.
PATIENCE = 120.0


def run_job(run_dir: Path, command: Sequence[str], *, chain: bool) -> int:
    """Run a command that starts all ranks, and do with the job what follows from its end; the exit code.

    Args:
        run_dir: of the run, whose attempts tell what happened.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or not command:
        raise UserError("megameta slurm run belongs into a batch script: sbatch slurm/pretrain.sbatch CONFIG")
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    say(f"job {job}, restart {restart}, nodes {os.environ.get('SLURM_JOB_NODELIST')}")
    saved_before, own = saved_step(run_dir), newest_number(run_dir) + 1
    code = _run_ranks(command)
    end = how_it_ended(attempt(run_dir, own))  # not the newest: this may be a stale process, and that another job's
    if end is not None:
        say(f"attempt {own}: {end.get('message')}")
    shown = _show_job(job)
    ended = Ended(
        code=code,
        stale=_runs_elsewhere(shown, restart),
        state=job_state(job),
        kind=end.get("kind") if end is not None else None,
        failures=failures_in_a_row(read_ledger(run_dir), saved_step(run_dir)),
        chain=chain,
        requeues=shown.get("Requeue") != "0",
    )
    decision = decide(ended)
    record = {"job": job, "restart": restart, "code": code, "state": ended.state, "kind": ended.kind}
    record |= {"saved_before": saved_before, "saved": saved_step(run_dir), "failed": decision.is_failure}
    _append(run_dir, {**record, "action": decision.action.value, "time": time.time()})
    say(f"the ranks have ended with code {code}, the job is {ended.state}: {decision.reason} → {decision.action.value}")
    return _carry_out(decision, job, restart)


def say(line: str) -> None:
    """A line in the job's own output."""
    print(f"megameta: {time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _run_ranks(command: Sequence[str]) -> int:
    """The command's exit code, 128 + n for a signal. USR1 is passed on; TERM reaches the ranks without us."""
    process: subprocess.Popen | None = None
    early: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        say(f"{signal.Signals(number).name}: the ranks are told to finish their step, save and end")
        if process is None:
            early.append(number)
        elif process.poll() is None:
            process.send_signal(number)

    def note(number: int, _frame: object) -> None:
        # scancel and a preemption send it to the ranks, too; srun would end the step at once, if we sent it on.
        say(f"{signal.Signals(number).name}: SLURM ends this job, or pre-empts it")

    signal.signal(signal.SIGUSR1, pass_on)
    signal.signal(signal.SIGTERM, note)
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise UserError(f"cannot start {command[0]}: {error.strerror}") from error
    for number in early:
        process.send_signal(number)
    code = process.wait()
    return code if code >= 0 else 128 - code


# --- what happened before -------------------------------------------------------------------------------------------


def read_ledger(run_dir: Path) -> list[dict[str, Any]]:
    """Records of RUN/logs/jobs.jsonl; lines that a kill has cut are left out."""
    path = run_dir / "logs" / LEDGER
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict)]


def failures_in_a_row(records: Sequence[dict[str, Any]], saved: int) -> int:
    """Failures at the end of the ledger, back to one that left the run at an earlier checkpoint than it is at now."""
    count = 0
    for record in reversed(records):
        if not record.get("failed") or record.get("saved") != saved:
            break
        count += 1
    return count


def _append(run_dir: Path, record: dict[str, Any]) -> None:
    path = run_dir / "logs" / LEDGER
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


# --- what to do -----------------------------------------------------------------------------------------------------


def _show_job(job: str) -> dict[str, str]:
    """Fields of a job; none where the controller does not answer."""
    words = (ask("scontrol", "--oneliner", "show", "job", job) or "").split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def _runs_elsewhere(shown: dict[str, str], restart: str) -> bool:
    """Whether the controller has started the job again since; False where it did not answer."""
    return shown.get("Restarts", restart) != restart


def _carry_out(decision: Decision, job: str, restart: str) -> int:
    if decision.action in (Action.FINISH, Action.GIVE_UP):
        _cancel_waiting_links(job)
    if decision.action is Action.WAIT:
        _wait_for_slurm(job, restart)
    if decision.action in (Action.WAIT, Action.REQUEUE):
        return _requeue(job, restart, decision.code)
    return decision.code


def _requeue(job: str, restart: str, code: int) -> int:
    """Put the job back into the queue; SLURM ends this process while it does."""
    # Asked again: this node may have been cut off when the decision was made, and the controller may answer now.
    if _runs_elsewhere(_show_job(job), restart):
        say("the job runs elsewhere by now: not requeued")
        return code
    state = job_state(job)
    if state is not None and state != "RUNNING":
        say(f"the job is {state or 'gone'} by now: not requeued")
        return code
    if ask("scontrol", "requeue", job) is None:
        say("scontrol requeue failed (the cluster may not allow it): submit the job again, or submit a --chain")
        return code
    time.sleep(PATIENCE)  # SLURM's TERM and KILL come meanwhile
    return code


def _wait_for_slurm(job: str, restart: str) -> None:
    """Leave SLURM the time to notice the lost node: it then requeues the job without that node."""
    hosts = expand_hosts(os.environ.get("SLURM_JOB_NODELIST", "localhost"))
    limit = _slurmd_timeout() + PATIENCE
    say(f"waiting for up to {limit:.0f} s for SLURM to notice which node is gone; it requeues the job then")
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if job_state(job) not in ("RUNNING", None) or _runs_elsewhere(_show_job(job), restart):
            return
        shown = ask("sinfo", "--noheader", f"--nodes={','.join(hosts)}", "--Node", "--format=%N %T") or ""
        down = [line.split()[0] for line in shown.splitlines() if "down" in line.lower()]
        if down:
            say(f"SLURM has noticed: {', '.join(sorted(set(down)))} down")
            time.sleep(10.0)  # it requeues the job in the same breath
            return
        time.sleep(2.0)


def _slurmd_timeout() -> float:
    shown = ask("scontrol", "show", "config") or ""
    for line in shown.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "SlurmdTimeout":
            return float(value.split()[0])
    return 300.0


def _cancel_waiting_links(job: str) -> None:
    """Links of a chain have one job name, which holds the run's place on disk: none of another run is hit."""
    name = os.environ.get("SLURM_JOB_NAME", "")
    if not re.fullmatch(r"megameta-.+-[0-9a-f]{8}", name):
        return
    waiting = ask("squeue", "--noheader", "--me", "--states=PENDING", f"--name={name}", "--format=%A") or ""
    others = sorted({word for word in waiting.split() if word != job})
    if others:
        say(f"cancelling the links of the chain that wait: {' '.join(others)}")
        ask("scancel", *others)
