"""What "auto" stands for: settled at the first start, kept by a resume on any device."""

import pytest
import yaml

from megameta.checkpoint import latest_checkpoint
from megameta.config import build_config, load_config, settle
from tests.support.commands import one_error, run_command
from tests.support.runs import last_step
from tests.support.training import tiny_values

AUTO, FP32, BF16, FP16 = (build_config({"train": {"precision": name}}) for name in ("auto", "fp32", "bf16", "fp16"))


@pytest.mark.parametrize(
    ("device", "capability", "saved", "expected"),
    [
        ("cpu", 8, None, "fp32"),
        ("cuda", 9, None, "bf16"),
        ("cuda", 8, None, "bf16"),
        ("cuda", 7, None, "fp32"),  # a V100 multiplies in fp16 alone
        ("cuda", 9, FP32, "fp32"),
        ("cpu", 8, BF16, "bf16"),
        ("cuda", 7, BF16, "bf16"),
        ("cuda", 9, FP16, "fp16"),
    ],
)
def test_precision(device, capability, saved, expected):
    found = settle(AUTO, device, capability=capability, saved=saved)
    assert found.train.precision == expected
    assert found.model_dump(exclude={"train": {"precision"}}) == AUTO.model_dump(exclude={"train": {"precision"}})
    assert settle(found, "cuda", capability=9, saved=FP16) is found, "what is given is not touched"


def test_auto_is_the_default():
    assert build_config({}).train.precision == "auto"


@pytest.mark.parametrize(("began", "shown"), [("auto", "fp32"), ("bf16", "bf16")])
def test_a_resumed_run_keeps_what_it_began_with(tmp_path, corpus, began, shown):
    values = tiny_values(corpus, train__precision=began, train__num_steps=8, checkpoint__interval=4)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    train = ("megameta", "train", "run.yaml", "run.dir=run")
    first = run_command(tmp_path, *train)
    assert first.returncode == 0, first.stderr
    assert f"ZeRO 0, {shown})" in first.stderr and f", measured with {shown} products" in first.stderr
    again = run_command(tmp_path, *train, "train.num_steps=12", "train.precision=auto")
    assert again.returncode == 0, again.stderr
    assert f"ZeRO 0, {shown})" in again.stderr
    for path in (tmp_path / "run" / "config.yaml", latest_checkpoint(tmp_path / "run") / "config.yaml"):
        assert load_config(path).train.precision == shown
    other = "fp32" if shown == "bf16" else "bf16"
    refused = run_command(tmp_path, *train, "train.num_steps=16", f"train.precision={other}")
    assert (refused.returncode, last_step(tmp_path / "run")) == (1, 12)
    assert f"train.precision: '{shown}' in the checkpoint, '{other}' now" in one_error(refused.stderr)
