"""What only a CUDA device can show: mixed precision against float32 on the CPU, fp16's loss scaling."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megameta.config import load_config
from megameta.data.indexed import IndexedDatasetWriter
from megameta.train.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]

CONFIG = """
model: {vocab_size: 512, hidden_size: 128, num_layers: 2, num_heads: 2}
data: {sequence_length: 128}
train: {num_steps: 20, micro_batch_size: 4, global_batch_size: 16}
optimizer: {lr: 1e-3, warmup_steps: 5}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "config.yaml").write_text(CONFIG)
    draws = np.random.default_rng(0)
    with IndexedDatasetWriter(str(folder / "train"), np.dtype(np.uint16)) as writer:
        for _ in range(200):
            writer.add_document(draws.integers(0, 64, 500))
    return folder


def losses(folder: Path, name: str, *overrides: str) -> list[float]:
    command = [sys.executable, "-m", "megameta", "train", str(folder / "config.yaml"), f"run.dir={folder / name}"]
    command += [f"data.train=[{folder / 'train'}]", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return [record["loss"] for record in read_metrics(folder / name / "metrics.jsonl")]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_on_the_gpu_follow_float32_on_the_cpu(folder: Path, precision: str, zero: int) -> None:
    cpu = folder / "cpu"
    expected = (
        [record["loss"] for record in read_metrics(cpu / "metrics.jsonl")]
        if (cpu / "metrics.jsonl").exists()
        else losses(folder, "cpu", "run.device=cpu", "train.precision=fp32")
    )
    found = losses(folder, f"{precision}-{zero}", f"train.precision={precision}", f"parallel.zero_stage={zero}")
    tolerance = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}[precision]
    assert len(found) == len(expected)
    assert max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) < tolerance


def test_auto_is_bf16_and_stays_so_on_a_cpu(folder: Path) -> None:
    for words in (["train.num_steps=10"], ["run.device=cpu"]):
        losses(folder, "auto", *words)
        assert load_config(folder / "auto" / "config.yaml").train.precision == "bf16"
