"""Start-up and random access of the training data at the size of a large run: seconds, memory, microseconds a sample.

A dataset of ``--documents`` documents and ``--tokens`` tokens is made up (lengths lognormal, tokens random within the
first 64 MB of .bin and a hole of zeros after them, so that 20 GB take little disk; reading a hole costs page faults as
a file in memory does, not the waiting of a disk). Each start is a process of its own, with one thread:

cold      opens the dataset and makes the orders of epoch 0, and writes them into the cache
warm      the same with the cache there
together  ``--processes`` processes start at once on one empty cache: what all of them together take
access    texts at random places of epochs 0, 1 and 7, without injection; then whole samples with meta-tokens; one core

Bars: cold under 10 s and 2 GB, warm under 1 s, 50 µs a text at the median, 10 M tokens/s with injection.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megameta.config import RunConfig, build_config
from megameta.data.dataset import Dataset, SampleFormat
from megameta.data.index_format import CODE_OF_DTYPE, MAGIC, VERSION
from megameta.data.indexed import IndexedDataset
from megameta.data.samples import Samples
from megameta.data.sources import training_data

SEQUENCE, RATIO, META = 1024, 0.1, 50257
GLOBAL_BATCH = 480
QUARTERS = ("a", "b", "c", "d")
REAL_BYTES = 64 << 20
EPOCHS = (0, 1, 7)


def make_dataset(prefix: Path, documents: int, tokens: int) -> None:
    """Write a pair of the wanted size, of which most of .bin is a hole."""
    draws = np.random.default_rng(0)
    weights = draws.lognormal(0.0, 1.2, documents)
    ends = np.round(np.cumsum(weights) * (tokens / weights.sum())).astype(np.int64)
    sizes = np.diff(ends, prepend=0).astype("<i4")
    with open(f"{prefix}.idx", "wb") as index:
        index.write(MAGIC + VERSION.to_bytes(8, "little") + bytes([CODE_OF_DTYPE[np.dtype(np.uint16)]]))
        index.write(documents.to_bytes(8, "little") + (documents + 1).to_bytes(8, "little"))
        index.write(sizes.tobytes())
        index.write(np.concatenate(([0], ends[:-1] * 2)).astype("<i8").tobytes())
        index.write(np.arange(documents + 1, dtype="<i8").tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        file.write(draws.integers(0, META, min(REAL_BYTES // 2, int(ends[-1])), dtype=np.uint16).tobytes())
        file.truncate(int(ends[-1]) * 2)


def configuration(folder: Path, mixture: bool) -> RunConfig:
    """A run of one epoch on the dataset, or on a mixture of its quarters."""
    train: Any = [str(folder / "corpus")]
    if mixture:
        train = {str(folder / name): weight for name, weight in zip(QUARTERS, (4, 3, 2, 1), strict=True)}
    data = {"train": train, "sequence_length": SEQUENCE, "meta_token_fraction": RATIO}
    data["cache_dir"] = str(folder / "cache")
    num_tokens = sum(IndexedDataset(folder / name).num_tokens for name in (QUARTERS if mixture else ["corpus"]))
    num_steps = num_tokens // (GLOBAL_BATCH * (SEQUENCE - int(RATIO * SEQUENCE)))
    return build_config(
        {
            "run": {"dir": str(folder / "run"), "seed": 1},
            "model": {"vocab_size": META + 1, "meta_token_id": META},
            "data": data,
            "train": {"num_steps": max(1, num_steps), "global_batch_size": GLOBAL_BATCH},
        }
    )


def start(folder: Path, mixture: bool) -> tuple[RunConfig, Samples, dict[str, float]]:
    """Open the training data and read one sample; seconds, and the peak of this process in MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = configuration(folder, mixture)  # opens the files too, to count; what counts is opening them again
    began = time.perf_counter()
    samples = training_data(config).samples
    samples.text(0)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return config, samples, {"seconds": seconds, "peak_mb": peak / 1024, "imports_mb": before / 1024}


def time_calls(call: Any, indices: list[int]) -> list[float]:
    found = []
    for index in indices:
        began = time.perf_counter()
        call(index)
        found.append((time.perf_counter() - began) * 1e6)
    return found


