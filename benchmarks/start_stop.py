"""Seconds from a launch to the first step, to the first step after a resume, and what training waits for at a save.

    python benchmarks/start_stop.py                                   # CPU, 33 M parameters
    python benchmarks/start_stop.py --device cuda --preset 152m
    python benchmarks/start_stop.py --ranks 2 --saves 24 parallel.zero_stage=1     # saves alone

A start is `megameta train` in a fresh process. cold: no data-order cache, and the dataset's pages are dropped (Python's
own files stay in the system's cache). warm: the same again. resume: from a checkpoint. Saves with and without
checkpoint.async_save alternate in one run: the stall is all that training waits for, publication included.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from paired import ratio
from sides import write_random_dataset, write_run

from megameta.model import ModelConfig

#: Model, micro-batch size, tokens of the dataset.
PRESETS: dict[str, tuple[dict[str, int], int, int]] = {
    "smoke": ({"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "length": 64}, 2, 200_000),
    "cpu": ({"hidden_size": 512, "num_layers": 8, "num_heads": 8, "vocab_size": 8192, "length": 32}, 1, 5_000_000),
    "152m": (
        {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "vocab_size": 50258, "length": 1024},
        16,
        20_000_000,
    ),
}
#: Seconds for a start, on a machine that is busy with other things.
LIMIT = 600.0
#: What the seconds of such a run are of.
KINDS = ("sync", "async", "publication", "step", "step beside a writer")
#: Steps between two saves of the run that alternates.
BETWEEN = 5


def launch(config: Path, num_steps: int) -> dict[str, float]:
    """Run ``megameta train``; seconds to its first line in metrics.jsonl, and to its end."""
    run = config.with_suffix(".run")
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    command = [sys.executable, "-m", "megameta", "train", str(config), f"train.num_steps={num_steps}"]
    start = time.perf_counter()
    with (config.parent / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        first = None
        while process.poll() is None:
            if first is None and metrics.exists() and metrics.stat().st_size > before:
                first = time.perf_counter() - start
            if time.perf_counter() - start > LIMIT:
                process.kill()
            time.sleep(0.002)
    if process.returncode or first is None:
        raise SystemExit(f"exit code {process.returncode}:\n{(config.parent / 'log.txt').read_text()[-2000:]}")
    return {"first_step": first, "end": time.perf_counter() - start}


def drop_pages(prefix: Path) -> None:
    """Ask the system to forget the pages of a dataset."""
    for suffix in (".bin", ".idx"):
        descriptor = os.open(f"{prefix}{suffix}", os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def starts(config: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds to the first step: cold, warm, resumed."""
    run = config.with_suffix(".run")
    found: dict[str, list[float]] = {"cold": [], "warm": [], "resume": []}
    for number in range(repeats):
        shutil.rmtree(run, ignore_errors=True)
        drop_pages(config.with_name("train"))
        found["cold"].append(launch(config, 1)["first_step"])
        shutil.rmtree(run / "checkpoints")
        (run / "metrics.jsonl").unlink()
        found["warm"].append(launch(config, 1)["first_step"])
        found["resume"].append(launch(config, 2)["first_step"])
        print(", ".join(f"{name} {values[number]:.2f} s" for name, values in found.items()), flush=True)
    return found


def timed_trainer(run: Any, topology: Any) -> Any:
    """A trainer whose every second save is asynchronous; ``spent`` has the seconds that are waited, by kind."""
    from megameta.train.loop import Trainer
    from megameta.train.saving import RunCheckpoints

    spent: dict[str, list[float]] = {kind: [] for kind in KINDS}

    class TimedCheckpoints(RunCheckpoints):
        def save(self, state: Any) -> None:
            self.complete()
            number = sum(len(spent[kind]) for kind in ("sync", "async"))
            background.wait_for_removal()
            self.saver = background if number % 2 else None
            start = time.perf_counter()
            super().save(state)
            spent["async" if number % 2 else "sync"].append(time.perf_counter() - start)

        def complete(self) -> None:
            if self.saver is not None and self.saver.is_pending:
                start = time.perf_counter()
                super().complete()
                seconds = time.perf_counter() - start
                spent["publication"].append(seconds)
                spent["async"][-1] += seconds

    class Timed(Trainer):
        def _step(self) -> None:
            busy = self.checkpoints.is_writing
            start = time.perf_counter()
            super()._step()
            spent["step beside a writer" if busy else "step"].append(time.perf_counter() - start)

    def before_update() -> None:
        """Copies that are not made yet when weights are about to change hold training up, too."""
        start = time.perf_counter()
        background.wait_for_copies()
        if spent["async"]:
            spent["async"][-1] += time.perf_counter() - start

    trainer = Timed(run, topology)
    trainer.spent = spent  # type: ignore[attr-defined]
    trainer.checkpoints = TimedCheckpoints(run, topology, trainer.session, trainer.engine, trainer.records)
    background = trainer.checkpoints.saver
    trainer.engine.before_update = before_update
    return trainer


