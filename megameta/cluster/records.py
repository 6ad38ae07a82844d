"""What an attempt ran on and with: files in RUN/logs/attempt_N, so that a number can be traced to its machine."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import megameta
from megameta.config import RunConfig
from megameta.files import write_text_atomically

SOURCE = Path(megameta.__file__).resolve().parent
#: Variables that change what a run does; others may hold secrets and are left out.
PREFIXES = ("SLURM_", "NCCL_", "TORCH_", "CUDA_", "OMP_", "UCX_", "FI_", "GLOO_", "MASTER_", "DS_", "PYTORCH_")
#: Bytes of uncommitted changes that are kept.
DIFF_LIMIT = 1_000_000


def write_records(folder: Path, config: RunConfig, hosts: list[str]) -> None:
    """config.yaml, environment.json, hosts.txt and, where the source has uncommitted changes, uncommitted.diff."""
    write_text_atomically(folder / "config.yaml", config.to_yaml())
    # One line a node, with the number of its ranks: what mpirun and deepspeed call a host file.
    counts = {host: hosts.count(host) for host in dict.fromkeys(hosts)}
    write_text_atomically(folder / "hosts.txt", "".join(f"{host} slots={n}\n" for host, n in counts.items()))
    git, diff = git_state(SOURCE)
    report = environment_report(os.environ) | {"git": git}
    write_text_atomically(folder / "environment.json", json.dumps(report, indent=1) + "\n")
    if diff:
        write_text_atomically(folder / "uncommitted.diff", diff)


def environment_report(environment: Mapping[str, str]) -> dict[str, Any]:
    """Machine, versions, command and the variables that matter."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "directory": os.getcwd(),
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "nccl": list(torch.cuda.nccl.version()) if torch.cuda.is_available() else None,
        "source": source_digest(),
        "packages": package_versions(),
        "variables": {key: value for key, value in sorted(environment.items()) if key.startswith(PREFIXES)},
    }


@functools.cache  # each reads and parses a file, and there are hundreds
def package_versions() -> Mapping[str, str]:
    """Version of every installed package."""
    headers = (distribution.metadata for distribution in importlib.metadata.distributions())
    return dict(sorted((str(header["Name"]).lower(), header["Version"]) for header in headers))


def source_digest(directory: Path = SOURCE) -> str:
    """SHA-256 over names and bytes of the package's own source files."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        digest.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def git_state(directory: Path) -> tuple[dict[str, Any] | None, str]:
    """(commit, branch, changed files, the diff) of the working tree; (None, "") where there is none."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None, ""
    changed = (_git(directory, "status", "--porcelain") or "").splitlines()
    diff = (_git(directory, "diff", "HEAD") or "") if changed else ""
    if len(diff) > DIFF_LIMIT:
        diff = diff[:DIFF_LIMIT] + "\n… cut here\n"
    branch = (_git(directory, "rev-parse", "--abbrev-ref", "HEAD") or "").strip()
    return {"commit": commit.strip(), "branch": branch, "changed": changed[:200]}, diff


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
