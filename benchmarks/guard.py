"""What `make bench` runs: small ratios on a CPU against those in expected.json, and which moved beyond noise.

    python benchmarks/guard.py               # exit code 0: no row is slower than stored; 1: one is; 2: one did not run
    python benchmarks/guard.py --update      # store what is measured now

A row has moved where its 95 % interval and the stored one do not overlap, by more than the A/A row of its part strays
from 1, and by more than ``BETWEEN_RUNS``. Ratios, not times, are compared: they hold on another machine of the kind,
roughly, and on a busy one, with wider intervals. A row that has become faster is told, and does not fail.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import measure, ratio, seconds
from sides import write_random_dataset

from megameta.data.dataset import Dataset, SampleFormat
from megameta.data.samples import Corpus, SampleIndex

HERE = Path(__file__).resolve().parent
EXPECTED = HERE / "expected.json"
#: Part: (command, whether a larger ratio is slower).
PARTS: dict[str, tuple[list[str], bool]] = {
    "branch": (["step_time.py", "--pairs", "20", "--batch", "1"], True),
    "peers": (["peers.py", "--pairs", "8", "--steps", "2"], False),
    "decode": (["decode_speed.py", "--pairs", "150", "--first-pairs", "40"], True),
}
AA = "A/A"
#: What a row differs by from one process to the next with the same code, which no interval of one process shows: a
#: decoding step with the branch over one without was 0.993 [0.981, 1.006], and five minutes later 1.027 [1.020, 1.036].
BETWEEN_RUNS = 0.03


def run_part(command: list[str], folder: Path) -> list[dict[str, Any]]:
    """Rows of a benchmark."""
    file = folder / f"{command[0]}.json"
    subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / command[0]), *command[1:], "--json", str(file)], check=True
    )
    return json.loads(file.read_text(encoding="utf-8"))["rows"]


def data_rows(folder: Path, pairs: int = 30, count: int = 500) -> list[dict[str, Any]]:
    """A sample with meta-tokens over a bare window of the same file."""
    prefix = folder / "data"
    write_random_dataset(prefix, 500, 2_000_000)
    dataset = Dataset(SampleIndex(Corpus([str(prefix)]), 922, 1), SampleFormat(922, 102, 500, 1))
    tokens = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r")
    draws = np.random.default_rng(0).integers(0, 2000, count)

    def samples() -> float:
        start = seconds()
        for index in draws:
            dataset[int(index)]
        return seconds() - start

    def windows() -> float:
        start = seconds()
        for index in draws:
            torch.from_numpy(tokens[index * 922 : index * 922 + 1024].astype(np.int64))
        return seconds() - start

    series = measure(samples, {"A/A: samples, again": samples, "data: a bare window over a sample": windows}, pairs)
    return [vars(ratio(name, *values)) for name, values in series.items()]


def verdict(row: dict[str, Any], stored: dict[str, Any] | None, slack: float, larger_is_slower: bool) -> str:
    """same, slower, faster, or new."""
    if stored is None:
        return "new"
    if row["low"] > stored["high"] + slack:
        return "slower" if larger_is_slower else "faster"
    if row["high"] < stored["low"] - slack:
        return "faster" if larger_is_slower else "slower"
    return "same"


def judge(rows: list[dict[str, Any]], stored: dict[str, Any], larger_is_slower: bool) -> list[tuple[str, str]]:
    """(verdict, line) of the rows of a part."""
    noise = [row for row in rows if AA in row["name"]]
    slack = max((abs(row[end] - 1) for row in noise for end in ("low", "high")), default=0.0)
    slack = max(slack, BETWEEN_RUNS)
    found = []
    for row in rows:
        was = stored.get(row["name"])
        said = "noise" if row in noise else verdict(row, was, slack, larger_is_slower)
        then = f"stored {was['median']:.3f} [{was['low']:.3f}, {was['high']:.3f}]" if was else "not stored"
        now = f"{row['median']:6.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        found.append((said, f"{row['name']:<36} {now}  {then}  {said}"))
    return found


def main() -> int:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--parts", default="branch,peers,decode,data", help="some of branch, peers, decode, data")
    arguments = parser.parse_args()
    expected = json.loads(EXPECTED.read_text(encoding="utf-8")) if EXPECTED.exists() else {"rows": {}}
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    if expected.get("machine") != machine:
        print(f"this machine: {machine}; the stored ratios are of: {expected.get('machine')}")
    lines, failed, measured = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts.split(","):
            command, larger_is_slower = PARTS.get(part, ([], False))
            try:
                rows = run_part(command, Path(folder)) if command else data_rows(Path(folder))
            except (OSError, subprocess.SubprocessError, SystemExit) as error:
                failed.append(f"{part} did not run: {error}")
                continue
            lines += judge(rows, expected["rows"], larger_is_slower)
            measured |= {row["name"]: {key: row[key] for key in ("median", "low", "high", "pairs")} for row in rows}
    print("\nratio now, and stored")
    for _, line in lines:
        print(line)
    for line in failed:
        print(line)
    if arguments.update:
        kept = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "rows": expected["rows"] | measured}
        EXPECTED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {EXPECTED.name}")
    slower = [line for said, line in lines if said == "slower"]
    print(f"{len(slower)} slower, {sum(said == 'faster' for said, _ in lines)} faster, of {len(lines)} rows")
    return 2 if failed else int(bool(slower) and not arguments.update)


if __name__ == "__main__":
    sys.exit(main())
