"""A fast part of the grid (``make test-grid`` is the whole), and proof that its comparison sees broken layouts."""

import pytest

from tests.support.layouts import ALL_ON, Case, compare, compare_bf16, layouts, make_corpus, reference, run_case
from tests.support.mutations import MUTATIONS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

#: Breaks show in the first step, or in the weights that it leaves.
STEPS, BROKEN_STEPS = 4, 2
BF16 = tuple({**ALL_ON, "precision": "bf16"}.items())
#: The branch in one of two layers, and so on one of two stages.
FIRST, SECOND = (tuple({**ALL_ON, "meta": f"{which} layer"}.items()) for which in ("first", "second"))
FUSED, COMPILED = (tuple({**ALL_ON, **change}.items()) for change in ({"loss": "fused"}, {"compile": "blocks"}))
BOTH = tuple({**ALL_ON, "loss": "fused", "compile": "blocks", "recompute": "off"}.items())
#: By number of processes; ZeRO 3 last, as it patches torch for the rest of the process.
CASES = {
    1: [Case(1, 1, 1, 1, BF16), Case(1, 1, 1, 0, BOTH), Case(1, 1, 1, 1, COMPILED)],
    2: [
        Case(2, 1, 1, 0),
        Case(1, 2, 1, 1),
        Case(1, 2, 1, 1, FIRST),
        Case(1, 2, 1, 1, SECOND),
        Case(1, 1, 2, 2, FIRST),
        Case(2, 1, 1, 1, BF16),
        Case(2, 1, 1, 1, FUSED),
        Case(2, 1, 1, 1, COMPILED),
        Case(1, 2, 1, 1, FUSED),
        Case(1, 2, 1, 1, COMPILED),
        Case(1, 1, 2, 2, BOTH),
        Case(1, 1, 2, 3, BOTH),
        Case(2, 1, 1, 3, COMPILED),
        Case(2, 1, 1, 3),
        Case(2, 1, 1, 3, SECOND),
    ],
    4: [Case(2, 2, 1, 1), Case(2, 2, 1, 1, FIRST), Case(4, 1, 1, 2), Case(4, 1, 1, 1, SECOND), Case(2, 1, 2, 3)],
}


def _run(topology, world):
    return [run_case(topology, case, corpus, STEPS) for corpus, case in world]


def _broken(topology, names, corpus):
    """Reports by mutation; a break that stops the run is seen by its message."""
    out = {}
    for name in names:
        mutation, layout = MUTATIONS[name]
        out[name] = run_case(topology, Case(*layout), corpus, BROKEN_STEPS, mutation)
    return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def expected(corpus):
    return {steps: reference(Case(1, 1, 1, 0), corpus, steps) for steps in (BROKEN_STEPS, STEPS)}


@pytest.fixture(scope="module")
def expected_of(corpus, expected):
    one_layer = {factors: reference(Case(1, 1, 1, 0, factors), corpus, STEPS) for factors in (FIRST, SECOND)}
    return dict.fromkeys((tuple(ALL_ON.items()), FUSED, COMPILED, BOTH), expected[STEPS]) | one_layer


@pytest.fixture(scope="module")
def outcomes(corpus):
    found = {}
    for world, cases in CASES.items():
        reports = run_ranks(_run, world, [(corpus, case) for case in cases])
        found |= {case: [rank[number] for rank in reports] for number, case in enumerate(cases)}
    return found


@pytest.mark.parametrize("case", [c for cases in CASES.values() for c in cases if c.factors != BF16], ids=str)
def test_float32_layouts_compute_what_one_process_does(outcomes, expected_of, case):
    result = compare(outcomes[case], expected_of[case.factors])
    assert not result.violations
    assert set(result.worst) == {"gradient", "loss", "norm", "evaluation"}


def test_bf16_is_as_near_as_bf16_in_one_process(outcomes, expected):
    alone = outcomes[Case(1, 1, 1, 1, BF16)]
    result = compare_bf16(outcomes[Case(2, 1, 1, 1, BF16)], alone, expected[STEPS])
    assert not result.violations
    assert compare(alone, expected[STEPS]).worst["loss"] > 1e-4, "this is not bf16"


@pytest.fixture(scope="module")
def broken(corpus):
    reports = run_ranks(_broken, 2, list(MUTATIONS), corpus)
    return {name: [rank[name] for rank in reports] for name in MUTATIONS}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_layout_is_seen(broken, expected, name):
    kinds = {kind for kind, _ in compare(broken[name], expected[BROKEN_STEPS]).violations}
    wanted = {
        "tied copies not brought together": "replicas",
        "shards not marked for DeepSpeed's norm": "norm",
        "whole gradients counted twice in the norm": "norm",
        "tied table counted twice in the norm": "norm",
    }
    assert wanted.get(name, "initial" if "drawn" in name else "gradient") in kinds


def test_the_grid_has_every_layout():
    found = {(c.tensor, c.pipeline, c.data, c.zero) for c in layouts()}
    assert len(found) == 50
    assert {(t, p, d) for t, p, d, _ in found} == {
        (t, p, d) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) for d in (1, 2, 4, 8) if t * p * d in (1, 2, 4, 8)
    }
