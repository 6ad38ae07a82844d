"""What becomes of a job whose ranks have ended: a pure function, so that every case has a test.

What was seen of SLURM 22.05 and decides here: a script that requeues whenever it is told to end brings a cancelled job
back to life, so the state of the job is asked first (RUNNING at a time limit's warning and at a preemption, COMPLETING
at scancel); a preempted job that ends within its grace is not requeued by SLURM; ``--requeue`` acts on lost nodes, not
on ranks that fail; and a job that requeues itself before the controller has noticed a lost node may be given that
node again.
"""

from dataclasses import dataclass
from enum import Enum

from megameta.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE

#: Failures in a row, with no new checkpoint between them, after which a job stays down.
MAX_FAILURES = 3


class Action(Enum):
    """What the batch script does."""

    FINISH = "finish"
    """The run is done: the links of its chain that wait are cancelled; exit 0."""
    REQUEUE = "requeue"
    """The job goes back into the queue under its number."""
    WAIT = "wait"
    """SLURM is left the time to notice a lost node and to requeue the job; after that as REQUEUE."""
    LEAVE = "leave"
    """The job ends as it is; a chain's next link goes on."""
    GIVE_UP = "give up"
    """The job fails; the links of its chain that wait are cancelled."""


@dataclass(frozen=True)
class Ended:
    """How the ranks of a job have ended."""

    code: int
    """Exit code of srun: the highest of its tasks', 128 + n for a signal."""
    state: str | None
    """The job's state, as squeue says; None where the controller does not answer."""
    stale: bool = False
    """Whether the controller has started the job again since: this process is left over from a lost node."""
    kind: str | None = None
    """What the attempt recorded: mistake, lost, stuck, superseded; None where it said nothing."""
    failures: int = 0
    """Failures in a row before this one, with no new checkpoint since."""
    chain: bool = False
    """Whether the job is a link of a chain."""
    requeues: bool = True
    """Whether the job may be requeued."""


@dataclass(frozen=True)
class Decision:
    """What to do and how to say it."""

    action: Action
    reason: str
    code: int
    """Exit code of the batch script, where it comes to that."""
    is_failure: bool = False
    """Whether this counts among the failures in a row."""


def decide(ended: Ended) -> Decision:
    """The decision; the first rule that fits."""
    code = ended.code
    if ended.stale:
        return Decision(Action.LEAVE, "the job runs elsewhere by now, and this is what was left of it", code)
    if code == EXIT_OK:
        return Decision(Action.FINISH, "the run is done", EXIT_OK)
    if ended.state is not None and ended.state != "RUNNING":
        return Decision(Action.LEAVE, f"the job is {ended.state or 'gone'}: it was cancelled, and stays so", code)
    if ended.kind == "superseded":
        return Decision(Action.LEAVE, "a newer attempt has the run", code)
    if code == EXIT_INTERRUPTED:
        if ended.chain:
            return Decision(Action.LEAVE, "a checkpoint is saved; the next link of the chain goes on", code)
        if not ended.requeues:
            return Decision(Action.LEAVE, "a checkpoint is saved; the job may not be requeued: submit it again", code)
        return Decision(Action.REQUEUE, "a checkpoint is saved", code)
    return _after_a_failure(ended)


def _after_a_failure(ended: Ended) -> Decision:
    code = ended.code
    if ended.kind == "mistake" or code == EXIT_USAGE:
        return Decision(Action.GIVE_UP, "the run says what is wrong; the same would come again", EXIT_FAILURE, True)
    if ended.failures + 1 >= MAX_FAILURES:
        return Decision(
            Action.GIVE_UP, f"{ended.failures + 1} failures in a row without a new checkpoint between them", code, True
        )
    what = {"lost": "a node is lost", "stuck": "the run was stuck"}.get(ended.kind or "", _meaning(code))
    count = f"failure {ended.failures + 1} of at most {MAX_FAILURES} in a row"
    if not ended.requeues:
        return Decision(Action.LEAVE, f"{what}; the job may not be requeued ({count})", code, True)
    action = Action.WAIT if ended.kind == "lost" else Action.REQUEUE
    return Decision(action, f"{what}; {count}", code, True)


def _meaning(code: int) -> str:
    if code > 128:
        return f"a rank was ended by signal {code - 128}"
    return f"a rank failed with code {code}"
