"""The device of a run decides, whatever the environment says; and what is missing for it is said."""

import importlib.util
import sys

import pytest
import yaml

from megameta.engine.build import build_model
from megameta.engine.engine import deepspeed_environment, import_deepspeed
from megameta.errors import UserError
from megameta.model.shapes import parameter_shapes
from megameta.parallel.pipeline import stage_bounds
from megameta.parallel.topology import Topology
from megameta.plan.describe import describe
from tests.support.commands import plain_environment, true_process
from tests.support.ranks import run_ranks
from tests.support.runs import last_step
from tests.support.training import tiny_config, tiny_values


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", {"DS_ACCELERATOR": "cpu"}),
        ("cuda:3", {"DS_ACCELERATOR": "cuda", "LOCAL_RANK": "3"}),
        ("cuda:0", {"DS_ACCELERATOR": "cuda", "LOCAL_RANK": "0"}),  # one visible GPU a task
    ],
)
def test_what_deepspeed_is_told(device, expected):
    assert deepspeed_environment(Topology(world_size=4, rank=3, local_rank=3, device=device)) == expected


def test_a_run_on_the_cpu_where_the_environment_says_cuda(tmp_path, corpus):
    values = tiny_values(corpus, train__num_steps=4, parallel__zero_stage=3)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    words = ["-m", "megameta", "train", "run.yaml", "run.dir=run"]
    environment = plain_environment(DS_ACCELERATOR="cuda")
    done = true_process(sys.executable, *words, folder=tmp_path, environment=environment)
    assert (done.returncode, last_step(tmp_path / "run")) == (0, 4), done.stderr


def _another_device(topology):
    import_deepspeed(topology)
    words = r"run\.device is cuda, but this process has imported DeepSpeed for cpu"
    with pytest.raises(UserError, match=words) as caught:
        import_deepspeed(Topology(device="cuda:0"))
    return str(caught.value)


def test_one_kind_of_device_a_process():
    assert "in a process of its own" in run_ranks(_another_device, 1)[0]


def test_a_kernel_that_is_missing_is_one_message(corpus):
    """Only where it would run: shapes, costs of stages and the check of a configuration need none."""
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed here")
    config = tiny_config(corpus, model__attention_backend="flash")
    with pytest.raises(UserError, match="no flash-attn for this machine's GPU is installed: pip install"):
        build_model(config)
    assert parameter_shapes(config.model)
    assert stage_bounds(config.model, 2)
    assert describe(config, 1)
