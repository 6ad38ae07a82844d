"""Twenty losses that a refactoring may not move: data order, injection, initial weights, model, loss, AdamW, schedule.

A plain float64 loop in one process, without DeepSpeed. If they move on purpose, say so in CHANGELOG.md and write the
file again: ``python tests/train/test_golden.py``.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megameta.config import OptimizerSection
from megameta.corpus.indexed_writer import IndexedDatasetWriter
from megameta.data.counter_random import make_key, stream
from megameta.data.dataset import Dataset, SampleFormat
from megameta.data.loader import StepLoader
from megameta.data.samples import Corpus, SampleIndex
from megameta.engine.optimizer import parameter_groups
from megameta.model import GPT, ModelConfig, cross_entropy_sum, initialize_weights
from megameta.train.schedule import learning_rate
from tests.support.paths import GOLDEN

LOSSES = GOLDEN / "losses.json"
SHAPE = {"vocab_size": 101, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
CASES = {
    "meta-rope": ({"position": "rope"}, {}),
    "meta-ape-documents": ({"position": "ape"}, {"document_mask": True, "reset_positions": True}),
    "gpt2-ape": ({"position": "ape", "meta_attention": False}, {"num_meta_tokens": 0, "text_per_sample": 58}),
    "modern": (
        {
            "position": "rnope",
            "norm": "rmsnorm",
            "activation": "swiglu",
            "num_key_value_heads": 2,
            "qk_norm": True,
            "tie_embeddings": False,
        },
        {},
    ),
}


def write_corpus(folder: Path) -> str:
    """Documents with a pattern to learn, from our own counter-based stream."""
    prefix = str(folder / "golden")
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in range(60):
            noise = stream(make_key("golden", document), 20 + 7 * (document % 9))
            steps = np.arange(len(noise)) * (1 + document % 3)
            writer.add_document(((steps + (noise % 3).astype(np.int64)) % 99).astype(np.int64))
    return prefix


def golden_losses(folder: Path, case: str) -> list[float]:
    model_options, format_options = CASES[case]
    config = ModelConfig(**SHAPE, **model_options)
    form = SampleFormat(text_per_sample=58, num_meta_tokens=6, meta_token_id=config.meta_token_id, seed=7)
    form = replace(form, **format_options)
    dataset = Dataset(SampleIndex(Corpus([write_corpus(folder)]), form.text_per_sample, seed=7), form)
    loader = StepLoader(dataset, micro_batch_size=2, global_batch_size=4)
    model = GPT(config).double()
    initialize_weights(model, config, seed=7)
    section = OptimizerSection(lr=3e-3, min_lr=3e-4, warmup_steps=3)
    optimizer = torch.optim.AdamW(parameter_groups(model, section.weight_decay), betas=section.betas, eps=section.eps)
    losses = []
    for step in range(1, 21):
        batches = loader.read(step - 1)
        targets = sum(batch.num_targets for batch in batches)
        total = 0.0
        for batch in batches:
            logits = model(batch.token_BT, position_BT=batch.position_BT, document_BT=batch.document_BT)
            loss = cross_entropy_sum(logits, batch.label_BT) / targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 20, section)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    loader.close()
    return losses


@pytest.mark.parametrize("case", CASES)
def test_losses_have_not_moved(case: str, tmp_path: Path) -> None:
    expected = json.loads(LOSSES.read_text())[case]
    assert golden_losses(tmp_path, case) == pytest.approx(expected, rel=1e-9)
    assert expected[-1] < expected[0] - 0.4, "the golden run learns something"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        values = {name: golden_losses(Path(scratch), name) for name in CASES}
    LOSSES.write_text(json.dumps(values, indent=1) + "\n")
