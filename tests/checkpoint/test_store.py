"""Checkpoints on disk: whole or not at all, every byte checked, the right ones removed."""

import contextlib
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megameta import files
from megameta.checkpoint import save, store
from megameta.checkpoint.manifest import read_manifest
from megameta.checkpoint.save import save_weights, write_checkpoint
from megameta.checkpoint.store import (
    TrainerState,
    find_checkpoint,
    latest_checkpoint,
    load_weights,
    open_checkpoint,
    point_latest,
    prune,
    step_name,
)
from megameta.checkpoint.tensor_file import TensorWriter
from megameta.config import build_config
from megameta.errors import UserError
from megameta.model import ModelConfig

CONFIG = build_config({"optimizer": {"lr": 6e-4}, "data": {"skip": [[1, 3]], "train": "x"}})
MODEL, OPTIMIZER = "model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors"
STATE = TrainerState(step=7, next_batch=9, tokens=100, targets=80, optimizer_step=6, loss_scale={"scale": 2.0})


def tensors(value=1.0):
    return {"a.weight": torch.full((3, 2), value), "b": torch.arange(4.0)}


def moments():
    return {"exp_avg.b": torch.randn(4), "exp_avg_sq.b": torch.rand(4)}


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "checkpoints" / step_name(7)
    write_checkpoint(path, CONFIG, tensors(), moments(), STATE)
    return path


def test_round_trip(written):
    checkpoint = open_checkpoint(written)
    assert checkpoint.config == CONFIG and checkpoint.trainer() == STATE and checkpoint.has_trainer
    assert checkpoint.weights().keys() == {"a.weight", "b"}
    assert torch.equal(checkpoint.weights()["a.weight"], torch.ones(3, 2))
    assert checkpoint.moments().keys() == {"exp_avg.b", "exp_avg_sq.b"}
    assert {p.name for p in written.iterdir()} == {*(MODEL, OPTIMIZER, "trainer.json", "config.yaml", "manifest.json")}
    assert [p.name for p in written.parent.iterdir()] == [written.name], "nothing is left beside it"


def test_weights_alone(tmp_path):
    model = ModelConfig(vocab_size=40, hidden_size=16, num_heads=2, bias=True)
    save_weights(tmp_path / "w", model, {"t": torch.arange(6.0).view(2, 3).T}, "some/tokenizer")
    config, weights = load_weights(tmp_path / "w")
    assert config.model == model and config.data.tokenizer == "some/tokenizer"
    assert torch.equal(weights["t"], torch.arange(6.0).view(2, 3).T)
    assert not open_checkpoint(tmp_path / "w").has_trainer


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "trainer.json", "config.yaml"])
@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "missing", "empty"])
def test_every_damage_to_every_file_is_named(written, name, damage):
    file = written / name
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        changed = {"flip": bytes(data), "cut": data[:-1], "longer": data + b" ", "empty": b""}[damage]
        file.write_bytes(changed)
    with pytest.raises(UserError, match=f"{name}.*older checkpoint"):
        open_checkpoint(written)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"format": "megameta-checkpoint"}', "\x00", '{"format": "x", "version": 1, "files": {}}'],
)
def test_a_bad_manifest_is_named(written, text):
    (written / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=str(written)):
        open_checkpoint(written)


def test_every_damage_to_the_manifest_is_noticed(written):
    """Each bit flipped, and a cut after each byte."""
    path = written / "manifest.json"
    original = path.read_bytes()
    for place in range(len(original)):
        for bit in range(8):
            path.write_bytes(original[:place] + bytes([original[place] ^ 1 << bit]) + original[place + 1 :])
            with pytest.raises(UserError, match=r"manifest\.json"):
                read_manifest(written)
        path.write_bytes(original[:place])
        with pytest.raises(UserError, match=r"manifest\.json"):
            read_manifest(written)
    for more in (b"\n", b" ", b"\0", b"}"):
        path.write_bytes(original + more)
        with pytest.raises(UserError, match=r"manifest\.json"):
            read_manifest(written)
    path.write_bytes(original)
    open_checkpoint(written)


