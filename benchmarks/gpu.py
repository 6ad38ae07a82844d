"""All that needs a CUDA device, in one go, in under nine minutes on one H100 or H200; writes OUTPUT/gpu.json.

    python benchmarks/gpu.py OUTPUT
    python benchmarks/gpu.py OUTPUT --wheels wheels --nanogpt nanoGPT
    python benchmarks/gpu.py OUTPUT --previous old/gpu.json        # what failed there, again
    python benchmarks/gpu.py OUTPUT --device cpu                   # proves the script itself, at a small size

What is worth most comes first. Each part is a program with a time limit; its result is in the file as soon as it ends,
and one that fails or is cut off is recorded with the end of its output. OUTPUT gets two files: gpu.json, and
details.tar.gz with all output and a profiler's trace. The exit code is 1 where a part failed or missed a bar.

Packages that are missing are named first, all at once. On a machine without a network, put their wheels into a folder
and name it with --wheels:
    python -m pip download --no-deps -d wheels deepspeed==0.19.8 …      (or pip wheel, for a package without one)
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: What is left of a part's output where it failed, lines.
SAID = 25
#: Parts that would begin later are left out, seconds.
WHOLE = 545


@dataclass(frozen=True)
class Part:
    """One program. ``{json}`` and ``{scratch}`` in its words stand for the file of its result and for a folder."""

    name: str
    seconds: int
    on_cuda: tuple[str, ...]
    on_cpu: tuple[str, ...]


def script(name: str, *words: str) -> tuple[str, ...]:
    """A benchmark that writes its result where it is told."""
    return (f"benchmarks/{name}.py", *words, "--json", "{json}")


GPU_TESTS = ("tests/engine/test_gpu.py", "tests/model/test_gpu_kernels.py")
TESTS = (
    "-m",
    "pytest",
    "-v",
    "--tb=line",
    "--continue-on-collection-errors",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "--basetemp",
    "{scratch}/tests",
)
CUDA = ("--device", "cuda")
PARTS = (
    Part("machine", 25, script("machine", *CUDA), script("machine")),
    Part("correctness", 100, (*TESTS, "-m", "gpu", *GPU_TESTS), (*TESTS, "-k", "kept_losses", GPU_TESTS[0])),
    Part("kernels", 45, script("kernels", *CUDA), script("kernels", "--pairs", "2")),
    Part(
        "engine_152m",
        75,
        script("engine_speed", "--shape", "152m", *CUDA, "--pairs", "8", "--steps", "3", "--no-baseline"),
        script("engine_speed", "--shape", "smoke", "--pairs", "2", "--no-baseline"),
    ),
    Part(
        "trace",
        45,
        script("trace_step", "--shape", "152m", *CUDA, "--trace", "{scratch}/trace.json.gz"),
        script("trace_step", "--shape", "smoke", "--trace", "{scratch}/trace.json.gz"),
    ),
    Part(
        "branch",
        40,
        script("step_time", "--preset", "152m", *CUDA, "--precision", "bf16", "--pairs", "12", "--no-dense"),
        script("step_time", "--preset", "tiny", "--device", "cpu", "--pairs", "3", "--no-dense"),
    ),
    Part(
        "engine_1.3b",
        75,
        script("engine_speed", "--shape", "1.3b", *CUDA, "--pairs", "3", "--steps", "1", "--no-baseline"),
        script("engine_speed", "--shape", "smoke", "--pairs", "2", "--steps", "1", "--no-baseline"),
    ),
    Part(
        "peers",
        80,
        script("peers", "--preset", "124m", *CUDA, "--pairs", "6", "--steps", "2", "{nanogpt}"),
        script("peers", "--preset", "smoke", "--pairs", "2", "--steps", "2", "{nanogpt}"),
    ),
    Part(
        "long_sequences",
        40,
        script("long_sequences", *CUDA, "--lengths", "1024,4096,32768", "--pairs", "5"),
        script("long_sequences", "--lengths", "256,512", "--slots", "512", "--pairs", "3"),
    ),
    Part(
        "start_stop",
        45,
        script("start_stop", *CUDA, "--preset", "152m", "--repeats", "1", "--saves", "8"),
        script("start_stop", "--preset", "smoke", "--repeats", "1", "--saves", "4"),
    ),
)


def row(result: dict[str, Any], name: str) -> float:
    """The median of a ratio."""
    return next(row["median"] for row in result["rows"] if row["name"].startswith(name))


#: Part → (what is compared, its number in the part's result, the bar, whether it has to be at least that).
BARS: dict[str, tuple[str, Callable[[dict[str, Any]], float], float, bool]] = {
    "engine_152m": ("share of the card's measured rate, 152 M", lambda r: r["mfu"]["branch"], 0.45, True),
    "engine_1.3b": ("share of the card's measured rate, 1.3 B", lambda r: r["mfu"]["branch"], 0.50, True),
    "branch": ("branch over none", lambda r: row(r, "branch (compact)"), 1.06, False),
    "peers": ("tokens/s over compiled nanoGPT's", lambda r: row(r, "nanoGPT, torch.compile"), 1.15, True),
    "start_stop": (
        "wait of an asynchronous save over a synchronous one",
        lambda r: r["stalls"]["stall"]["median"],
        0.05,
        False,
    ),
}


def judge(name: str, result: dict[str, Any]) -> dict[str, Any] | None:
    """A part's bar: the number, the bar, whether it is met. None: it has none, or the number is not there."""
    if name not in BARS:
        return None
    what, number, bar, at_least = BARS[name]
    try:
        found = number(result)
    except (KeyError, StopIteration):
        return None
    return {"what": what, "found": found, "bar": bar, "met": found >= bar if at_least else found <= bar}


