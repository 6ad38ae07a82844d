"""Frequencies of scaled rotary positions against published values and transformers' own."""

import json
import math

import pytest
import torch

from megameta.errors import UserError
from megameta.model import ModelConfig
from megameta.model.rope import attention_scale, rotary_frequencies, rotation_at
from megameta.train.run_config import load_run_config
from tests.support.models import small_config, small_model
from tests.support.paths import GOLDEN

CASES = json.loads((GOLDEN / "yarn.json").read_text())


def scaled(size: int, window: int, factor: float, kind: str = "yarn", **changes) -> ModelConfig:
    return ModelConfig(
        hidden_size=2 * size,
        num_heads=2,
        max_position_embeddings=int(window * factor),
        original_max_position_embeddings=window,
        position_scaling=kind,
        position_scaling_factor=factor,
        **changes,
    )


@pytest.mark.parametrize(
    ("name", "tolerance"), [("snapshot_transformers", 5.1e-5), ("paper_4x", 1e-6), ("paper_8x", 1e-6)]
)
def test_golden_frequencies(name, tolerance):
    """The snapshot has five digits."""
    case = CASES[name]
    config = scaled(case["dim"], case["original_max"], float(case["factor"]))
    found = rotary_frequencies(config)
    assert found.dtype == torch.float32 and len(found) == case["dim"] // 2
    torch.testing.assert_close(found.double(), torch.tensor(case["inv_freq"]).double(), rtol=tolerance, atol=0)
    if "mscale" in case:
        assert attention_scale(config) == pytest.approx(case["mscale"], abs=1e-12)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
@pytest.mark.parametrize(
    ("size", "window", "factor"), [(64, 1024, 4.0), (64, 1024, 8.0), (32, 512, 2.0), (128, 4096, 16.0)]
)
def test_transformers_says_the_same(kind, size, window, factor):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": kind,
        "factor": factor,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": window,
    }
    theirs = LlamaConfig(
        hidden_size=2 * size,
        num_attention_heads=2,
        head_dim=size,
        max_position_embeddings=int(window * factor),
        rope_parameters=parameters,
    )
    frequency, scale = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    config = scaled(size, window, factor, kind)
    torch.testing.assert_close(rotary_frequencies(config), frequency, rtol=1e-6, atol=0)
    assert attention_scale(config) == pytest.approx(scale)


def test_ends_of_the_spectrum():
    """ntk and yarn leave the fastest pair alone and interpolate the slowest in full."""
    plain = rotary_frequencies(scaled(64, 1024, 1.0, "none"))
    for kind in ("ntk", "yarn"):
        ratio = plain / rotary_frequencies(scaled(64, 1024, 4.0, kind))
        assert float(ratio[0]) == 1.0 and float(ratio[-1]) == pytest.approx(4.0, rel=1e-5)
        assert (ratio[1:] >= ratio[:-1] - 1e-5).all()


def test_a_zeroed_meta_position_has_cos_m_and_sin_0():
    config = scaled(64, 1024, 4.0)
    rotation = rotation_at(torch.tensor([[0, 5]]), config)
    m = 0.1 * math.log(4) + 1
    torch.testing.assert_close(rotation.cos_BTK[0, 0], torch.full((64,), m))
    assert not rotation.sin_BTK[0, 0].any()


def test_a_factor_next_to_one_is_next_to_no_scaling():
    token = torch.randint(37, (2, 20), generator=torch.Generator().manual_seed(0))
    plain = small_model(small_config())(token)
    for kind in ("linear", "ntk", "yarn"):
        config = small_config(
            position_scaling=kind, position_scaling_factor=1.0 + 1e-12, original_max_position_embeddings=64
        )
        torch.testing.assert_close(small_model(config)(token), plain, rtol=1e-9, atol=1e-9)


YARN = {"position_scaling": "yarn", "position_scaling_factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**YARN, "position": "ape"}, "learned positions end"),
        ({**YARN, "position": "none"}, "position is none"),
        ({"position_scaling_factor": 4.0}, "no effect without position_scaling: say how"),
        ({**YARN, "position_scaling_factor": 0.5}, "factor above 1"),
        ({**YARN, "position_scaling_factor": 1.0}, "factor above 1"),
        ({**YARN, "position_scaling_factor": math.inf}, "factor above 1"),
        ({**YARN, "position_scaling_factor": math.nan}, "factor above 1"),
        ({**YARN, "original_max_position_embeddings": 0}, "needs original_max_position_embeddings: the window before"),
        ({**YARN, "original_max_position_embeddings": -1}, "needs original_max_position_embeddings: the window before"),
        ({**YARN, "position_scaling": "ntk", "rotary_fraction": 1 / 32}, "needs 4 rotated channels"),
        ({**YARN, "position_scaling": "linear", "yarn_beta_fast": 16.0}, "no effect with position_scaling linear"),
        ({"yarn_attention_factor": 2.0}, "no effect with position_scaling none"),
        ({**YARN, "yarn_beta_fast": 1.0}, "must be below yarn_beta_fast 1.0"),
        ({**YARN, "yarn_attention_factor": 0.0}, "above 0"),
    ],
)
def test_contradictions(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


def test_a_window_that_is_left_out_does_not_become_the_long_one(tmp_path):
    """The sequence length, from which a run takes its window, is the extended one."""
    path = tmp_path / "long.yaml"
    path.write_text("model: {position_scaling: yarn, position_scaling_factor: 4}\ndata: {sequence_length: 4096}\n")
    with pytest.raises(UserError, match=r"model.*original_max_position_embeddings: the window before the extension"):
        load_run_config(path)
    found = load_run_config(path, ["model.original_max_position_embeddings=1024"]).model
    assert (found.original_max_position_embeddings, found.max_position_embeddings) == (1024, 4096)
