"""An extended model under every kind of layout: training as in one process, and the loss by position in each bucket."""

from functools import partial

import pytest
import torch

from megameta.engine.build import build_model
from megameta.engine.loss_module import LossModule, make_scores, sum_scores
from megameta.engine.pipeline_engine import make_engine
from megameta.model.rope import rotary_frequencies
from megameta.parallel.topology import Topology
from megameta.train.evaluation import Evaluator
from tests.support.layouts import ALL_ON, Case, compare, make_config, make_corpus, reference, relative, run_case
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

STEPS, BUCKETS = 3, 5
#: YaRN with zeroed meta positions; documents do not restart positions, which so reach the end of the window.
YARN = {**ALL_ON, "position": "yarn", "documents": "mask"}
WHOLE = tuple(YARN.items())
PLAIN_TP = tuple({**YARN, "sequence": "off"}.items())
#: By number of processes; ZeRO 3 last, as it patches torch for the rest of the process.
CASES = {
    2: [
        Case(2, 1, 1, 1, WHOLE),  # with sequence parallelism
        Case(2, 1, 1, 0, PLAIN_TP),
        Case(1, 2, 1, 1, WHOLE),
        Case(1, 1, 2, 3, WHOLE),
    ],
    4: [Case(2, 2, 1, 1, WHOLE)],
}


def _run(topology, cases, corpus):
    return [(run_case(topology, case, corpus, STEPS), _by_position(topology, case, corpus)) for case in cases]


def _by_position(topology, case, corpus):
    """Losses and targets by bucket of the initial weights, and their totals."""
    topology = Topology(
        topology.world_size,
        topology.rank,
        topology.rank,
        tensor_parallel_size=case.tensor,
        pipeline_parallel_size=case.pipeline,
    )
    config = make_config(case, corpus)
    engine, evaluator = make_engine(config, topology), Evaluator(config, topology, BUCKETS)
    found = {name: engine.evaluate(evaluator.batches(name), None, BUCKETS) for name in evaluator.sets}
    engine.destroy()
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("extension"))


@pytest.fixture(scope="module")
def expected(corpus):
    """The reference of the training, and scores by set in one process in float64."""
    case = Case(1, 1, 1, 0, WHOLE)
    config = make_config(case, corpus)
    assert config.model.zero_meta_positions and config.data.num_meta_tokens
    assert not torch.equal(
        rotary_frequencies(config.model), rotary_frequencies(make_config(Case(1, 1, 1, 0), corpus).model)
    )
    module, evaluator = LossModule(build_model(config).double()).eval(), Evaluator(config, Topology(), BUCKETS)
    scores = {}
    with torch.no_grad():
        for name in evaluator.sets:
            score = partial(module, score=True, num_groups=BUCKETS)
            total, counts = sum_scores(score, evaluator.batches(name), None, "cpu", BUCKETS)
            scores[name] = make_scores(total.tolist(), counts)
    return reference(case, corpus, STEPS), scores


@pytest.fixture(scope="module")
def outcomes(corpus):
    found = {}
    for world, cases in CASES.items():
        reports = run_ranks(_run, world, cases, corpus)
        found |= {case: [rank[number] for rank in reports] for number, case in enumerate(cases)}
    return found


@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases], ids=str)
def test_an_extended_model_trains_as_in_one_process(outcomes, expected, case):
    result = compare([training for training, _ in outcomes[case]], expected[0])
    assert not result.violations
    assert set(result.worst) == {"gradient", "loss", "norm", "evaluation"}


@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases], ids=str)
def test_loss_by_position_is_that_of_one_process(outcomes, expected, case):
    for _, scores in outcomes[case]:
        assert scores.keys() == expected[1].keys() == {"held", "held/no-meta"}
        for name, wanted in expected[1].items():
            found = scores[name]
            assert found.targets == wanted.targets == sum(targets for _, targets in found.by_group)
            assert relative(sum(loss for loss, _ in found.by_group), found.loss_sum) < 1e-6
            assert len(found.by_group) == BUCKETS
            for (loss, targets), (wanted_loss, wanted_targets) in zip(found.by_group, wanted.by_group, strict=True):
                assert targets == wanted_targets > 0
                assert relative(loss, wanted_loss) < 1e-5