def test_damage_anywhere_is_noticed(written):
    """A flipped bit, or a cut, at random places of all files together: the larger a file, the more of them."""
    paths = sorted(written.iterdir())
    contents = {path: path.read_bytes() for path in paths}
    draw = random.Random(1)
    for number in range(80):
        path = draw.choices(paths, [len(contents[path]) for path in paths])[0] if number % 2 else draw.choice(paths)
        data = bytearray(contents[path])
        place = draw.randrange(len(data))
        data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(data if number % 4 else contents[path][:place])
        with pytest.raises(UserError, match=str(written)):
            open_checkpoint(written)
        path.write_bytes(contents[path])
    open_checkpoint(written)


def rewrite_manifest(directory, change):
    """A manifest that says something else and whose own hash is right."""
    content = json.loads((directory / "manifest.json").read_text())
    content.pop("sha256")
    change(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    (directory / "manifest.json").write_text(json.dumps({**content, "sha256": hashlib.sha256(text).hexdigest()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].pop(MODEL), "lists no model"),
        (lambda m: m["files"].pop(OPTIMIZER), f"{OPTIMIZER}: not in manifest.json"),
        (lambda m: m["files"].pop("config.yaml"), "does not list config.yaml"),
        (
            lambda m: m["files"].update({"model-00003-of-00003.safetensors": m["files"][MODEL]}),
            "is not all of the model",
        ),
        (lambda m: m["files"].update({"../x": m["files"][MODEL]}), "no plain file name"),
        (lambda m: m["tensors"].update(model=3), f"2 instead of 3 tensors in {MODEL}"),
        (lambda m: m["tensors"].update(optimizer=1), f"2 instead of 1 tensors in {OPTIMIZER}"),
        (lambda m: m.pop("tensors"), "not readable"),
        (lambda m: m["files"][MODEL].pop("bytes"), "not readable"),
        (lambda m: m.update(version=3), r"version 3; this program reads megameta-checkpoint versions 1 and 2"),
    ],
    ids=[
        *("no model", "no optimizer", "no config", "gap", "path", "a tensor less", "a tensor more"),
        *("no counts", "no size", "version"),
    ],
)
def test_a_manifest_of_other_files_is_refused(written, change, message):
    rewrite_manifest(written, lambda content: None)
    open_checkpoint(written)
    rewrite_manifest(written, change)
    with pytest.raises(UserError, match=message):
        open_checkpoint(written)


@pytest.mark.parametrize("name", ["trainer.json", "config.yaml"])
@pytest.mark.parametrize("data", [b"\xff\xfe", b"[1", b"3", b"{a: b: c}"], ids=["binary", "cut", "number", "colons"])
def test_small_files_that_match_the_manifest_and_make_no_sense(written, name, data):
    (written / name).write_bytes(data)
    digest = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite_manifest(written, lambda content: content["files"].update({name: digest}))
    with pytest.raises(UserError, match=name):
        open_checkpoint(written).trainer()


