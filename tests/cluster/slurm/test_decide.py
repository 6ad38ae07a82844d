"""What becomes of a job: a table of cases, written from what SLURM was seen to do."""

import pytest

from megameta.cluster.slurm.decide import MAX_FAILURES, Action, Ended, decide
from megameta.cluster.slurm.supervise import failures_in_a_row

RUNNING = "RUNNING"


@pytest.mark.parametrize(
    ("ended", "action"),
    [
        (Ended(0, RUNNING), Action.FINISH),
        (Ended(0, RUNNING, chain=True), Action.FINISH),
        (Ended(75, RUNNING), Action.REQUEUE),  # time limit, preemption
        (Ended(75, None), Action.REQUEUE),  # the controller does not answer: scontrol will say
        (Ended(75, RUNNING, failures=9), Action.REQUEUE),  # saved: no failure
        (Ended(75, RUNNING, chain=True), Action.LEAVE),
        (Ended(75, RUNNING, requeues=False), Action.LEAVE),
        # A batch script on a node that was cut off: whatever happened there, the job is another's by now.
        *((Ended(code, RUNNING, stale=True), Action.LEAVE) for code in (0, 1, 75, 76, 143)),
        # scancel: the ranks save and exit 75, or are killed; the job must stay down.
        (Ended(75, "COMPLETING"), Action.LEAVE),
        (Ended(75, "CANCELLED"), Action.LEAVE),
        (Ended(75, ""), Action.LEAVE),
        (Ended(143, "COMPLETING"), Action.LEAVE),
        (Ended(137, "COMPLETING"), Action.LEAVE),
        (Ended(76, "COMPLETING", kind="lost"), Action.LEAVE),  # SLURM has requeued it already
        (Ended(76, RUNNING, kind="lost"), Action.WAIT),
        (Ended(143, RUNNING, kind="lost"), Action.WAIT),  # srun's code is the highest of its tasks'
        (Ended(76, RUNNING, kind="lost", failures=MAX_FAILURES - 1), Action.GIVE_UP),
        (Ended(76, RUNNING, kind="stuck"), Action.REQUEUE),
        (Ended(76, RUNNING, kind="superseded"), Action.LEAVE),
        (Ended(76, None, kind="superseded"), Action.LEAVE),
        (Ended(1, RUNNING, kind="mistake"), Action.GIVE_UP),
        (Ended(143, RUNNING, kind="mistake"), Action.GIVE_UP),
        (Ended(2, RUNNING), Action.GIVE_UP),
        (Ended(137, RUNNING), Action.REQUEUE),
        (Ended(1, RUNNING), Action.REQUEUE),
        (Ended(1, RUNNING, failures=MAX_FAILURES - 2), Action.REQUEUE),
        (Ended(1, RUNNING, failures=MAX_FAILURES - 1), Action.GIVE_UP),
        (Ended(1, RUNNING, requeues=False), Action.LEAVE),
        (Ended(1, RUNNING, chain=True), Action.REQUEUE),
    ],
)
def test_decisions(ended, action):
    decision = decide(ended)
    assert decision.action is action
    assert decision.reason and (decision.code == 0) == (ended.code == 0)
    if ended.stale:
        assert not decision.is_failure
        return
    assert decision.is_failure == (
        ended.state in (RUNNING, None) and ended.code not in (0, 75) and ended.kind != "superseded"
    )


def line(saved, failed=True):
    return {"saved": saved, "failed": failed}


@pytest.mark.parametrize(
    ("records", "saved", "expected"),
    [
        ([], 0, 0),
        ([line(0)], 0, 1),
        ([line(0), line(0)], 0, 2),
        ([line(0), line(0)], 20, 0),  # a checkpoint since: it gets on
        ([line(0), line(20), line(20)], 20, 2),
        ([line(20), line(20, failed=False), line(20)], 20, 1),
        ([line(20), line(20, failed=False)], 20, 0),
    ],
)
def test_failures_count_while_nothing_is_saved(records, saved, expected):
    assert failures_in_a_row(records, saved) == expected


def test_failures_are_bounded_whatever_comes():
    """As the supervisor counts: at most MAX_FAILURES starts without a new checkpoint."""
    records, starts = [], 0
    while True:
        starts += 1
        decision = decide(Ended(1, RUNNING, failures=failures_in_a_row(records, 40)))
        records.append({"saved": 40, "failed": decision.is_failure})
        if decision.action is Action.GIVE_UP:
            break
        assert starts < 50
    assert starts == MAX_FAILURES