def stalls(config: str, saves: int, overrides: list[str]) -> dict[str, Any]:
    """Seconds that training waits at saves of either kind, and of steps beside a writing thread and without one."""
    from megameta.cluster.launch import initialize_process_group, make_topology, pick_device
    from megameta.train.run_config import load_run_config

    run = load_run_config(
        config,
        [
            "checkpoint.async_save=true",
            f"checkpoint.interval={BETWEEN}",
            f"run.dir={Path(config).with_suffix('.stalls')}",
            f"train.num_steps={BETWEEN * saves + 1}",  # the last save, which waits for its end, is a sync one
            *overrides,
        ],
    )
    degrees = run.parallel.tensor_parallel_size, run.parallel.pipeline_parallel_size
    topology = make_topology(
        pick_device(run.run.device), tensor_parallel_size=degrees[0], pipeline_parallel_size=degrees[1]
    )
    initialize_process_group(topology)
    trainer = timed_trainer(run, topology)
    trainer.run()
    size = sum(f.stat().st_size for f in next((Path(run.run.dir) / "checkpoints").glob("step_*")).iterdir())
    return {"seconds": trainer.spent, "checkpoint_bytes": size}


def stalls_in_process(config: Path, saves: int, ranks: int, overrides: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore"]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, "--child", str(config), "--saves", str(saves), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def show_stalls(found: dict[str, Any]) -> None:
    """Print them, and the ratio of pairs; the first save of each kind, which takes memory, is left out of it."""
    seconds = found["seconds"]
    size = found["checkpoint_bytes"] / 1e6
    print(f"a checkpoint of {size:,.0f} MB, every second one saved by a thread")
    for kind, values in seconds.items():
        if values:
            listed = " ".join(f"{value:.3f}" for value in values[:12])
            print(f"{kind:<22} median {statistics.median(values):8.3f} s   {listed}")
    pairs = min(len(seconds["sync"]), len(seconds["async"]))
    if pairs > 1:
        row = ratio("stall, async over sync", seconds["async"][1:pairs], seconds["sync"][1:pairs])
        found["stall"] = vars(row)
        print(f"{row.name}: {row.median:.3f} [{row.low:.3f}, {row.high:.3f}], {row.pairs} pairs; bar 0.05:"
              f" {'met' if row.median <= 0.05 else 'MISSED'}")  # fmt: skip


def main() -> None:
    """Start, resume, save; print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--repeats", type=int, default=2, help="of each kind of start")
    parser.add_argument("--saves", type=int, default=10, help="half of them asynchronous")
    parser.add_argument("--ranks", type=int, default=1, help="more than one: saves alone, of that many processes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run whose saves are timed")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        found = stalls(arguments.child, arguments.saves, arguments.overrides)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found), flush=True)
        os._exit(0)
    shape, micro, tokens = PRESETS[arguments.preset]
    model = ModelConfig(
        **{key: value for key, value in shape.items() if key != "length"}, max_position_embeddings=shape["length"]
    )
    precision = "bf16" if arguments.device == "cuda" else "fp32"
    with tempfile.TemporaryDirectory() as name:
        config = Path(name, "config.yaml")
        write_random_dataset(config.with_name("train"), model.vocab_size - 1, tokens)
        batch = micro * arguments.ranks  # divides by any number of replicas
        train = {"micro_batch_size": micro, "global_batch_size": batch, "precision": precision, "peak_tflops": 1.0}
        sections = {"train": train, "run": {"device": arguments.device}, "log": {"tensorboard": False}}
        sections["optimizer"] = {"warmup_steps": 0}
        write_run(config, model, sections)
        print(f"{arguments.preset}: {shape}, {tokens:,} tokens, {arguments.device}, torch {torch.__version__}")
        record: dict[str, Any] = {"command": sys.argv}
        if arguments.ranks == 1:
            record["starts"] = starts(config, arguments.repeats)
            for kind, values in record["starts"].items():
                print(f"{kind:<7} {statistics.median(values):.2f} s from launch to first step")
        record["stalls"] = stalls_in_process(config, arguments.saves, arguments.ranks, arguments.overrides)
        show_stalls(record["stalls"])
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
