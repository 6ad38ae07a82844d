"""A SLURM cluster on this machine: munge, slurmctld and several slurmd in namespaces of their own (lab.sh)."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.waiting import wait_until

LAB = ROOT / "tests" / "scenarios" / "lab.sh"
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "ip", "unshare", "nsenter")


def why_not() -> str | None:
    """What keeps this machine from having a lab."""
    if os.geteuid() != 0:
        return "the SLURM lab needs root (namespaces, device nodes)"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge iproute2"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "true"]
    if subprocess.run(probe, capture_output=True).returncode:
        return "this machine lets nobody make namespaces (unshare fails)"
    return None


#: States that no job leaves by itself.
ENDED = ("FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY")


class Lab:
    """Nodes n1 … nN and a controller."""

    def __init__(self, root: Path, nodes: int) -> None:
        self.root, self.nodes = root, nodes
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTEST_"))}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            kept.pop(name, None)
        self.environment = kept | {
            "LAB_ROOT": str(root),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MEGAMETA_ENV": str(root / "env.sh"),
            "MEGAMETA_TOOLS": str(ROOT / "tools"),
        }
        root.mkdir(parents=True, exist_ok=True)
        # In place of slurm/env.sh, which activates an environment of the user.
        (root / "env.sh").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{ROOT}"\n')

    # --- the cluster ------------------------------------------------------------------------------------------------

    def script(self, *words: str, timeout: float = 600) -> str:
        """Run lab.sh; its output."""
        command = [str(LAB), *words]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"lab.sh {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def up(self) -> None:
        self.script("up", str(self.nodes))

    def down(self) -> list[int]:
        """End everything by id; processes of the lab that are left all the same."""
        self.script("down")
        end = time.monotonic() + 300
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        return left

    def processes(self) -> list[int]:
        """Processes whose environment holds this lab's root; this one's own children, and theirs, do too."""
        mark = f"LAB_ROOT={self.root}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # gone, or a zombie
                continue
        return found

    def run(self, *command: str, cwd: Path | None = None, timeout: float = 600) -> str:
        """Run a command on the controller's node."""
        words = [str(LAB), "exec", *command]
        options = {"env": self.environment, "cwd": cwd, "stdin": subprocess.DEVNULL}
        for _ in range(3):
            done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, **options)
            if done.returncode != -signal.SIGPIPE:  # scontrol was seen to die of it on a busy machine
                break
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    # --- jobs -------------------------------------------------------------------------------------------------------

    def submit(self, folder: Path, *words: str) -> str:
        """``megameta slurm submit``; the job's number."""
        out = self.run(sys.executable, "-m", "megameta", "slurm", "submit", *words, cwd=folder)
        return re.findall(r"^job +(\d+)", out, re.M)[0]

    def job(self, number: str) -> dict[str, str]:
        """Fields of ``scontrol show job``."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(
        self, what: Callable[[], object], *, timeout: float, why: Callable[[], str] = lambda: "", every: float = 0.1
    ) -> object:
        """Until something is so; its value."""
        return wait_until(what, limit=timeout, why=why, pause=every)

    def wait_for_slurm(
        self, what: Callable[[], object], *, timeout: float, why: Callable[[], str] = lambda: ""
    ) -> object:
        """The same of what SLURM is asked: a question starts four programs."""
        return self.wait(what, timeout=timeout, why=why, every=0.5)

    def wait_for_state(self, number: str, *states: str, timeout: float, logs: Path | None = None) -> str:
        """Until a job is in one of these states."""

        def reached() -> str | None:
            state = self.job(number)["JobState"]
            assert state in states or state not in ENDED, f"{state}\n{why()}"
            return state if state in states else None

        def why() -> str:
            return f"{self.job(number)}\n{read_logs(logs)}" if logs else str(self.job(number))

        return str(self.wait_for_slurm(reached, timeout=timeout, why=why))


def read_logs(folder: Path) -> str:
    """What jobs have printed into RUN/logs."""
    files = sorted([*folder.glob("*.out"), *folder.glob("*-n*.log")])
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in files)