class Driver:
    """Runs parts and keeps the record."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.arguments, self.scratch, self.begun = arguments, scratch, time.monotonic()
        self.environment = os.environ | {
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            # A part that is cut off while it compiles leaves half a file, on which the next that finds it fails.
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        }
        previous = json.loads(arguments.previous.read_text())["parts"] if arguments.previous else {}
        kept = {name: part for name, part in previous.items() if part["exit_code"] == 0}
        self.found: dict[str, Any] = {"device": arguments.device, "python": platform.python_version(), "parts": kept}

    def install(self, wheels: Path) -> int:
        """Put wheels where the parts find them; pip's exit code."""
        site = self.scratch / "site"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run([*command, "--target", str(site), *map(str, sorted(wheels.glob("*.whl")))])
        self.environment["PYTHONPATH"] = f"{site}{os.pathsep}{self.environment['PYTHONPATH']}"
        return done.returncode

    def missing(self) -> int:
        """Name the packages that are missing; 1 where there are any."""
        return subprocess.run([sys.executable, str(ROOT / "benchmarks/needs.py")], env=self.environment).returncode

    def words(self, part: Part, result: Path) -> list[str]:
        """A part's command."""
        nanogpt = ["--nanogpt", str(self.arguments.nanogpt.resolve())] if self.arguments.nanogpt else []
        command = [sys.executable, "-W", "ignore"]
        for word in part.on_cuda if self.arguments.device == "cuda" else part.on_cpu:
            command += nanogpt if word == "{nanogpt}" else [word.format(json=result, scratch=self.scratch)]
        return command

    def run(self, part: Part) -> None:
        """One part, within what is left of the time."""
        left = self.arguments.seconds * self.arguments.scale - (time.monotonic() - self.begun)
        limit = min(part.seconds * self.arguments.scale, left)
        if limit < 10:
            self.found["parts"][part.name] = {"exit_code": None, "seconds": 0, "said": ["left out: no time was left"]}
            print(f"== {part.name}: left out, no time was left", flush=True)
            return
        result, text = self.scratch / f"{part.name}.json", self.scratch / f"{part.name}.txt"
        print(f"== {part.name} (at most {limit:.0f} s)", flush=True)
        start = time.monotonic()
        with text.open("w") as output:
            process = subprocess.Popen(
                self.words(part, result),
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                cut = not ends_within(process, limit)
            finally:
                end_group(process)
        code = 124 if cut else process.returncode
        lines = text.read_text(errors="replace").splitlines()
        record: dict[str, Any] = {"exit_code": code, "seconds": round(time.monotonic() - start, 1)}
        if part.name == "correctness":
            result = next(iter(sorted(self.scratch.glob("tests/*/found.json"))), result)
            record["verdicts"] = [line for line in lines if "::" in line]
        if result.exists():
            record["result"] = json.loads(result.read_text())
            record["bar"] = judge(part.name, record["result"]) if self.arguments.device == "cuda" else None
        if code:
            record |= {"failed": "cut off by its time limit" if cut else "failed", "said": lines[-SAID:]}
        self.found["parts"][part.name] = record
        print(*(f"   {line[:150]}" for line in lines[-12:]), sep="\n")
        print(f"== {part.name}: exit code {code}, {record['seconds']} s", flush=True)

    def write(self) -> bool:
        """Both files, each whole or as it was; whether all parts ended well and met their bars."""
        parts, out = self.found["parts"], self.arguments.output
        self.found["failed"] = [name for name, part in parts.items() if part["exit_code"] != 0]
        bars = {name: part["bar"] for name, part in parts.items() if part.get("bar")}
        self.found["missed"] = [name for name, bar in bars.items() if not bar["met"]]
        out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(self.scratch / "details.tar.gz", "w:gz") as archive:
            for file in sorted([*self.scratch.glob("*.txt"), *self.scratch.glob("*.json"), *self.scratch.glob("*.gz")]):
                if file.name != "details.tar.gz":
                    archive.add(file, file.name)
        (self.scratch / "gpu").write_text(json.dumps(self.found, indent=1) + "\n")
        for file, name in (("gpu", "gpu.json"), ("details.tar.gz", "details.tar.gz")):
            shutil.copyfile(self.scratch / file, out / f".{name}")
            (out / f".{name}").replace(out / name)
        return not self.found["failed"] and not self.found["missed"]


def ends_within(process: subprocess.Popen, seconds: float) -> bool:
    """Wait for a program to end by itself."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def end_group(process: subprocess.Popen) -> None:
    """End what a part has started, and wait for the part."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--parts", default=",".join(part.name for part in PARTS), help="default: %(default)s")
    parser.add_argument("--previous", type=Path, help="a gpu.json; parts that ended well there are taken from it")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install for this once")
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT, for its row among the peers")
    parser.add_argument("--seconds", type=int, default=WHOLE, help="for all parts (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of all time limits, for a slow machine")
    arguments = parser.parse_args()
    unknown = set(arguments.parts.split(",")) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in PARTS)}")
    if arguments.wheels and not list(arguments.wheels.glob("*.whl")):
        parser.error(f"--wheels {arguments.wheels}: no wheels are there")
    return arguments


def main() -> int:
    """Run the parts; print what failed and what missed its bar."""
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        driver = Driver(arguments, Path(folder))
        if (arguments.wheels and driver.install(arguments.wheels)) or driver.missing():
            return 1
        wanted, good = arguments.parts.split(","), True
        for part in PARTS:
            if part.name in wanted and part.name not in driver.found["parts"]:
                driver.run(part)
                good = driver.write()
        good = driver.write()
        for name, part in driver.found["parts"].items():
            if bar := part.get("bar"):
                said = "met" if bar["met"] else "MISSED"
                print(f"{name}: {bar['what']} {bar['found']:.3f}, bar {bar['bar']:g}: {said}")
    failed, count = ", ".join(driver.found["failed"]) or "none", len(driver.found["parts"])
    print(f"wrote {arguments.output / 'gpu.json'}: {count} parts, failed: {failed}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