def test_version_1_is_read(tmp_path):
    """As one process used to write it."""
    path = tmp_path / "checkpoints" / step_name(7)
    path.mkdir(parents=True)
    save_file(tensors(3.0), path / "model.safetensors", metadata={"format": "pt"})
    save_file(moments(), path / "optimizer.safetensors", metadata={"format": "pt"})
    (path / "trainer.json").write_text(json.dumps(vars(STATE), indent=1))
    (path / "config.yaml").write_text(CONFIG.to_yaml())
    listed = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in sorted(path.iterdir())
    }
    text = json.dumps({"format": "megameta-checkpoint", "version": 1, "files": listed}, indent=1)
    (path / "manifest.json").write_text(text)
    point_latest(path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == CONFIG and checkpoint.trainer() == STATE and checkpoint.has_trainer
    assert {k: v.tolist() for k, v in checkpoint.weights().items()} == {k: v.tolist() for k, v in tensors(3.0).items()}
    assert checkpoint.moments().keys() == {"exp_avg.b", "exp_avg_sq.b"}
    (path / "optimizer.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"optimizer\.safetensors"):
        open_checkpoint(path)


class Crash(BaseException):
    """The process ends here."""


#: Everything that touches the disk, where it is called.
STEPS = {
    "open": (TensorWriter, "__init__"),
    "write": (TensorWriter, "write"),
    "close": (TensorWriter, "close"),
    "fsync": (os, "fsync"),
    "small files": (save, "write_synced"),
    "directory": (save, "sync"),
    "its parent": (files, "sync"),
    "rename": (Path, "rename"),
    "mkdir": (Path, "mkdir"),
}


def fail_at(monkeypatch, name, call, error):
    """The ``call``-th call of a function raises; the number of calls, in a list."""
    owner, attribute = STEPS[name]
    real, calls = getattr(owner, attribute), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, wrapped)
    return calls


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Crash()], ids=["disk full", "crash"])
def test_whole_or_not_at_all(tmp_path, name, error):
    """Whatever fails, at whichever call: no half checkpoint under a checkpoint's name, and the older one is intact."""
    for call in range(1, 20):
        folder = tmp_path / f"{call}" / "checkpoints"
        old, new = folder / step_name(7), folder / step_name(8)
        write_checkpoint(old, CONFIG, tensors(), moments(), STATE)
        point_latest(old)
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_at(patch, name, call, error)
            try:
                write_checkpoint(new, CONFIG, tensors(2.0), moments(), STATE)
                point_latest(new)
            except UserError as failed:
                assert "No space left on device" in str(failed) and "free space" in str(failed)
            except (OSError, Crash):
                pass
        found = open_checkpoint(folder.parent)
        assert found.path in (old, new)
        assert torch.equal(found.weights()["a.weight"], torch.full((3, 2), 1.0 if found.path == old else 2.0))
        assert open_checkpoint(old).trainer() == STATE
        if new.exists():
            assert torch.equal(open_checkpoint(new).weights()["a.weight"], torch.full((3, 2), 2.0))
        write_checkpoint(new, CONFIG, tensors(3.0), moments(), STATE)  # it can be made once more
        point_latest(new)
        prune(folder, 1)
        assert sorted(p.name for p in folder.iterdir()) == ["latest", step_name(8)]
        if calls[0] < call:
            break
    assert 2 <= call < 19


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Crash()], ids=["disk full", "crash"])
def test_the_one_of_the_same_name_stays_or_is_replaced(tmp_path, name, error):
    for call in range(1, 20):
        path = tmp_path / f"{call}" / step_name(8)
        write_checkpoint(path, CONFIG, tensors(1.0), moments(), STATE)
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_at(patch, name, call, error)
            with contextlib.suppress(UserError, Crash):
                write_checkpoint(path, CONFIG, tensors(2.0), moments(), STATE)
        value = open_checkpoint(path).weights()["a.weight"]
        assert torch.equal(value, torch.full((3, 2), 1.0)) or torch.equal(value, torch.full((3, 2), 2.0))
        assert not list(path.parent.glob(".*.writing"))
        if calls[0] < call:
            break
    assert 2 <= call < 19 and float(value[0, 0]) == 2.0


