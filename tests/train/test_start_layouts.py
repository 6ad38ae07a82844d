"""init.from_hf in every kind of layout: step 0 has the loss of the transformers model that it starts from."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from megameta.engine.build import initial_weights
from megameta.engine.pipeline_engine import make_engine
from megameta.parallel.topology import Topology
from megameta.train.run_config import load_run_config
from tests.support.ranks import run_ranks
from tests.support.training import META, step_loader, training_set, write_corpus

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2, "sequence_parallel": True, "zero_stage": 2},
    "pipeline": {"pipeline_parallel_size": 2, "zero_stage": 1},
    "data, ZeRO 3": {"zero_stage": 3},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small Pythia and a small GPT-2 with every weight at random, a corpus, and a configuration of each."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    folder = tmp_path_factory.mktemp("starts")
    write_corpus(folder / "text")
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 32}
    models = {
        "neox": GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=META, intermediate_size=48, rotary_pct=0.5, **shape)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=META, n_inner=48, bos_token_id=None, eos_token_id=None, **shape)),
    }
    for kind, model in models.items():
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise if parameter.ndim == 2 else parameter + noise)
        model.save_pretrained(folder / kind)
        values = {
            "run": {"seed": 7, "device": "cpu", "dir": str(folder / "run")},
            "init": {"from_hf": str(folder / kind)},
            "data": {"train": str(folder / "text"), "sequence_length": 32, "meta_token_fraction": 0.125},
            "train": {"num_steps": 12, "micro_batch_size": 2, "global_batch_size": 8},
            "optimizer": {"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 3},
        }
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(values))
    return folder


def _config(folder, kind, layout):
    return load_run_config(
        folder / f"{kind}.yaml", [f"parallel.{key}={value}".lower() for key, value in layout.items()]
    )


def _first_losses(topology, folder):
    found = {}
    for name, layout in LAYOUTS.items():
        for kind in ("neox", "gpt2"):
            config = _config(folder, kind, layout)
            sizes = {key: value for key, value in layout.items() if key.endswith("parallel_size")}
            here = Topology(topology.world_size, topology.rank, topology.rank, "cpu", **sizes)
            engine = make_engine(config, here, initial_weights(config, here))
            loader = step_loader(config, here)
            found[name, kind] = [engine.train_step(loader.read(i, i + 1), 2e-3).loss for i in range(3)]
            loader.close()
            engine.destroy()
    return found


def source_loss(folder, kind) -> float:
    """Of the first global batch, by transformers in float64, the meta-token's row being the mean of the others."""
    from transformers import AutoModelForCausalLM

    config = _config(folder, kind, {})
    model = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float64).eval()
    model.resize_token_embeddings(META + 1, mean_resizing=False)
    total, count = 0.0, 0
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table[META] = table[:META].mean(dim=0)
        for sample in (training_set(config)[i] for i in range(8)):
            label_T = torch.from_numpy(sample.label_T)
            assert (sample.token_T == META).sum() == 4
            logits = model(torch.from_numpy(sample.token_T)[None]).logits[0]
            total += float(F.cross_entropy(logits, label_T, ignore_index=-100, reduction="sum"))
            count += int((label_T != -100).sum())
    return total / count


def test_step_0_in_every_layout(place):
    expected = {kind: source_loss(place, kind) for kind in ("neox", "gpt2")}
    for ranks in run_ranks(_first_losses, 2, place):
        for (name, kind), losses in ranks.items():
            assert losses[0] == pytest.approx(expected[kind], rel=2e-6), (name, kind)
            assert losses[2] < losses[0]
    tensor, data = (ranks[name, "neox"] for name in ("tensor", "data, ZeRO 3"))
    assert tensor == pytest.approx(data, rel=1e-5)  # the fresh branch is the same in all of them