def access(folder: Path, mixture: bool, count: int) -> dict[str, Any]:
    """Microseconds a text in several epochs (median and mean), and tokens/s of whole samples."""
    config, samples, _ = start(folder, mixture)
    form = SampleFormat.of(config.data, META, config.run.seed, META + 1)
    dataset = Dataset(samples, form)
    draws = np.random.default_rng(3)
    result: dict[str, Any] = {}
    per_epoch = samples.samples_per_epoch
    for epoch in EPOCHS if not mixture else EPOCHS[:1]:
        indices = [epoch * per_epoch + int(i) for i in draws.integers(0, per_epoch, count)]
        samples.text(indices[0])  # the orders of the epoch are made here
        time_calls(samples.text, indices[: count // 10])
        times = time_calls(samples.text, indices)
        result[f"text, epoch {epoch}"] = {"median_us": statistics.median(times), "mean_us": statistics.mean(times)}
    indices = [int(i) for i in draws.integers(0, per_epoch, count)]
    samples.text(indices[0])
    times = time_calls(dataset.__getitem__, indices)
    mean = statistics.mean(times)
    result["sample with meta-tokens"] = {"median_us": statistics.median(times), "mean_us": mean}
    result["slots_per_second"] = form.sequence_length / mean * 1e6
    return result


def child(kind: str, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", kind, "--folder", str(folder), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def report(kind: str, folder: Path, *more: str) -> Any:
    """What a child printed."""
    running = child(kind, folder, *more)
    output = running.communicate(timeout=900)[0]
    if running.returncode:
        raise SystemExit(f"{kind}: exit status {running.returncode}")
    return json.loads(output.splitlines()[-1])


def empty_cache(folder: Path) -> None:
    subprocess.run(["rm", "-rf", str(folder / "cache")], check=True)


def together(folder: Path, processes: int, mixture: tuple[str, ...]) -> dict[str, float]:
    """Start many processes on one empty cache: the wall time of all, and the slowest's own."""
    empty_cache(folder)
    began = time.perf_counter()
    running = [child("start", folder, *mixture) for _ in range(processes)]
    outputs = [process.communicate(timeout=900)[0] for process in running]
    wall = time.perf_counter() - began
    if any(process.returncode for process in running):
        raise SystemExit("together: a process failed")
    return {"wall_seconds": wall, "slowest_seconds": max(json.loads(o.splitlines()[-1])["seconds"] for o in outputs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--tokens", type=int, default=10_000_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="of the starts; the slowest counts (3)")
    parser.add_argument("--samples", type=int, default=20_000, help="read to take their time (20000)")
    parser.add_argument("--processes", type=int, default=8, help="that start together (8)")
    parser.add_argument("--mixture", action="store_true", help="four datasets of a quarter each")
    parser.add_argument("--folder", type=Path, help="for the files (a temporary one)")
    parser.add_argument("--child", choices=("start", "access"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    more = ("--mixture",) if arguments.mixture else ()
    if arguments.child == "start":
        print(json.dumps(start(arguments.folder, arguments.mixture)[2]))
        return
    if arguments.child == "access":
        print(json.dumps(access(arguments.folder, arguments.mixture, arguments.samples)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for part in QUARTERS if arguments.mixture else ["corpus"]:
            share = 4 if arguments.mixture else 1
            make_dataset(folder / part, arguments.documents // share, arguments.tokens // share)
        print(f"{arguments.documents:,} documents, {arguments.tokens:,} tokens", flush=True)
        for kind in ("cold", "warm"):
            found = []
            for _ in range(arguments.repeats):
                if kind == "cold":
                    empty_cache(folder)
                found.append(report("start", folder, *more))
            slowest = max(found, key=lambda one: one["seconds"])
            peak = max(one["peak_mb"] for one in found)
            seconds = ", ".join(f"{one['seconds']:.2f}" for one in found)
            print(f"{kind}: {seconds} s; peak {peak:,.0f} MB ({slowest['imports_mb']:,.0f} after imports)", flush=True)
        found = report("access", folder, *more, "--samples", str(arguments.samples))
        print(json.dumps(found, indent=1), flush=True)
        if arguments.processes > 1:
            at_once = together(folder, arguments.processes, more)
            print(f"{arguments.processes} at once, empty cache: {json.dumps(at_once)}")


if __name__ == "__main__":
    main()
