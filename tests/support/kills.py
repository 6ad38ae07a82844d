"""A run that is killed at random moments and started again; what must hold after each kill. For ``torture.py``."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megameta.cluster.launch import GRACE_SECONDS
from megameta.log import duration
from tests.support.killed_run import KEEP, RANKS, Run
from tests.support.runs import last_step
from tests.support.training import tiny_values, write_corpus

#: What a kill hits, and how often: the launcher and all ranks at once, or one rank, whose launcher ends the others.
TARGETS = {"everything": 0.5, "rank 0": 0.25, "rank 1": 0.25}
#: What a kill waits for, and how often. Only where it hits counts in the report (``Run.moment``).
AIMS = {"start-up": 0.08, "loading": 0.07, "training": 0.35, "writing": 0.3, "renaming": 0.2}
#: Steps of a start before a kill that waits for some, at most.
MOST_STEPS = 3
#: After so many it gives up.
MOST_PROBLEMS = 10
#: Seconds for an end beyond the launcher's grace, on a machine that is busy with other things.
SLACK = 600.0


@dataclass(frozen=True)
class Plan:
    """One kill to come."""

    target: str
    aim: str
    steps: int
    """Steps of this start that it waits for first."""
    share: float
    """When it strikes within what it waits for, from 0 to 1."""
    interval: int
    """checkpoint.interval of the start."""

    @classmethod
    def drawn(cls, draw: random.Random) -> "Plan":
        target = draw.choices(list(TARGETS), list(TARGETS.values()))[0]
        aim = draw.choices(list(AIMS), list(AIMS.values()))[0]
        return cls(target, aim, draw.randint(0, MOST_STEPS), draw.random(), draw.choice([1, 2]))


@dataclass(frozen=True)
class Kill:
    """A kill that has happened."""

    target: str
    moment: str
    step: int
    """Last step in metrics.jsonl."""
    saved: int
    """Step of the checkpoint that is left; 0 where there has been none."""
    gone_after: float
    """Seconds from the kill until no process was left."""


@dataclass
class Outcome:
    """All kills of a torture, and what went wrong."""

    kills: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    starts: int = 0
    """Of the runs that were killed."""
    completed: int = 0
    seconds: float = 0.0
    """That the killed runs took together."""
    whole_seconds: float = 0.0
    """That the undisturbed run took."""

    @property
    def repeated(self) -> int:
        """Steps that had to be made once more."""
        return sum(kill.step - kill.saved for kill in self.kills)

    @property
    def lost_seconds(self) -> float:
        """What the killed runs took beyond as many undisturbed ones."""
        return self.seconds - self.completed * self.whole_seconds


class Torturer:
    """Kills runs until there have been enough kills; lets the last one run to its end.

    A run that gets to its end before is compared, too, and the next kills are of a new one.
    """

    def __init__(self, folder: Path, steps: int, say: Callable[[str], None] = print) -> None:
        self.folder, self.say = folder, say
        self.outcome = Outcome()
        self._runs = 0
        self._spans: dict[str, list[float]] = {"start-up": [3.0], "loading": [3.0], "step": [0.2]}
        write_corpus(folder / "text")
        values = tiny_values(
            "text", train__num_steps=steps, train__peak_tflops=1.0, checkpoint__keep=KEEP, parallel__zero_stage=1
        )
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        self.whole = Run(folder, "whole")

    def run_undisturbed(self) -> None:
        """What the killed runs have to come to."""
        self._run_to_the_end(self.whole)
        if self.whole.code != 0:
            raise RuntimeError(f"the undisturbed run failed: {self.whole.said}")
        self.outcome.whole_seconds = time.monotonic() - self.whole.began

    def torture(self, plans: list[Plan], until: float = float("inf")) -> Outcome:
        """Kill as planned, but not after ``until`` on the monotonic clock; every completed run is compared."""
        outcome, start = self.outcome, time.monotonic()
        run, waiting = self._new_run(), list(plans)
        while waiting and len(outcome.problems) < MOST_PROBLEMS and time.monotonic() < until:
            problems = len(outcome.problems)
            kill = self._kill(run, waiting[0])
            if kill is None:
                self._completed(run)
                run = self._new_run()
                continue
            outcome.kills.append(kill)
            waiting.pop(0)
            done = len(outcome.kills)
            left = (time.monotonic() - start) / done * len(waiting)
            self.say(
                f"kill {done}/{len(plans)} · {kill.target} · {kill.moment} · step {kill.step}, saved {kill.saved}"
                f" · gone after {kill.gone_after:.1f} s · ETA {duration(left)}"
            )
            if len(outcome.problems) > problems:
                self.say(f"FAIL {outcome.problems[-1]}")
                run = self._new_run()
        self._run_to_the_end(run)
        outcome.starts += 1
        self._completed(run)
        outcome.seconds = time.monotonic() - start
        return outcome

    def _new_run(self) -> Run:
        self._runs += 1
        return Run(self.folder, f"killed{self._runs}")

    def _run_to_the_end(self, run: Run) -> None:
        run.start(interval=1)
        try:
            run.wait_until(lambda: False, pause=0.2)
        finally:
            run.end()

    def _completed(self, run: Run) -> None:
        """Judge a run that has ended by itself."""
        self.outcome.completed += run.code == 0
        problems = run.check_completed(self.whole) if run.code == 0 else [f"ended with {run.code}: {run.said}"]
        self._add(run, problems)
        self.say(f"run {run.directory.name} is complete{': ' * bool(problems)}{'; '.join(problems)}")

    def _add(self, run: Run, problems: list[str]) -> None:
        at = f"{run.directory.name}, kill {len(self.outcome.kills) + 1}"
        self.outcome.problems += [f"{at}: {problem}" for problem in problems]

    def _kill(self, run: Run, plan: Plan) -> Kill | None:
        """Start a run and kill it; None where it came to its end before that."""
        run.start(plan.interval)
        self.outcome.starts += 1
        try:
            kill = self._strike(run, plan) if self._wait_for_moment(run, plan) else None
            if kill is None:
                run.wait_until(lambda: False, pause=0.2)
            return kill
        finally:
            run.end()

    def _strike(self, run: Run, plan: Plan) -> Kill | None:
        if plan.target != "everything" and not run.wait_until(lambda: len(run.ranks()) == RANKS, pause=0.01):
            return None
        moment, before = run.moment(), run.saved
        if not run.strike(plan.target):
            return None
        struck = time.monotonic()
        left = run.wait_for_the_end(GRACE_SECONDS + SLACK)
        gone_after = time.monotonic() - struck
        problems = [f"{len(left)} processes were left after {gone_after:.0f} s"] if left else []
        if plan.target != "everything":
            problems += self._check_said(run)
        step = max(last_step(run.directory), before)
        problems += run.check_after_kill()
        self._add(run, problems)
        return Kill(plan.target, moment, max(step, run.saved), run.saved, gone_after)

    @staticmethod
    def _check_said(run: Run) -> list[str]:
        """What a person has to hear when a rank is killed: once, with what to do."""
        problems = [] if run.code else [f"exit code {run.code} although a rank was killed"]
        said = run.said
        if said.count("error: ") != 1 or "SIGKILL" not in said or "start the run again" not in said or "Trace" in said:
            problems.append(f"a rank was killed and this was said:\n{run.said}")
        return problems

    def _wait_for_moment(self, run: Run, plan: Plan) -> bool:
        """Wait until it is time for the kill; False where the run has ended."""
        if plan.aim == "start-up":
            return self._pause(run, plan.share * self._typical("start-up"))
        if not run.wait_until(run.holds_lock, pause=0.1):
            return False
        locked = time.monotonic()
        self._spans["start-up"].append(locked - run.began)
        if plan.aim == "loading":
            return self._pause(run, plan.share * self._typical("loading"))
        if not run.wait_until(lambda: run.step() > run.saved, pause=0.02):
            return False
        first = time.monotonic()
        self._spans["loading"].append(first - locked)
        if not run.wait_until(lambda: run.step() > run.saved + plan.steps, pause=0.005):
            return False
        if plan.steps:
            self._spans["step"].append((time.monotonic() - first) / plan.steps)
        if plan.aim == "training":
            return self._pause(run, plan.share * self._typical("step"))
        if not run.wait_until(run.writing, pause=0.001):
            return False
        if plan.aim == "writing":
            return self._pause(run, plan.share * 0.03)
        return run.wait_until(lambda: not run.writing(), pause=0.0005) and self._pause(run, plan.share * 0.01)

    def _typical(self, span: str) -> float:
        values = self._spans[span]
        return statistics.median(values[1:] or values)  # the first is a guess

    def _pause(self, run: Run, seconds: float) -> bool:
        time.sleep(seconds)
        return run.code is None
