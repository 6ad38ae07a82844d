"""Compiled blocks: the machine's own code against the oracle, the same bits again, names and evaluation untouched.

That each layout trains the same compiled is tested in tests/scenarios/test_parity.py.
"""

import shutil
import sysconfig

import pytest
import torch

from megameta.config.validate import problems
from megameta.engine import compile as compiling
from megameta.engine.pipeline_engine import make_engine
from megameta.errors import UserError
from megameta.model import GPT
from megameta.parallel.losses import loss_and_gradient
from megameta.train.evaluation import Evaluator
from tests.support.needs import needs_cxx
from tests.support.ranks import run_ranks
from tests.support.training import oracle_run, step_loader, take_steps, tiny_config, weights_digest

STEPS = 4


def _run(topology, corpus):
    """Four steps as written, and twice compiled; each with its own evaluation before the first step."""
    reports = []
    for choice in ("none", "blocks", "blocks"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = tiny_config(corpus, train__compile=choice, data__valid={"held": [corpus]}, eval__num_samples=3)
        engine, loader = make_engine(config, topology), step_loader(config, topology)
        evaluated = Evaluator(config, topology).run(engine)["held"].loss
        before = dict(torch._dynamo.utils.counters["stats"])
        results = take_steps(engine, loader, config, 1, STEPS)
        reports.append(
            {
                "losses": [r.loss for r in results],
                "norms": [r.grad_norm for r in results],
                "digest": weights_digest(engine),
                "names": list(engine.model.state_dict()),
                "evaluated": evaluated,
                "compiled to evaluate": before,
                "graphs": torch._dynamo.utils.counters["stats"].get("unique_graphs", 0),
                "breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
            }
        )
        loader.close()
        engine.destroy()
    return reports


@needs_cxx
@pytest.mark.slow
def test_compiled_by_the_machine_s_compiler(corpus):
    written, compiled, again = run_ranks(_run, 1, corpus)[0]
    oracle = oracle_run(tiny_config(corpus), STEPS)
    assert compiled["losses"] == pytest.approx(oracle["losses"], rel=1e-5)
    assert compiled["norms"] == pytest.approx(oracle["norms"], rel=1e-4)
    assert compiled["digest"] != written["digest"], "nothing was compiled"
    assert compiled == again, "a run that goes on compiles anew, and must get the same bits"
    assert compiled["names"] == written["names"]
    assert compiled["evaluated"] == written["evaluated"] and not compiled["compiled to evaluate"]
    assert compiled["graphs"] == 1 and compiled["breaks"] == 0, "one graph serves all blocks"
    assert written["graphs"] == 0


def _loss(topology):
    """(loss, gradient) of chunks of two sizes, compiled and as written; the larger one again, compiled in between."""
    torch._dynamo.utils.counters.clear()
    compiled, draw = compiling.compile_loss(), torch.Generator().manual_seed(0)
    found = []
    for rows in (64, 40, 64):
        logits, label = torch.randn(64, 128, generator=draw), torch.randint(0, 100, (64,), generator=draw)
        label[::7] = -100
        logits[:, 100:] = 0
        draw.manual_seed(0)
        for function in (compiled, loss_and_gradient):
            found.append([x.tolist() for x in function(logits[:rows].clone(), label[:rows].clone(), 100)])
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@needs_cxx
@pytest.mark.slow
def test_the_loss_is_compiled_once_for_all_sizes():
    found, graphs = run_ranks(_loss, 1)[0]
    for (loss, gradient), (wanted, wanted_gradient) in zip(found[::2], found[1::2], strict=True):
        assert loss == pytest.approx(wanted, rel=1e-6)
        torch.testing.assert_close(torch.tensor(gradient), torch.tensor(wanted_gradient), rtol=1e-5, atol=1e-7)
    assert found[0] == found[4], "the code does not depend on which size came first"
    assert graphs == 1


def test_without_a_compiler_there_is_one_message(monkeypatch, corpus):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no no-such-compiler: apt install g\+\+ python3-dev.*set train.compile=none"):
        compiling.compile_blocks(GPT(tiny_config(corpus).model), "cpu")


def test_without_headers_there_is_one_message(monkeypatch, corpus, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"Python's headers.*apt install python3-dev; or set train.compile=none"):
        compiling.compile_blocks(GPT(tiny_config(corpus).model), "cpu")


def test_tasks_are_not_compiled(corpus):
    config = tiny_config(corpus, train__compile="blocks", finetune__directory="tasks")
    assert any("train.compile" in problem for problem in problems(config, world_size=1, device="cpu"))
