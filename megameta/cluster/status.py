"""``megameta status RUN``: where a run stands, from its files alone."""

import json
import re
import time
from pathlib import Path
from typing import Any

from megameta.cluster.attempt import how_it_ended, newest_attempt, saved_step
from megameta.cluster.heartbeat import DONE, FAILED, INTERVAL, STOPPED, read_heartbeat
from megameta.cluster.slurm.environment import ask, job_state
from megameta.errors import EXIT_OK, UserError
from megameta.log import duration

#: Seconds without a heartbeat after which a run counts as dead; shared file systems may show a file late.
SILENCE = 12 * INTERVAL


def show_status(run_dir: str, *, as_json: bool) -> int:
    """Print the state of a run; the exit code.

    Raises:
        UserError: there is something else at that place.
    """
    found = run_status(Path(run_dir), time.time())
    print(json.dumps(found, indent=1) if as_json else "\n".join(describe(found)))
    return EXIT_OK


def run_status(run_dir: Path, now: float) -> dict[str, Any]:
    """What is known. "state": not started, starting, training, evaluating, saving, done, stopped, failed or dead.

    Raises:
        UserError: the path is a file, or a directory with other things in it.
    """
    attempt = newest_attempt(run_dir) if run_dir.is_dir() else None
    if attempt is None:
        _check_is_run(run_dir)
        found = {"run": str(run_dir), "state": "not started", "attempt": 0, **_from_metrics(run_dir)}
        jobs = _submitted(run_dir)
        return found if jobs is None else {**found, "jobs": jobs}
    heartbeat = read_heartbeat(attempt.folder) or {}
    end = how_it_ended(attempt)
    state = heartbeat.get("phase", "starting")
    age = now - heartbeat.get("time", attempt.folder.stat().st_mtime)
    if state not in (DONE, STOPPED, FAILED):
        if end is not None:
            state = FAILED
        elif age > SILENCE:
            state = "dead"
    found = {**_from_metrics(run_dir), **heartbeat}  # a heartbeat before the first step has no loss: the file's stays
    found |= {"run": str(run_dir), "state": state, "attempt": attempt.number, "seconds_since": age}
    found["saved_step"] = saved_step(run_dir)
    if end is not None:
        found["end"] = end
    if heartbeat.get("job"):
        found["job_state"] = job_state(str(heartbeat["job"]))
    return found


def describe(found: dict[str, Any]) -> list[str]:
    """For people, a line a matter."""
    state, age = found["state"], duration(found.get("seconds_since", 0))
    lines = [f"run        {found['run']}: {state}" + f", attempt {found['attempt']}" * (found["attempt"] > 0)]
    if state == "not started" and "jobs" in found:
        nowhere = [f"submitted, but not in the queue: its output is in {found['run']}/logs"]
        lines += [f"job        {job}" for job in found["jobs"] or nowhere]
        return lines
    if state == "not started" and "step" not in found:
        return [*lines, f"next: megameta train CONFIG run.dir={found['run']}"]
    if state == "dead":
        lines.append(
            f"           no sign of life for {age} from {found.get('host', 'its node')}; started again it goes on"
        )
    elif "seconds_since" in found:
        lines.append(f"           {age} ago on {found.get('host', '?')}, process {found.get('pid', '?')}")
    if (end := found.get("end")) is not None:
        lines.append(f"end        {end.get('kind')}: {end.get('message')}")
    if found.get("job"):
        lines.append(f"job        {found['job']} {found.get('job_state') or '(not in the queue)'}")
    total = found.get("num_steps")
    lines.append(f"step       {found.get('step', 0):,}" + (f" of {total:,}" if total else ""))
    lines += _numbers(found, under_way=state in ("training", "evaluating", "saving"))
    return lines


def _numbers(found: dict[str, Any], *, under_way: bool) -> list[str]:
    lines = []
    if found.get("loss") is not None:
        lines.append(f"loss       {found['loss']:.4f}")
    if found.get("tokens_per_second"):
        lines.append(f"tokens/s   {found['tokens_per_second']:,.0f}")
    if under_way and found.get("eta_seconds") is not None:
        lines.append(f"left       {duration(found['eta_seconds'])}")
    lines.append(f"checkpoint {'step ' + format(found['saved_step'], ',') if found.get('saved_step') else 'none yet'}")
    if hosts := found.get("hosts"):
        shown = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
        lines.append(f"ranks      {found.get('ranks')} on {shown}")
    if slowest := found.get("slowest_rank"):
        mark = ": slow" if slowest["slow"] else ""
        lines.append(
            f"slowest    rank {slowest['rank']} on {slowest['host']}, {slowest['times_median']:.2f} × the others{mark}"
        )
    return lines


def _check_is_run(run_dir: Path) -> None:
    if run_dir.is_dir() and (not any(run_dir.iterdir()) or _is_run(run_dir)):
        return
    if run_dir.exists():
        raise UserError(f"{run_dir}: not a run directory (no logs, config.yaml or checkpoints in it)")


def _submitted(run_dir: Path) -> list[str] | None:
    """Jobs of the run in SLURM's queue, each with its state and reason; None where none was ever submitted."""
    scripts = sorted((run_dir / "logs").glob("submitted-*.sbatch"))
    name = re.search(r"^#SBATCH --job-name=(\S+)$", scripts[-1].read_text(), re.M) if scripts else None
    if name is None:
        return None
    answer = ask("squeue", "--noheader", "--me", f"--name={name.group(1)}", "--format=%A %T (%r)")
    return (answer or "").splitlines()


def _is_run(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in ("config.yaml", "checkpoints", "logs", "metrics.jsonl"))


def _from_metrics(run_dir: Path) -> dict[str, Any]:
    """The last step's numbers, from the end of metrics.jsonl; nothing where there is none."""
    path = run_dir / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # cut by a kill, or by where reading began
            continue
        if isinstance(record, dict) and "loss" in record:
            return {key: record[key] for key in ("step", "loss", "tokens_per_second") if key in record}
    return {}
