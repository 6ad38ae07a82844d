"""A pickle runs code when it is opened: wherever a user can hand in a file, one is refused and nothing is executed."""

import ast
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megameta.checkpoint import load_weights, open_checkpoint, save_weights
from megameta.errors import UserError
from megameta.hf.convert import checkpoint_to_hf, hf_to_checkpoint
from megameta.hf.export import export_to_hf
from megameta.hf.generation import Sampling, generate
from megameta.hf.importer import import_from_hf
from megameta.hf.start import start_values, start_weights
from megameta.tokenizers import load_huggingface_tokenizer
from megameta.train.offline import load_source
from tests.support.commands import run_command
from tests.support.exports import BASELINE, small_tokenizer, tensors_of, tokenizer_config
from tests.support.models import small_model
from tests.support.paths import ROOT

PICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


class Malice:
    """Pickled, it makes a directory when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def payloads(mark: Path, folder: Path) -> list[bytes]:
    """As pickle writes it, and as torch.save does: in a zip file, and in the older form."""
    found = [pickle.dumps(Malice(mark))]
    for zipped in (True, False):
        torch.save({"w": Malice(mark)}, folder / "x", _use_new_zipfile_serialization=zipped)
        found.append((folder / "x").read_bytes())
    (folder / "x").unlink()
    return found


def test_the_payloads_would_work(mark: Path, tmp_path: Path) -> None:
    for number, payload in enumerate(payloads(mark, tmp_path)):
        (tmp_path / "y").write_bytes(payload)
        if number == 0:
            pickle.loads(payload)
        else:
            torch.load(tmp_path / "y", weights_only=False)
        assert mark.is_dir()
        mark.rmdir()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    config = tokenizer_config(tokenizer)
    weights = tensors_of(small_model(config, torch.float32, vocab_multiple=1))
    save_weights(tmp_path / "checkpoint", config, weights, str(tmp_path / "tokenizer"))
    return tmp_path / "checkpoint"


def replace_in_checkpoint(checkpoint: Path, name: str, content: bytes) -> None:
    """Another file, with a manifest that vouches for it: what an attacker would do."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["sha256"]
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    manifest["sha256"] = hashlib.sha256(canonical).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_checkpoints(checkpoint: Path, mark: Path, tmp_path: Path) -> None:
    """Resuming, init.from_checkpoint, megameta evaluate and to-hf all open them by ``open_checkpoint``."""
    weights = next(path.name for path in checkpoint.glob("model-*.safetensors"))
    whole = (checkpoint / weights).read_bytes()
    replace_in_checkpoint(checkpoint, weights, whole)
    open_checkpoint(checkpoint)  # the attacker's manifest is in order
    for payload in payloads(mark, tmp_path):
        replace_in_checkpoint(checkpoint, weights, payload)
        for use in (
            open_checkpoint,
            load_weights,
            lambda place: load_source(str(place), []),
            lambda place: checkpoint_to_hf(place, tmp_path / "hf"),
        ):
            with pytest.raises(UserError, match="not readable as safetensors"):
                use(checkpoint)
    replace_in_checkpoint(checkpoint, weights, whole)
    malice = f"!!python/object/apply:os.mkdir ['{mark}']"
    for config in (malice, f"run: {{dir: {malice}}}"):
        assert yaml.unsafe_load(config) is not None or mark.is_dir()
        mark.rmdir()
        replace_in_checkpoint(checkpoint, "config.yaml", config.encode())
        with pytest.raises(UserError, match=r"config\.yaml: missing or not readable"):
            open_checkpoint(checkpoint)
    assert not mark.exists()


USES: dict[str, Callable[[Path], object]] = {
    "from-hf": lambda place: hf_to_checkpoint(place, place.parent / "back"),
    "import": import_from_hf,
    "init.from_hf, the configuration": lambda place: start_values({}, str(place)),
    "init.from_hf, the weights": lambda place: start_weights(place, None, 0),  # type: ignore[arg-type]  # fails before
    "megameta evaluate": lambda place: load_source(str(place), []),
    "megameta generate": lambda place: generate(str(place), ["the"], max_new_tokens=1, sampling=Sampling()),
}


