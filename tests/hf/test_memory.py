"""An export needs the memory of a layer, not of the model; and is the same whether it came from memory or from disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megameta.checkpoint import load_weights, save_weights
from megameta.errors import UserError
from megameta.hf.export import export_to_hf
from megameta.hf.shards import INDEX_FILE, open_shards
from megameta.hf.stream import LayerWeights, layers_of
from megameta.model import GPT
from tests.support.exports import BASELINE, tensors_of
from tests.support.models import small_config, small_model
from tests.support.paths import ROOT

MB = 10**6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read as Linux keeps them")
@pytest.mark.parametrize(("kind", "dtype"), [("megameta", "float32"), ("gpt2", "bfloat16")])
def test_peak_of_an_export(kind: str, dtype: str, tmp_path: Path) -> None:
    """Of some 200 and 150 MB of float32 weights into shards of 40 MB: a layer is 17 and 13 MB.

    One process with one thread, in which each allocation follows from the one before: nothing here hangs on how fast
    the machine is. What is freed goes back to the system at once: how much glibc keeps of it differs by 20 MB from run
    to run.
    """
    script = Path(__file__).with_name("export_memory.py")
    process = subprocess.run(
        [sys.executable, str(script), str(tmp_path), kind, dtype],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "MALLOC_MMAP_THRESHOLD_": "262144",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    found = json.loads(process.stdout.splitlines()[-1])
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) >= 2 and all(shard.stat().st_size < 41 * MB for shard in shards)
    assert found["total"] > 140 * MB
    assert found["rise"] < 40 * MB + 2 * found["layer"] < found["total"] / 2, found


@pytest.mark.parametrize("baseline", [{}, BASELINE], ids=["megameta", "gpt2"])
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_lazy_and_loaded_tensors_make_the_same_files(baseline: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    config = small_config(attention_backend="auto", bias=True, **baseline)
    tensors = tensors_of(small_model(config, torch.float32, vocab_multiple=1))
    save_weights(tmp_path / "checkpoint", config, tensors, None)
    export_to_hf(config, tensors, tmp_path / "a", dtype=dtype, max_shard_size="30KB")
    export_to_hf(config, load_weights(tmp_path / "checkpoint")[1], tmp_path / "b", dtype=dtype, max_shard_size="30KB")
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert contents[0] == contents[1] and len(contents[0]) > 5


@pytest.mark.parametrize("baseline", [{}, BASELINE], ids=["megameta", "gpt2"])
def test_files_are_those_of_save_pretrained(baseline: dict, tmp_path: Path) -> None:
    """config.json, generation_config.json and the index, against transformers' own writing of the same model."""
    from transformers import AutoModelForCausalLM

    config = small_config(attention_backend="auto", **baseline)
    tensors = tensors_of(small_model(config, torch.float32, vocab_multiple=1))
    export_to_hf(config, tensors, tmp_path / "ours", max_shard_size="30KB", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "ours" / name).read_text()) == json.loads(
            (tmp_path / "theirs" / name).read_text()
        )
    ours, theirs = (json.loads((tmp_path / place / INDEX_FILE).read_text()) for place in ("ours", "theirs"))
    assert ours["metadata"] == theirs["metadata"] and ours["weight_map"].keys() == theirs["weight_map"].keys()
    stored = open_shards(tmp_path / "ours")
    for file in set(theirs["weight_map"].values()):
        for name, tensor in load_file(tmp_path / "theirs" / file).items():
            assert torch.equal(stored[name], tensor)


def test_an_index_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = small_config()
    tensors = tensors_of(small_model(config, torch.float32, vocab_multiple=1))
    export_to_hf(config, tensors, tmp_path / "x", max_shard_size="30KB")
    path = tmp_path / "x" / INDEX_FILE
    index = json.loads(path.read_text())
    name, file = next(iter(index["weight_map"].items()))
    other = next(where for where in index["weight_map"].values() if where != file)
    for change in ({name: other}, {"unheard.of": file}):
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **change}}))
        with pytest.raises(UserError, match="does not say what model-"):
            open_shards(tmp_path / "x")
    path.write_text("{")
    with pytest.raises(UserError, match="not readable"):
        open_shards(tmp_path / "x")


def test_no_two_layers_are_filled_at_once() -> None:
    config = small_config(tie_embeddings=False)
    whole = small_model(config, torch.float32, vocab_multiple=1).eval()
    tensors = tensors_of(whole)
    with torch.device("meta"):
        model = GPT(config, vocab_multiple=1).eval()
    assert [path for path, _ in layers_of(model)] == ["embedding", "blocks.0", "blocks.1", "head"]
    most = [0]

    def count(*_: object) -> None:
        layers = [layer for _, layer in layers_of(model)]
        filled = [layer for layer in layers if not next(layer.parameters()).is_meta]
        most[0] = max(most[0], len(filled))

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    ids = torch.arange(10)[None]
    # GPT hands the embedding's weight to its head, which does not use it here.
    with torch.no_grad(), LayerWeights(tensors.__getitem__).streamed(model):
        assert torch.equal(model(ids), whole(ids))
    assert most == [1] and all(parameter.is_meta for parameter in model.parameters())


def test_every_parameter_must_be_in_a_layer() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(1, 1)])

    weights = LayerWeights(lambda name: torch.ones(1))
    with pytest.raises(ValueError, match="scale: in no layer of Odd"), weights.streamed(Odd()):
        pass
