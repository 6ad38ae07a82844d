"""Every layout against one process: ``make test-grid``. Writes docs/parity.md and fails where a bound is broken.

    python -m tests.parity_grid [--output docs/parity.md] [--worlds 1 2 4 8]

Every TP × PP × DP × ZeRO layout of 1, 2, 4 and 8 processes runs once with all switches on; a pairwise covering of the
other factors runs over a choice of layouts. Processes are started once a world size; a case that breaks them is run
again alone, so that one failure does not hide another.
"""

import argparse
import dataclasses
import platform
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from tests.support.layouts import (
    FACTORS,
    STEPS,
    TOLERANCE,
    Case,
    Comparison,
    compare,
    compare_bf16,
    layouts,
    make_corpus,
    reference,
    run_cases,
)
from tests.support.models import covering
from tests.support.moves import LAYOUTS, START, go_on_many, worst_loss
from tests.support.ranks import RankError, run_ranks

#: Layouts over which the other factors are covered pairwise.
COVERED = ((2, 1, 2, 1), (2, 1, 1, 2), (2, 1, 1, 3), (1, 2, 2, 1), (2, 2, 1, 1), (1, 1, 2, 0))
#: Seconds that a case may take, on a busy machine too.
TIMEOUT = 600
#: Steps to which a checkpoint that moves is trained: at the start, at the other layout, and back at the start.
MOVE_AT = (6, 10, 12)


def pairwise() -> list[Case]:
    """Cases in which every pair of levels of two factors occurs, the layout being one of the factors."""
    rows = covering({"layout": COVERED, **{factor: list(levels) for factor, levels in FACTORS.items()}})
    return [Case(*row.pop("layout"), factors=tuple(row.items())) for row in rows]


def run_world(world: int, cases: list[Case], corpus: str) -> dict[Case, list[dict[str, Any]] | str]:
    """Reports of all ranks by case, or how it failed."""
    try:
        reports = run_ranks(run_cases, world, cases, corpus, timeout=60 + TIMEOUT * len(cases))
    except RankError as error:
        if len(cases) == 1:
            return {cases[0]: str(error)}
        alone = (run_world(world, [case], corpus) for case in cases)
        return {case: outcome for part in alone for case, outcome in part.items()}
    return {case: [rank[number] for rank in reports] for number, case in enumerate(cases)}


@dataclasses.dataclass(frozen=True)
class Moved:
    """A checkpoint's way to a layout and back."""

    same: bool
    there: float
    back: float

    @property
    def holds(self) -> bool:
        return self.same and max(self.there, self.back) <= TOLERANCE["loss"]


def run_moves(corpus: str, root: Path) -> dict[Case, Moved]:
    """From ``START`` to every layout and back."""
    first, second, third = MOVE_AT
    losses = reference(START, corpus, third)["losses"]
    run_ranks(go_on_many, START.world_size, [(START, None, str(root / "start"), first)], corpus, timeout=TIMEOUT)
    there: dict[Case, dict[str, Any]] = {}
    for world in sorted({case.world_size for case in LAYOUTS}):
        cases = [case for case in LAYOUTS if case.world_size == world]
        moves = [(case, str(root / "start" / f"step_{first}"), str(root / _layout(case)), second) for case in cases]
        reports = run_ranks(go_on_many, world, moves, corpus, timeout=60 + TIMEOUT * len(cases))
        there |= dict(zip(cases, reports[0]))
    moves = [
        (START, str(root / _layout(c) / f"step_{second}"), str(root / f"back {_layout(c)}"), third) for c in LAYOUTS
    ]
    back = run_ranks(go_on_many, START.world_size, moves, corpus, timeout=60 + TIMEOUT * len(moves))[0]
    found = {
        case: Moved(there[case]["same"] and report["same"], worst_loss(there[case], losses), worst_loss(report, losses))
        for case, report in zip(LAYOUTS, back)
    }
    for case, move in found.items():
        print(f"{'ok  ' if move.holds else 'FAIL'} {_layout(START)} → {_layout(case)} → back: {move}", flush=True)
    return found


