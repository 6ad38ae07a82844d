"""tools/convert_checkpoint.py, there and back."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megameta.checkpoint import load_weights, save_weights
from megameta.errors import UserError
from megameta.hf.convert import checkpoint_to_hf, hf_to_checkpoint
from tests.support.exports import BASELINE, small_tokenizer, tensors_of, tokenizer_config
from tests.support.models import small_model
from tests.support.paths import ROOT

TOOL = ROOT / "tools" / "convert_checkpoint.py"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    config = tokenizer_config(tokenizer)
    model = small_model(config, torch.float32, vocab_multiple=1)
    save_weights(tmp_path / "checkpoint", config, tensors_of(model), str(tmp_path / "tokenizer"))
    return tmp_path / "checkpoint"


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    return stop.value.code


def test_there_and_back_is_bitwise(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    root = checkpoint.parent
    monkeypatch.chdir(root)
    assert run_tool(monkeypatch, "to-hf", checkpoint, "--output", "hf dir") == 0
    command = capsys.readouterr().out.strip().splitlines()[-1].strip()
    assert run_tool(monkeypatch, "from-hf", "hf dir", "--output", "back") == 0
    assert "init.from_checkpoint=back" in capsys.readouterr().out
    (config, tensors), (config_back, tensors_back) = load_weights(checkpoint), load_weights("back")
    assert config_back.model == type(config.model)(**{**config.model.to_dict(), "attention_backend": "auto"})
    assert tensors.keys() == tensors_back.keys()
    assert all(torch.equal(tensors[name], tensors_back[name]) for name in tensors)

    assert run_tool(monkeypatch, "to-hf", checkpoint, "--output", "hf dir") == 1
    assert "hf dir exists already" in capsys.readouterr().err
    again = ("to-hf", checkpoint, "--output", "hf dir", "--overwrite", "--dtype", "float16")
    assert run_tool(monkeypatch, *again) == 0
    assert {t.dtype for t in load_file("hf dir/model.safetensors").values()} == {torch.float16}
    assert run_tool(monkeypatch, *again, "--max-shard-size", "20KB") == 0
    shards = list(Path("hf dir").glob("model-*-of-*.safetensors"))
    assert len(shards) > 1 and not Path("hf dir/model.safetensors").exists()
    assert run_tool(monkeypatch, *again, "--max-shard-size", "small") == 1
    assert "write it like 500MB or 5GB" in capsys.readouterr().err
    assert run_tool(monkeypatch, "from-hf", "hf dir", "--output", "back") == 1
    assert "back exists already" in capsys.readouterr().err

    process = subprocess.run(
        ["sh", "-c", command.replace("python", sys.executable, 1)],
        env={**os.environ, "HF_HOME": str(root / "hf_home")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )  # the next step that the tool prints
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.startswith("The")


def test_baseline_goes_to_gpt2_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = tokenizer_config(small_tokenizer(), **BASELINE)
    tensors = tensors_of(small_model(config, torch.float32, vocab_multiple=1))
    save_weights(tmp_path / "checkpoint", config, tensors, None)
    assert run_tool(monkeypatch, "to-hf", tmp_path / "checkpoint", "--output", tmp_path / "hf") == 0
    assert "trust_remote_code" not in capsys.readouterr().out
    assert run_tool(monkeypatch, "from-hf", tmp_path / "hf", "--output", tmp_path / "back") == 0
    back = load_weights(tmp_path / "back")[1]
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_tokenizer_of_the_run(checkpoint: Path) -> None:
    root = checkpoint.parent
    (root / "tokenizer").rename(root / "moved")
    with pytest.raises(UserError, match=r"the run's tokenizer .* is not there: say where it is with --tokenizer"):
        checkpoint_to_hf(checkpoint, root / "hf")
    output = checkpoint_to_hf(checkpoint, root / "hf", tokenizer=str(root / "moved"))
    assert (output / "tokenizer.json").is_file()
    with pytest.raises(UserError, match="dtype 'int8'"):
        checkpoint_to_hf(checkpoint, root / "other", dtype="int8")


def test_the_card_names_the_layers_of_the_branch(tmp_path: Path) -> None:
    config = tokenizer_config(small_tokenizer(), num_layers=3, meta_layers=(0, 2))
    save_weights(tmp_path / "run", config, tensors_of(small_model(config, torch.float32, vocab_multiple=1)), None)
    output = checkpoint_to_hf(tmp_path / "run", tmp_path / "hf")
    card = (output / "README.md").read_text()
    assert "Blocks 0, 2, counted from 0, have a second attention branch" in card
    assert card.count("meta_layers | [0, 2] |") == 2 and "| data.meta_token_placement | random |" in card
    assert json.loads((output / "config.json").read_text())["meta_layers"] == [0, 2]
    hf_to_checkpoint(output, tmp_path / "back")
    assert load_weights(tmp_path / "back")[0].model.meta_layers == (0, 2)
