"""What a CUDA device computes: every precision and ZeRO stage against float32 on a CPU, and a resume to the bit.

The engines of all cases run in one process of their own (``tests/support/gpu_cases.py``), which also keeps this one's
DeepSpeed on the CPU. A part of the cases runs on the CPU, too: it proves the kept losses and the program.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import gpu_cases
from tests.support.commands import true_process

#: A limit against hanging.
SECONDS = 600
ON_A_CPU = ("fp32, ZeRO 0", "fp32, documents", "fp32, deterministic resume")


def run(file: Path, *words: str) -> dict[str, Any]:
    done = true_process(sys.executable, "-m", "tests.support.gpu_cases", file, *words, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def check(name: str, found: dict[str, Any], tolerance: float) -> None:
    assert "error" not in found, found["error"]
    if name == "auto":
        assert found["precision"] == "bf16"
        return
    if "resume" in name:
        assert found["deterministic"]
        assert found["again"] == found["whole"], "the same run again is another one"
        assert found["resumed"] == found["whole"]
        return
    kept = json.loads(gpu_cases.LOSSES.read_text())["documents" if "documents" in name else "plain"]
    assert found["losses"] == pytest.approx(kept, rel=tolerance)


def test_kept_losses_are_those_of_this_cpu(tmp_path: Path) -> None:
    found = run(tmp_path / "found.json", *ON_A_CPU, "--device", "cpu")
    assert list(found) == list(ON_A_CPU)
    for name in ON_A_CPU:
        check(name, found[name], 1e-5)
    losses = found["fp32, ZeRO 0"]["losses"]
    assert losses[-1] < 0.9 * losses[0], "there is nothing to learn: any optimiser would do"
    assert losses != pytest.approx(found["fp32, documents"]["losses"], rel=5e-3), "documents make no difference"


@pytest.fixture(scope="module")
def on_the_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch sees none here")
    return run(tmp_path_factory.mktemp("gpu") / "found.json")


@pytest.mark.gpu
@pytest.mark.parametrize("name", gpu_cases.CASES)
def test_on_the_gpu(name: str, on_the_gpu: dict[str, Any]) -> None:
    check(name, on_the_gpu[name], gpu_cases.TOLERANCE.get(name[:4], 0.0))