def _layout(case: Case) -> str:
    return f"TP {case.tensor} × PP {case.pipeline} × DP {case.data}, ZeRO {case.zero}"


def judge(case: Case, outcome: list[dict[str, Any]] | str, references: Any, alone: Any) -> Comparison:
    """The comparison of a case; how it failed counts as a violation."""
    if isinstance(outcome, str):
        return Comparison({}, [("failed", outcome)])
    if case.levels["precision"] == "bf16":
        own = alone[_alone(case)]
        return (
            compare_bf16(outcome, own, references[_same_model(case)])
            if not isinstance(own, str)
            else Comparison({}, [("failed", own)])
        )
    return compare(outcome, references[_same_model(case)])


def against_float32(case: Case, outcome: list[dict[str, Any]], reference: Any, corpus: str) -> Comparison:
    """A case whose gradients alone are too far from float64, against those of one process in float32: where that one
    is as far itself, it is rounding and not the layout."""
    alone = run_world(1, [_alone(case)], corpus)[_alone(case)]
    if isinstance(alone, str):
        return Comparison({}, [("failed", alone)])
    gradients = {name: gradient.double() for name, gradient in alone[0]["gradients"].items()}
    found = compare(outcome, {**reference, "gradients": gradients})
    found.note = f"gradients against one float32 process, which is {_own_error(alone, reference):.1e} from float64"
    return found


def _own_error(alone: list[dict[str, Any]], reference: Any) -> float:
    return compare(alone, reference).worst["gradient"]


def _same_model(case: Case) -> Case:
    """What decides the reference: the model and its data, not the layout, micro-batches or precision."""
    fixed = {"micro": "1", "sequence": "off", "recompute": "off", "precision": "fp32"}
    fixed |= {"loss": "logits", "compile": "none"}
    factors = tuple((factor, fixed.get(factor, level)) for factor, level in case.factors)
    return Case(1, case.pipeline if case.pipeline > 2 else 1, 1, 0, factors)


def _alone(case: Case) -> Case:
    return dataclasses.replace(case, tensor=1, pipeline=1, data=1, zero=1)


