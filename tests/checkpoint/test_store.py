"""Checkpoints on disk: whole or not at all, every byte checked, the right ones removed."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megameta.checkpoint import store
from megameta.checkpoint.store import (
    TrainerState,
    find_checkpoint,
    latest_checkpoint,
    load_weights,
    open_checkpoint,
    point_latest,
    prune,
    save_weights,
    step_name,
    write_checkpoint,
)
from megameta.config import build_config
from megameta.errors import UserError
from megameta.model import ModelConfig

CONFIG = build_config({"optimizer": {"lr": 6e-4}, "data": {"skip": [[1, 3]], "train": "x"}})
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
    assert {p.name for p in written.iterdir()} == {
        *("model.safetensors", "optimizer.safetensors", "trainer.json", "config.yaml", "manifest.json")
    }
    assert [p.name for p in written.parent.iterdir()] == [written.name], "nothing is left beside it"


def test_weights_alone(tmp_path):
    model = ModelConfig(vocab_size=40, hidden_size=16, num_heads=2, bias=True)
    save_weights(tmp_path / "w", model, {"t": torch.arange(6.0).view(2, 3).T}, "some/tokenizer")
    config, weights = load_weights(tmp_path / "w")
    assert config.model == model and config.data.tokenizer == "some/tokenizer"
    assert torch.equal(weights["t"], torch.arange(6.0).view(2, 3).T)
    assert not open_checkpoint(tmp_path / "w").has_trainer


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json", "config.yaml"])
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


def test_every_flipped_bit_of_the_manifest_is_noticed_or_harmless(written):
    original = (written / "manifest.json").read_bytes()
    weights = open_checkpoint(written).weights()
    for place in range(len(original)):
        data = bytearray(original)
        data[place] ^= 1
        (written / "manifest.json").write_bytes(data)
        try:
            again = open_checkpoint(written).weights()
        except UserError:
            continue
        assert all(torch.equal(again[k], weights[k]) for k in weights)


def test_another_version_is_refused(written):
    manifest = json.loads((written / "manifest.json").read_text())
    (written / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(UserError, match=r"version 2; this program reads megameta-checkpoint version 1"):
        open_checkpoint(written)


class Crash(BaseException):
    """The process ends here."""


#: Everything that touches the disk, in the module as it calls it.
STEPS = ["save_file", "_sha256", "_sync", "Path.write_text", "Path.rename", "Path.mkdir"]


def fail_at(monkeypatch, name, call, error):
    """The ``call``-th call of a function raises; False if there are not as many."""
    owner, attribute = (store.Path, name.partition(".")[2]) if "." in name else (store, name)
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
    assert {t.dtype for t in load_file(written / "model.safetensors").values()} == {torch.float32}
