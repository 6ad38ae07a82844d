"""Kill runs at random moments and damage checkpoints at random places: ``make torture``. Writes docs/reliability.md.

    python -m tests.torture [--kills 100] [--damages 1000] [--minutes N] [--output docs/reliability.md] [--seed 0]

The exit code is 1 where anything is lost, left behind, or not noticed. Seconds and moments differ from time to time;
what is drawn (targets, aims, places) follows from the seed.
"""

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import deepspeed
import torch

from megameta.checkpoint import open_checkpoint
from megameta.log import duration
from tests.support.damages import KINDS, damage_many, rewritten_by_one_process
from tests.support.killed_run import KEEP, RANKS
from tests.support.kills import TARGETS, Outcome, Plan, Torturer

#: Steps of a run; some forty kills long.
STEPS = 60
#: In the order in which a run goes through them.
MOMENTS = (
    "start-up",
    "loading",
    "training",
    "saving: files being written",
    "saving: named, not yet latest",
    "saving: older ones being removed",
)
Damages = dict[str, tuple[Counter[tuple[str, str]], list[str]]]


def run_damages(torturer: Torturer, count: int, draw: random.Random) -> Damages:
    """Damage the checkpoint that two ranks have written and the same one as one process writes it, half each."""
    two = open_checkpoint(torturer.whole.directory).path
    one = rewritten_by_one_process(two, torturer.folder / "one" / two.name)
    done = 0
    start = time.monotonic()

    def progress() -> None:
        nonlocal done
        done += 1
        if done % 100 == 0:
            left = (time.monotonic() - start) / done * (count - done)
            print(f"damage {done}/{count} · ETA {duration(left)}", flush=True)

    return {
        name: damage_many(path, torturer.folder / f"damaged {number}", share, draw, progress)
        for number, (name, path, share) in enumerate(
            [("written by 2 ranks", two, count - count // 2), ("written by one process", one, count // 2)]
        )
    }


def main() -> int:
    """Torture, report; 1 where something is lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no kill after these (default: no limit)")
    parser.add_argument("--output", type=Path, default=None, help="write the report there")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    plans = [Plan.drawn(random.Random(f"{arguments.seed} kill {number}")) for number in range(arguments.kills)]
    with tempfile.TemporaryDirectory() as folder:
        torturer = Torturer(Path(folder), STEPS, say=lambda line: print(line, flush=True))
        print(f"a run of {STEPS} steps that nothing disturbs", flush=True)
        torturer.run_undisturbed()
        print(f"it took {duration(torturer.outcome.whole_seconds)}", flush=True)
        damages = run_damages(torturer, arguments.damages, random.Random(f"{arguments.seed} damages"))
        outcome = torturer.torture(plans, start + 60 * arguments.minutes)
    elapsed = time.monotonic() - start
    problems = [*outcome.problems, *(problem for _, found in damages.values() for problem in found)]
    for problem in problems:
        print(f"FAIL {problem}")
    damaged = sum(sum(counts.values()) for counts, _ in damages.values())
    print(f"{len(outcome.kills)} kills, {damaged} damages, {len(problems)} failures, {duration(elapsed)}")
    if arguments.output:
        text = report(arguments, outcome, damages, elapsed)
        arguments.output.write_text(text, encoding="utf-8")
        print(f"written: {arguments.output}")
    return 1 if problems else 0


# --- report ---------------------------------------------------------------------------------------------------------


def report(arguments: argparse.Namespace, outcome: Outcome, damages: Damages, elapsed: float) -> str:
    """docs/reliability.md."""
    kills = outcome.kills
    few = "" if len(kills) >= arguments.kills else f" ({arguments.kills} were asked for; time or a failure ended it)"
    saving = sum(kill.moment.startswith("saving") for kill in kills)
    lines = [
        "# What a run and its checkpoints survive",
        "",
        f"Written by `make torture` (`python -m tests.torture --kills {arguments.kills} --damages {arguments.damages}"
        f" --seed {arguments.seed}`; {duration(elapsed)} h). Machine: {os.cpu_count()} cores, shared with other jobs,"
        f" {platform.machine()}, CPU, gloo. Python {platform.python_version()}, torch {torch.__version__}, deepspeed"
        f" {deepspeed.__version__}.",
        "",
        "## Kills",
        "",
        f"`megameta train CONFIG --nproc-per-node {RANKS}` of a tiny model for {STEPS} steps, ZeRO 1, a checkpoint"
        f" after every step or every second one (drawn at each start), `checkpoint.keep` {KEEP}. SIGKILL to everything"
        " (launcher and ranks) or to one rank at a random moment; then the same command again. A run that came to its"
        f" end was compared and followed by a new one. {len(kills)} kills{few}, {saving} of them while saving;"
        f" {outcome.starts} starts; {outcome.completed} runs completed.",
        "",
        *_kill_table(outcome),
        "",
        "After every kill: a checkpoint opens if there had been one, and it is not older than the one before; no"
        " process is left (a single rank's death ends the others within the launcher's grace, and is said once, with"
        " what to do). At the end of every run: losses and gradient norms of all steps and the tensors of the last"
        " checkpoint are bitwise those of a run that nothing disturbed; no unfinished file is left.",
        "",
        *_costs(outcome),
        "",
        "## Damage",
        "",
        "One file of a copy at a time, restored after each; `open_checkpoint` had to refuse with a message that names"
        " the file, and with no other error. " + _damage_sum(damages),
        "",
        *_damage_table(damages),
        "",
        "## Failures",
        "",
        *_failures(outcome, damages),
        "",
        *NOT_COVERED,
        "",
    ]
    return "\n".join(lines)


NOT_COVERED = (
    "## What this does not show",
    "",
    "- Power loss. A kill leaves the system's cache as it is, so what was never synced survives here and may not there."
    " The order of the syncs (files, directory, rename, parent, `latest`) is tested call by call in"
    " tests/checkpoint/test_store.py, not on a disk that loses power.",
    "- Disks and file systems that acknowledge a sync and have not done it.",
    "- NFS and other shared file systems, where a rename is not seen by all clients at once; several nodes.",
    "- A death of the launcher alone: its ranks go on, hold the run directory's lock, and a second start is refused"
    " with a message until they end.",
    "- The file `latest` has no checksum: a flipped bit in it can name the other checkpoint that is kept. That one is"
    " checked like any.",
    "- Damage that is made on purpose: the hashes are against accidents.",
    "- GPUs, pipeline and tensor parallel runs, ZeRO stages other than 1.",
)


def _kill_table(outcome: Outcome) -> list[str]:
    by = Counter((kill.moment, kill.target) for kill in outcome.kills)
    lines = [f"| moment | {' | '.join(TARGETS)} | all | steps repeated |", "|---" * (len(TARGETS) + 3) + "|"]
    for moment in MOMENTS:
        here = [kill for kill in outcome.kills if kill.moment == moment]
        counts = " | ".join(str(by[moment, target]) for target in TARGETS)
        lines.append(f"| {moment} | {counts} | {len(here)} | {sum(kill.step - kill.saved for kill in here)} |")
    counts = " | ".join(str(sum(by[moment, target] for moment in MOMENTS)) for target in TARGETS)
    return [*lines, f"| all | {counts} | {len(outcome.kills)} | {outcome.repeated} |"]


def _costs(outcome: Outcome) -> list[str]:
    single = [kill.gone_after for kill in outcome.kills if kill.target != "everything"]
    worst = f"; after the death of one rank all processes were gone within {max(single):.1f} s" if single else ""
    return [
        f"Time: the killed runs took {duration(outcome.seconds)} h for {outcome.completed} × {STEPS} steps, against"
        f" {duration(outcome.whole_seconds)} h for the undisturbed {STEPS}: {duration(outcome.lost_seconds)} h were"
        f" lost, nearly all of it in starting {outcome.starts} times; {outcome.repeated} steps were repeated{worst}."
    ]


def _damage_sum(damages: Damages) -> str:
    total = sum(sum(counts.values()) for counts, _ in damages.values())
    missed = sum(len(problems) for _, problems in damages.values())
    return f"{total - missed} of {total} were refused so."


def _damage_table(damages: Damages) -> list[str]:
    lines = [f"| checkpoint | file | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 2) + "|"]
    for name, (counts, _) in damages.items():
        for file in sorted({file for file, _ in counts}):
            lines.append(f"| {name} | {file} | {' | '.join(str(counts[file, kind]) for kind in KINDS)} |")
    return lines


def _failures(outcome: Outcome, damages: Damages) -> list[str]:
    problems = [*outcome.problems, *(problem for _, found in damages.values() for problem in found)]
    return [f"- {' '.join(problem.split())[:600]}" for problem in problems] or ["None in this run."]


if __name__ == "__main__":
    sys.exit(main())
