"""Checks on every node before the first step: a table, and a refusal that names the node.

A thousand GPU hours are lost to one node with a full GPU, another package version or a bad cable. Ranks report facts
through the rendezvous store, which works where a collective would hang; then an all-reduce is made inside each node and
over all of them, each with a time limit. The judgement is a pure function of the facts.
"""

import json
import math
import os
import platform
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megameta.cluster.machine import measure_peak_flops
from megameta.cluster.records import package_versions, source_digest
from megameta.cluster.slurm.environment import in_step
from megameta.config import RunConfig
from megameta.errors import UserError
from megameta.log import LOG
from megameta.model.shapes import parameter_shapes
from megameta.parallel.topology import Topology

#: Bytes of the tensor that is reduced on "cpu" and "cuda".
REDUCED = {"cpu": 4 << 20, "cuda": 256 << 20}
#: Below this share of the median rank's matrix-product rate a rank is remarked upon.
SLOW = 0.8


@dataclass(frozen=True)
class Facts:
    """What one rank has seen."""

    rank: int
    host: str
    device: str = "cpu"
    free_memory: int = 0
    """Bytes of the GPU."""
    total_memory: int = 0
    disk_free: int = 0
    """Bytes in the file system of run.dir."""
    sees_run_dir: bool = True
    """Whether a file that rank 0 has just written there is seen."""
    flops: float = 0.0
    """Rate of a matrix product in flop/s."""
    source: str = ""
    """Digest of megameta's source."""
    packages: dict[str, str] = field(default_factory=dict)
    """Versions; of one rank a node."""
    problem: str | None = None
    """What kept the rank from finding out."""


@dataclass(frozen=True)
class Needs:
    """What the run asks of a node."""

    disk: int
    """Bytes that checkpoints will take."""
    free_share: float
    """Of a GPU's memory."""


def check_nodes(config: RunConfig, topology: Topology, hosts: list[str], *, always: bool = False) -> None:
    """Check, print the table, refuse: collective. What cluster.preflight leaves out is left out.

    Raises:
        UserError: on every rank, with every problem and its node.
    """
    wanted = config.cluster.preflight
    at_home = len(set(hosts)) == 1 and not in_step(os.environ)
    if not always and (wanted == "never" or (wanted == "auto" and at_home)):
        return
    limit = config.cluster.preflight_seconds
    found = _gather_facts(config, topology, hosts, limit)
    problems = judge(found, _needs(config)) if found is not None else []
    problems = _from_main(problems, topology)
    inside: list[float] = []
    across = 0.0
    if not problems:
        inside, across, problems = _all_reduces(topology, hosts, limit)
        if not problems and 0 < across < config.cluster.min_all_reduce_gbps * 1e9:
            least = config.cluster.min_all_reduce_gbps
            problems = [
                f"the all-reduce over all {len(set(hosts))} nodes runs at {across / 1e9:.2f} GB/s, below"
                f" cluster.min_all_reduce_gbps {least:g}; check nodes in pairs to find which (docs/slurm.md)"
            ]
    if found is not None:
        for line in [*table(found, inside), *remarks(found)]:
            LOG.info("%s", line)
        if across:
            LOG.info("all-reduce over %d ranks on %d nodes: %.2f GB/s", len(hosts), len(set(hosts)), across / 1e9)
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} problem(s) before the first step:", *problems]))


# --- facts ----------------------------------------------------------------------------------------------------------


def _needs(config: RunConfig) -> Needs:
    parameters = sum(math.prod(shape) for shape in parameter_shapes(config.model).values())
    there = len(list((Path(config.run.dir) / "checkpoints").glob("step_*")))
    # Weights and two moments in float32; a new one is whole before the oldest goes.
    copies = 1 + max(0, config.checkpoint.keep - there)
    return Needs(12 * parameters * copies, config.cluster.min_free_gpu_memory)