@pytest.mark.parametrize("kind", ["megameta", "gpt2", "foreign gpt2", "gpt_neox"])
@pytest.mark.parametrize("use", USES)
def test_huggingface_directories(use: str, kind: str, mark: Path, tmp_path: Path) -> None:
    place = tmp_path / "export"
    tokenizer = small_tokenizer()
    config = tokenizer_config(tokenizer, **({} if kind == "megameta" else BASELINE))
    export_to_hf(config, tensors_of(small_model(config, torch.float32, vocab_multiple=1)), place, tokenizer)
    values = json.loads((place / "config.json").read_text())
    if kind == "foreign gpt2":
        del values["megameta"]
    elif kind == "gpt_neox":
        values = {"model_type": "gpt_neox", "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    # Code that the directory asks to be run.
    values["auto_map"] = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    (place / "config.json").write_text(json.dumps(values))
    for name in ("evil.py", "modeling_megameta.py"):
        (place / name).write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    if use == "megameta evaluate" and kind in ("megameta", "gpt2"):
        load_source(str(place), [])  # as it is: nothing of it runs
    assert not mark.exists()
    payload = payloads(mark, tmp_path)[1]
    for damage in (_under_the_right_name, _as_a_bin, _in_an_index):
        damage(place, payload)
        with pytest.raises(UserError, match=r"not readable as safetensors|only safetensors are read"):
            USES[use](place)
        assert not mark.exists()


def _under_the_right_name(place: Path, payload: bytes) -> None:
    (place / "model.safetensors").write_bytes(payload)


def _as_a_bin(place: Path, payload: bytes) -> None:
    (place / "model.safetensors").unlink()
    (place / "pytorch_model.bin").write_bytes(payload)


def _in_an_index(place: Path, payload: bytes) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def test_tokenizers_with_code_of_their_own(mark: Path, tmp_path: Path) -> None:
    place = tmp_path / "tokenizer"
    place.mkdir()
    (place / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    settings = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no HuggingFace tokenizer"):
        load_huggingface_tokenizer(place)
    assert not mark.exists()


def test_arrays_of_caches_and_audits(mark: Path, tmp_path: Path) -> None:
    """A .npy of objects is a pickle."""
    from megameta.data.index_cache import IndexCache

    cache = IndexCache(tmp_path / "cache")
    made = {"order": np.arange(5)}
    assert cache.get("family", 0, lambda: made)["order"].tolist() == [0, 1, 2, 3, 4]
    file = next((tmp_path / "cache").rglob("order.npy"))
    file.chmod(0o644)
    np.save(file, np.array([Malice(mark)], dtype=object), allow_pickle=True)
    found = cache.get("family", 0, lambda: made)["order"]  # damaged: made anew
    assert found.tolist() == [0, 1, 2, 3, 4] and not mark.exists()


def test_the_source_opens_no_pickle() -> None:
    """No import of a pickling module, no torch.load, no numpy or YAML loader that would unpickle."""
    found = []
    for folder in ("megameta", "tools", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                if {name.split(".")[0] for name in names} & {
                    "pickle",
                    "cPickle",
                    "dill",
                    "joblib",
                    "shelve",
                    "marshal",
                }:
                    found.append(f"{where}: {ast.unparse(node)}")
                if isinstance(node, ast.Call):
                    found += [f"{where}: {problem}" for problem in _problems(node)]
    assert not found, "\n".join(found)


def _problems(call: ast.Call) -> list[str]:
    called, said = ast.unparse(call.func), ast.unparse(call)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    wrong = called == "torch.load" and keywords.get("weights_only") != "True"
    wrong |= called in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False"
    wrong |= called in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec", "pd.read_pickle")
    wrong |= called == "yaml.load" and "StrictLoader" not in said
    return [said] if wrong else []


def test_a_tool_says_it_in_one_line(mark: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "gpt2"}')
    (place / "pytorch_model.bin").write_bytes(payloads(mark, tmp_path)[1])
    process = run_command(tmp_path, "tools/convert_checkpoint.py", "from-hf", place, "--output", "out")
    assert process.returncode == 1 and not mark.exists()
    lines = [line for line in process.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "pytorch_model.bin" in lines[0] and "save_pretrained" in lines[0]
    assert "Traceback" not in process.stderr and not (tmp_path / "out").exists()
