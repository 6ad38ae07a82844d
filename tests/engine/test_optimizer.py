"""Which parameters decay, and which apex is accepted."""

import sys
import textwrap

import pytest
import torch

from megameta.config import OptimizerSection
from megameta.engine.optimizer import make_optimizer, parameter_groups
from megameta.errors import UserError
from megameta.model import GPT, ModelConfig

SHAPE = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 8}


@pytest.mark.parametrize("changes", [{}, {"bias": True, "qk_norm": True, "norm": "rmsnorm", "position": "ape"}])
def test_decay_on_matrices_alone(changes):
    model = GPT(ModelConfig(**SHAPE, **changes))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1))
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert all("norm" in name or name.endswith("bias") for name in spared)
    assert all(name.endswith(("proj.weight", "tokens.weight", "positions.weight")) for name in decayed)
    assert {"embedding.tokens.weight", "blocks.1.meta_attention.o_proj.weight"} <= decayed
    assert {"head.norm.weight", "blocks.0.norm_meta.weight"} <= spared
    assert [group["weight_decay"] for group in parameter_groups(model, 0.1)] == [0.1, 0.0]


def test_frozen_parameters_are_left_out():
    model = GPT(ModelConfig(**SHAPE))
    for p in model.parameters():
        p.requires_grad_(p.dim() == 1)
    (group,) = parameter_groups(model, 0.1)
    assert group["weight_decay"] == 0.0 and all(p.dim() == 1 for p in group["params"])


def test_torch_adamw_has_the_configured_numbers():
    model = GPT(ModelConfig(**SHAPE))
    section = OptimizerSection(lr=0.5, betas=(0.8, 0.7), eps=1e-3, weight_decay=0.25)
    optimizer = make_optimizer(model, section)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, decay in zip(optimizer.param_groups, (0.25, 0.0)):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.7), 1e-3, decay)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package named apex first on the path; None hides any."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)

    def put(files):
        if files is None:
            monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
            return
        for path, text in files.items():
            (tmp_path / "apex" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "apex" / path).write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(str(tmp_path))

    yield put
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


NVIDIA = """
    class FusedAdam:
        def __init__(self, params, lr, betas, eps, adam_w_mode):
            self.param_groups, self.settings = list(params), (lr, betas, eps, adam_w_mode)
"""


def test_nvidia_apex(install):
    install({"__init__.py": "", "optimizers/__init__.py": NVIDIA})
    optimizer = make_optimizer(GPT(ModelConfig(**SHAPE)), OptimizerSection(implementation="apex", lr=0.5))
    assert type(optimizer).__name__ == "FusedAdam"
    assert optimizer.settings == (0.5, (0.9, 0.95), 1e-8, True), "adam_w_mode, or the decay would be another"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    "files",
    [
        {"__init__.py": ""},
        {"__init__.py": "from pyramid.session import UnencryptedCookieSessionFactoryConfig"},
        {"__init__.py": "print 'python 2'"},
        {"__init__.py": "", "optimizers/__init__.py": ""},
    ],
    ids=["no optimizers", "its imports fail", "no python 3", "no FusedAdam"],
)
def test_the_namesake_on_pypi(install, files):
    install(files)
    with pytest.raises(UserError, match=r"not NVIDIA's.*pip uninstall apex, then build it from .*implementation=torch"):
        make_optimizer(GPT(ModelConfig(**SHAPE)), OptimizerSection(implementation="apex"))


def test_no_apex_at_all(install):
    install(None)
    with pytest.raises(UserError, match=r"NVIDIA apex is not installed: build it from .*implementation=torch"):
        make_optimizer(GPT(ModelConfig(**SHAPE)), OptimizerSection(implementation="apex"))