def _gather_facts(config: RunConfig, topology: Topology, hosts: list[str], limit: float) -> list[Facts] | None:
    """Every rank's facts on rank 0, None elsewhere. Goes through the store, so that who is late has a name."""
    store = dist.distributed_c10d._get_default_store()
    directory = Path(config.run.dir)
    probe = [f".probe-{secrets.token_hex(8)}" if topology.is_main else ""]
    dist.broadcast_object_list(probe)
    path = directory / probe[0]
    if topology.is_main:
        path.write_text("seen by all nodes?\n", encoding="utf-8")
        store.set("megameta/probe", "written")
    store.wait(["megameta/probe"], timedelta(seconds=limit))
    store.set(f"megameta/facts/{topology.rank}", json.dumps(asdict(look(topology, hosts, directory, path))))
    if not topology.is_main:
        return None
    found = []
    end = time.monotonic() + limit
    for rank, host in enumerate(hosts):
        left = max(0.1, end - time.monotonic())
        try:
            store.wait([f"megameta/facts/{rank}"], timedelta(seconds=left))
            found.append(Facts(**json.loads(store.get(f"megameta/facts/{rank}"))))
        except RuntimeError:
            found.append(Facts(rank, host, problem=f"did not answer within {limit:g} s"))
    path.unlink(missing_ok=True)
    return found


def look(topology: Topology, hosts: list[str], directory: Path, probe: Path) -> Facts:
    """What this rank sees."""
    free = total = 0
    name = "cpu"
    problem = None
    try:
        if topology.device_type == "cuda":
            free, total = torch.cuda.mem_get_info(topology.device)
            name = torch.cuda.get_device_name(topology.device)
        seen = _appears(probe)
        disk = shutil.disk_usage(directory).free if directory.exists() else 0
        flops = measure_peak_flops(topology.device, "bf16" if topology.device_type == "cuda" else "fp32", 0.2)
    except (RuntimeError, OSError) as error:
        seen, disk, flops, problem = True, 0, 0.0, str(error).splitlines()[0]
    leads = topology.local_rank == 0
    packages = {**package_versions(), "python": platform.python_version()} if leads else {}
    source = source_digest() if leads else ""
    return Facts(topology.rank, hosts[topology.rank], name, free, total, disk, seen, flops, source, packages, problem)


