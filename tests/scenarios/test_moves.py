"""Checkpoints between layouts, a fast part (``make test-grid`` has the 8-process ones)."""

import pytest

from tests.support.layouts import Case, make_corpus, reference
from tests.support.moves import go_on_many, worst_loss
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

FIRST, SECOND, THIRD = 3, 5, 6
START = Case(2, 2, 1, 1)
LAYOUTS = {1: [Case(1, 1, 1, 0)], 2: [Case(1, 2, 1, 1), Case(2, 1, 1, 2), Case(1, 1, 2, 3)], 4: [Case(2, 1, 2, 3)]}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    root = tmp_path_factory.mktemp("moves")
    corpus = make_corpus(root)
    start = run_ranks(go_on_many, 4, [(START, None, str(root / "start"), FIRST)], corpus)
    reports = {START: [rank[0] for rank in start]}
    for world, cases in LAYOUTS.items():
        moves = [(c, str(root / "start" / f"step_{FIRST}"), str(root / f"{c}"), SECOND) for c in cases]
        outcome = run_ranks(go_on_many, world, moves, corpus)
        reports |= {case: [rank[number] for rank in outcome] for number, case in enumerate(cases)}
    cases = [case for group in LAYOUTS.values() for case in group]
    back = [(START, str(root / f"{c}" / f"step_{SECOND}"), str(root / f"back {c}"), THIRD) for c in cases]
    outcome = run_ranks(go_on_many, 4, back, corpus)
    reports |= {("back", case): [rank[number] for rank in outcome] for number, case in enumerate(cases)}
    return reports, reference(START, corpus, THIRD)["losses"]


CASES = [case for group in LAYOUTS.values() for case in group]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layout_takes_up_what_another_left(chain, case):
    reports, losses = chain
    for report, last in [(r, SECOND) for r in reports[case]] + [(r, THIRD) for r in reports["back", case]]:
        assert report["same"], "saved again at once, the tensors are others"
        assert worst_loss(report, losses) < 1e-5
        assert report["optimizer_step"] == last
    assert list(reports[case][0]["losses"]) == [FIRST + 1, SECOND]


def test_the_start_itself(chain):
    reports, losses = chain
    assert worst_loss(reports[START][0], losses) < 1e-5
