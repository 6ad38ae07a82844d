"""What SLURM's environment and its commands say: hosts of a job, a rendezvous for its ranks, the state of a job."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping

from megameta.errors import UserError

#: A rendezvous port is one of these, below the ports that systems give out by themselves (32768 and up).
FIRST_PORT, NUM_PORTS = 12000, 16000
#: States in which the processes of a job may still be there.
ALIVE = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "STOPPED", "SIGNALING", "STAGE_OUT"})


def in_step(environment: Mapping[str, str]) -> bool:
    """Whether this process was started by srun (a batch script alone has no step)."""
    return "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment


def host_name(environment: Mapping[str, str] = os.environ) -> str:
    """The name of this machine; SLURM's own where it has given one."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def expand_hosts(text: str) -> list[str]:
    """Host names of SLURM's short form: ``n[1-2,05],gpu7`` → n1 n2 n05 gpu7.

    Raises:
        UserError: not a list of hosts.
    """
    hosts: list[str] = []
    if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]*\])*", text):
        raise UserError(f"{text!r} is not a list of hosts as SLURM writes it")
    # Split at commas outside brackets.
    for word in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        hosts += _expand_word(word)
    if not hosts or any(not re.fullmatch(r"[A-Za-z0-9._-]+", host) for host in hosts):
        raise UserError(f"{text!r} is not a list of hosts as SLURM writes it")
    return hosts


def _expand_word(word: str) -> list[str]:
    match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", word)
    if match is None:
        return [word]
    head, ranges, tail = match.groups()
    found = []
    for part in ranges.split(","):
        limits = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if limits is None:
            raise UserError(f"{word!r} is not a list of hosts as SLURM writes it")
        first, last = limits.group(1), limits.group(2) or limits.group(1)
        found += [f"{head}{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [host + rest for host in found for rest in _expand_word(tail)]


def rendezvous(environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port at which the ranks of an srun step meet: the first host of the step, where rank 0 is.

    The port follows from job, step and restart, so that all ranks know it, and an attempt that is still running
    somewhere holds another one.

    Raises:
        UserError: no host list.
    """
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job, step = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    try:
        mixed = 31 * int(job) + 7 * int(step) + 1009 * int(restart)
    except ValueError as error:
        raise UserError(f"SLURM's variables of job, step and restart are not numbers: {error}") from error
    return expand_hosts(hosts)[0], FIRST_PORT + 2 * (mixed % (NUM_PORTS // 2))  # the next one is for meeting


def one_device_each(environment: Mapping[str, str]) -> bool:
    """Whether SLURM shows each task a GPU of its own (--gpus-per-task, --gpu-bind), which is then device 0."""
    bound = environment.get("SLURM_GPU_BIND", "").rpartition(":")[2]
    return "SLURM_GPUS_PER_TASK" in environment or bound not in ("", "none")


def ask(*command: str, timeout: float = 60.0) -> str | None:
    """Output of one of SLURM's commands; None where it fails or does not answer."""
    if shutil.which(command[0]) is None:
        return None
    for _ in range(3):
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if answer.returncode >= 0:  # else ended by a signal: scontrol was seen to die of SIGPIPE under load
            return answer.stdout if answer.returncode == 0 else None
    return None


def job_state(job: str) -> str | None:
    """The state of a job that the controller knows, "" of one that it has forgotten; None where it does not answer."""
    if not re.fullmatch(r"[0-9_]+", job):
        return None
    answer = ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
    if answer is None:
        # A job that is long gone is an error of squeue ("Invalid job id"); is the controller there?
        return "" if ask("squeue", "--noheader", "--me") is not None else None
    return answer.split()[0] if answer.split() else ""