def _appears(path: Path, seconds: float = 10.0) -> bool:
    """Whether a file is seen; shared file systems may take some seconds."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


# --- judgement ------------------------------------------------------------------------------------------------------


def judge(found: Sequence[Facts], needs: Needs) -> list[str]:
    """What speaks against starting, each with its node."""
    problems = [f"node {f.host}, rank {f.rank}: {f.problem}" for f in found if f.problem]
    for f in found:
        if f.problem:
            continue
        if f.total_memory and f.free_memory < needs.free_share * f.total_memory:
            problems.append(
                f"node {f.host}, rank {f.rank}: {f.free_memory / 1e9:.1f} of {f.total_memory / 1e9:.1f} GB of its GPU"
                f" are free; something else uses it (nvidia-smi there), or lower cluster.min_free_gpu_memory"
            )
        if not f.sees_run_dir:
            problems.append(f"node {f.host}, rank {f.rank}: does not see run.dir, which must be shared by all nodes")
        elif f.disk_free < needs.disk:
            problems.append(
                f"node {f.host}, rank {f.rank}: {f.disk_free / 1e9:.1f} GB free in run.dir, checkpoints need"
                f" {needs.disk / 1e9:.1f}: free space or lower checkpoint.keep"
            )
    return problems + _differing(found)


def _differing(found: Sequence[Facts]) -> list[str]:
    """Nodes whose source or packages are not those of most nodes (of rank 0's, where there is no most)."""
    leaders = [f for f in found if f.packages and not f.problem]
    if not leaders:
        return []
    problems = []
    source = _usual([f.source for f in leaders])
    packages = json.loads(_usual([json.dumps(f.packages, sort_keys=True) for f in leaders]))
    for f in leaders:
        if f.source != source:
            problems.append(f"node {f.host}: megameta's source is not that of the other nodes ({f.source[:12]})")
        names = [name for name in sorted({*packages, *f.packages}) if packages.get(name) != f.packages.get(name)]
        if names:
            shown = ", ".join(f"{name} {f.packages.get(name)} not {packages.get(name)}" for name in names[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"node {f.host}: other packages than on the other nodes: {shown}{more}")
    return problems


def _usual(values: list[str]) -> str:
    counts = Counter(values)
    return max(values, key=lambda value: counts[value])  # the first of the most frequent


def remarks(found: Sequence[Facts]) -> list[str]:
    """What does not speak against starting, but is worth knowing."""
    rates = sorted(f.flops for f in found if f.flops)
    if len(rates) < 2:
        return []
    median = rates[len(rates) // 2]
    return [
        f"slow: node {f.host}, rank {f.rank} multiplies matrices at {f.flops / 1e12:.2f} TFLOP/s, the median rank at"
        f" {median / 1e12:.2f}"
        for f in found
        if 0 < f.flops < SLOW * median
    ]


def table(found: Sequence[Facts], inside: Sequence[float]) -> list[str]:
    """A row a node. ``inside``: bytes a second of the all-reduce among the node's ranks, by rank."""
    rows = [["node", "ranks", "device", "free GB", "disk GB", "TFLOP/s", "all-reduce GB/s", "source"]]
    for host in dict.fromkeys(f.host for f in found):
        here = [f for f in found if f.host == host]
        ranks = f"{here[0].rank}–{here[-1].rank}" if len(here) > 1 else f"{here[0].rank}"
        speed = min((inside[f.rank] for f in here), default=0.0) if inside else 0.0
        free = f"{min(f.free_memory for f in here) / 1e9:.1f}" if here[0].total_memory else "–"
        rows.append(
            [
                *(host, ranks, f"{len(here)} × {here[0].device}", free),
                f"{min(f.disk_free for f in here) / 1e9:.0f}",
                f"{min(f.flops for f in here) / 1e12:.2f}",
                f"{speed / 1e9:.2f}" if speed else "–",
                next((f.source[:8] for f in here if f.source), "?"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


# --- all-reduce -----------------------------------------------------------------------------------------------------


def _all_reduces(topology: Topology, hosts: list[str], limit: float) -> tuple[list[float], float, list[str]]:
    """(bytes a second inside each rank's node, and over all ranks, problems): the same on every rank."""
    own: Any = None
    names = list(dict.fromkeys(hosts))
    if len(names) < len(hosts):
        groups = [dist.new_group([r for r, host in enumerate(hosts) if host == name]) for name in names]
        own = groups[names.index(hosts[topology.rank])]
    mine = bandwidth(topology, hosts.count(hosts[topology.rank]), own, limit) if own is not None else 0.0
    said = _report(topology, "inside", mine, limit)
    stalled = sorted({hosts[rank] for rank, value in enumerate(said) if value is None})
    if stalled:
        return (
            [],
            0.0,
            [f"node {host}: an all-reduce among its own ranks did not end within {limit:g} s" for host in stalled],
        )
    across = bandwidth(topology, len(hosts), None, limit)
    speeds = _report(topology, "across", across, limit)
    late = sorted({hosts[rank] for rank, value in enumerate(speeds) if value is None})
    if late:
        which = f"nodes {', '.join(late)}" if len(late) > 1 else f"node {late[0]}"
        return (
            [],
            0.0,
            [f"{which}: an all-reduce over all nodes did not end within {limit:g} s; inside each node it did"],
        )
    if own is not None:
        dist.destroy_process_group(own)
    return [float(value or 0) for value in said], min(float(value or 0) for value in speeds), []


def bandwidth(topology: Topology, size: int, group: Any, limit: float) -> float | None:
    """Bytes a second on the wire, of a ring: 2 · (n − 1) / n of the tensor. None where it does not end in time."""
    tensor = torch.zeros(REDUCED[topology.device_type] // 4, device=topology.device)
    end = time.monotonic() + limit
    best = 0.0
    for _ in range(4):  # the first connects
        start = time.perf_counter()
        work = dist.all_reduce(tensor, group=group, async_op=True)
        while not work.is_completed():
            if time.monotonic() > end:
                return None
            time.sleep(0.0005)
        best = max(best, 2 * (size - 1) / size * tensor.numel() * 4 / (time.perf_counter() - start))
    return best


def _report(topology: Topology, name: str, value: float | None, limit: float) -> list[float | None]:
    """Every rank's number through the store: a collective could hang here. None of who gives none in time."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"megameta/{name}/{topology.rank}", json.dumps(value))
    result: list[float | None] = []
    end = time.monotonic() + limit
    for rank in range(topology.world_size):
        key = f"megameta/{name}/{rank}"
        try:
            store.wait([key], timedelta(seconds=max(1.0, end - time.monotonic())))
            result.append(json.loads(store.get(key)))
        except RuntimeError:
            result.append(None)
    return result


def _from_main(problems: list[str], topology: Topology) -> list[str]:
    values = [problems]
    dist.broadcast_object_list(values)
    return values[0]