def main() -> int:
    """Run the grid; the exit code says whether every layout computes the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=None, help="write the table there")
    parser.add_argument("--pipelines", action="store_true", help="only layouts with pipeline stages, all switches on")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of processes")
    arguments = parser.parse_args()
    start = time.monotonic()
    cases = list(
        dict.fromkeys([*layouts(tuple(arguments.worlds)), *(c for c in pairwise() if c.world_size in arguments.worlds)])
    )
    if arguments.pipelines:
        cases = [case for case in cases if case.pipeline > 1 and case.changed == "all on"]
    bf16 = list(dict.fromkeys(_alone(case) for case in cases if case.levels["precision"] == "bf16"))
    results: dict[Case, Comparison] = {}
    seconds: dict[Case, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder))
        references = {}
        for number, case in enumerate(models := list(dict.fromkeys(_same_model(case) for case in cases)), 1):
            references[case] = reference(case, corpus)
            print(f"\rreference {number} of {len(models)}", end="", flush=True)
        print()
        alone = run_world(1, bf16, corpus) if bf16 else {}
        by_world: dict[int, list[Case]] = defaultdict(list)
        for case in sorted(cases, key=lambda case: case.zero == 3):
            by_world[case.world_size].append(case)
        for world, group in sorted(by_world.items()):
            print(f"{world} process(es), {len(group)} cases", flush=True)
            for case, outcome in run_world(world, group, corpus).items():
                results[case] = judge(case, outcome, references, alone)
                only_gradients = {kind for kind, _ in results[case].violations} == {"gradient"}
                if only_gradients and case.levels["precision"] == "fp32" and not isinstance(outcome, str):
                    results[case] = against_float32(case, outcome, references[_same_model(case)], corpus)
                seconds[case] = 0.0 if isinstance(outcome, str) else outcome[0]["seconds"]
                print(_line(case, results[case]), f"({seconds[case]:.0f} s)", flush=True)
        moved = run_moves(corpus, Path(folder)) if 8 in arguments.worlds and not arguments.pipelines else {}
    elapsed = time.monotonic() - start
    bad = [case for case in results if results[case].violations] + [case for case in moved if not moved[case].holds]
    good = len(results) + len(moved) - len(bad)
    print(f"{good} of {len(results) + len(moved)} cases within the bounds, {elapsed / 60:.0f} minutes")
    if arguments.output:
        arguments.output.write_text(_report(cases, results, moved, elapsed), encoding="utf-8")
        print(f"written: {arguments.output}")
    return 1 if bad else 0


def _line(case: Case, result: Comparison) -> str:
    verdict = "ok  " if not result.violations else "FAIL"
    numbers = " ".join(f"{kind} {value:.1e}" for kind, value in result.worst.items())
    words = "; ".join(f"{kind}: {words}" for kind, words in result.violations[:5])
    return f"{verdict} {case} | {numbers} {words}"


def _report(cases: list[Case], results: dict[Case, Comparison], moved: dict[Case, Moved], elapsed: float) -> str:
    float32 = [case for case in cases if case.levels["precision"] == "fp32"]
    bf16 = [case for case in cases if case.levels["precision"] == "bf16"]
    good = sum(not result.violations for result in results.values())
    lines = [
        "# Every layout against one process",
        "",
        f"{good} of {len(results)} cases hold. Written by `make test-grid` ({elapsed / 60:.0f} minutes;"
        f" {platform.machine()}, torch {torch.__version__}, gloo, seed 11); what is compared and how stands in"
        " [parallel.md](parallel.md).",
        "",
        f"float32, {STEPS} steps against a float64 loop over single samples in one process: the",
        "largest relative error of any parameter's gradient before step 1 (by norm), of any step's loss and gradient",
        f"norm, and of the held-out loss. Bounds: {', '.join(f'{b:.0e}' for b in TOLERANCE.values())}. In a row that",
        "holds initial weights are bitwise those of one process, and replicas bitwise equal after the last step.",
        "",
        *_table(float32, results, ["gradient", "loss", "norm", "evaluation"]),
        "",
        "bf16: the layout's error against the same float64 reference over the error of one bf16 process; bound 2.",
        "",
        *_table(bf16, results, ["gradient", "loss", "norm", "evaluation"]),
        "",
        "## Checkpoints that move",
        "",
        f"Trained to step {MOVE_AT[0]} at {_layout(START)}, taken up by the layout of the row to step",
        f"{MOVE_AT[1]}, and taken back to step {MOVE_AT[2]}. Bitwise: saved again as soon as they are loaded, weights",
        "and moments are the same bits, out and back. Loss: the largest relative deviation from the undisturbed",
        "float64 curve; bound 1e-05.",
        "",
        "| layout | bitwise | loss there | loss back |",
        "|---|---|---|---|",
        *(
            f"| {_layout(case)} | {'yes' if move.same else '**no**'} | {move.there:.1e} | {move.back:.1e} |"
            for case, move in moved.items()
        ),
        "",
        "All on: " + ", ".join(f"{factor} {next(iter(levels))}" for factor, levels in FACTORS.items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _table(cases: list[Case], results: dict[Case, Comparison], kinds: list[str]) -> list[str]:
    rows = [f"| TP | PP | DP | ZeRO | switches | {' | '.join(kinds)} | holds |", "|---" * (6 + len(kinds)) + "|"]
    for case in cases:
        result = results[case]
        numbers = " | ".join(f"{result.worst[kind]:.1e}" if kind in result.worst else "–" for kind in kinds)
        verdict = (
            ("yes: " + result.note if result.note else "yes")
            if not result.violations
            else "**no**: " + "; ".join(kind for kind, _ in result.violations)
        )
        rows.append(
            f"| {case.tensor} | {case.pipeline} | {case.data} | {case.zero} | {case.changed} | {numbers} | {verdict} |"
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