def test_a_kill_leaves_files_that_are_no_checkpoint(tmp_path):
    """As kill -9 does: no clean-up runs."""
    folder = tmp_path / "checkpoints"
    write_checkpoint(folder / step_name(1), CONFIG, tensors())
    point_latest(folder / step_name(1))
    half = folder / f".{step_name(2)}.writing"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    doomed = folder / f".{step_name(0)}.old"
    doomed.mkdir()
    (doomed / "model.safetensors").write_bytes(b"half")
    assert find_checkpoint(tmp_path) == folder / step_name(1)
    write_checkpoint(folder / step_name(2), CONFIG, tensors(2.0))
    assert torch.equal(open_checkpoint(folder / step_name(2)).weights()["a.weight"], torch.full((3, 2), 2.0))
    point_latest(folder / step_name(2))
    prune(folder, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["latest", step_name(1), step_name(2)]


def test_one_of_the_same_name_is_replaced(written):
    write_checkpoint(written, CONFIG, tensors(5.0))
    checkpoint = open_checkpoint(written)
    assert torch.equal(checkpoint.weights()["a.weight"], torch.full((3, 2), 5.0)) and not checkpoint.has_trainer
    assert [p.name for p in written.parent.iterdir()] == [written.name]


def test_latest_moves_last(written, monkeypatch):
    """``latest`` names a checkpoint only after the checkpoint is there."""
    seen = []
    real = os.replace
    monkeypatch.setattr(store.Path, "replace", lambda self, target: (seen.append(written.exists()), real(self, target)))
    point_latest(written)
    assert seen == [True]
    assert latest_checkpoint(written.parent.parent) == written
    assert (written.parent / "latest").read_text() == f"{written.name}\n"


def make_steps(folder, steps, latest):
    for step in steps:
        write_checkpoint(folder / step_name(step), CONFIG, {"b": torch.zeros(1)})
    point_latest(folder / step_name(latest))


@pytest.mark.parametrize(
    ("steps", "latest", "keep", "left"),
    [
        ([1, 2, 3, 4], 4, 2, [3, 4]),
        ([1, 2, 3, 4], 4, 9, [1, 2, 3, 4]),
        ([9, 10, 100, 99999999], 99999999, 1, [99999999]),
        # Taken back to 10, and on to 15: 20 and 30 belong to what was abandoned and go first.
        ([10, 15, 20, 30], 15, 2, [10, 15]),
        ([10, 15, 20, 30], 15, 3, [10, 15, 30]),
        ([10, 15], 10, 1, [10]),
    ],
)
def test_prune(tmp_path, steps, latest, keep, left):
    make_steps(tmp_path, steps, latest)
    prune(tmp_path, keep)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", *map(step_name, left)]


def test_prune_never_removes_what_latest_names(tmp_path):
    """Whatever keep is, and whatever lies beside it."""
    for keep in (0, 1, 2, 5):
        make_steps(tmp_path, [3, 5, 7], 5)
        for name in ("step_00000009", "step_00000004", "step_x"):  # left by something else
            (tmp_path / name).mkdir(exist_ok=True)
        prune(tmp_path, keep)
        assert open_checkpoint(tmp_path / step_name(5)).path.name == step_name(5)
    shutil.rmtree(tmp_path / step_name(5))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="names 'step_00000005'"):
        prune(tmp_path, 1)
    assert sorted(tmp_path.iterdir()) == before, "nothing goes while it is not known which is the newest"


def test_prune_goes_on_after_one_that_was_interrupted(tmp_path, monkeypatch):
    make_steps(tmp_path, [1, 2, 3], 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            prune(tmp_path, 1)
    make_steps(tmp_path, [1], 3)  # the same name once more, beside what is left of it
    prune(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", step_name(3)]


def test_neither_checkpoint_nor_run(tmp_path):
    with pytest.raises(UserError, match=r"neither a checkpoint .* nor a run with one"):
        find_checkpoint(tmp_path)
    assert latest_checkpoint(tmp_path) is None


def test_weights_are_float32_and_whole_on_disk(written):
    assert {t.dtype for t in load_file(written / MODEL).values()} == {torch.float32}
    write_checkpoint(written, CONFIG, {"a": torch.ones(2, dtype=torch.bfloat16)})
    assert load_file(written / MODEL)["a"].dtype == torch.float32
