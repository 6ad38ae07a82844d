"""Checkpoints that several ranks write and open together."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megameta.checkpoint import StateEntry, open_checkpoint, save_distributed
from megameta.checkpoint.store import TrainerState, step_name
from megameta.checkpoint.tensor_file import TensorWriter
from megameta.config import build_config
from megameta.errors import UserError
from megameta.parallel.topology import Topology
from tests.support.ranks import run_ranks

CONFIG = build_config({"data": {"train": "x"}})
STATE = TrainerState(step=7, next_batch=9, tokens=100, targets=80, optimizer_step=6)


class Source:
    """Tensors that every rank could make; those without ``group`` on this rank are another stage's.

    Args:
        owners: by kind and name, (owner, participating ranks).
    """

    def __init__(self, rank, owners, value=1.0):
        self.rank, self.value, self.walked = rank, value, []
        self.alive, self.most = weakref.WeakSet(), 0
        self.entries = [
            StateEntry(kind, name, (len(name), 3), owner)
            for (kind, name), (owner, group) in owners.items()
            if rank in group
        ]

    def gather(self, entry, out=None):
        self.walked.append(entry.name)
        if entry.owner != self.rank:
            return None
        tensor = tensor_of(entry.name, self.value)
        if out is not None:
            return out.copy_(tensor)
        self.alive.add(tensor)
        self.most = max(self.most, len(self.alive))
        return tensor


def tensor_of(name, value=1.0):
    return torch.arange(len(name) * 3.0).view(len(name), 3) + value


def layout(world_size):
    """Two "stages"; the last rank owns moments only, and with three ranks one owns a single tensor."""
    everyone, last = tuple(range(world_size)), world_size - 1
    owners = {("model", f"blocks.{i}"): (0, everyone) for i in range(5)}
    owners |= {("model", "head"): (world_size - 2, everyone[-2:])}
    owners |= {("optimizer", f"exp_avg.blocks.{i}"): (last, everyone) for i in range(5)}
    owners |= {("optimizer", "exp_avg.head"): (0, everyone)}
    return owners


def _save(topology, path, world_size):
    source = Source(topology.rank, layout(world_size))
    save_distributed(path, CONFIG, source, STATE if topology.is_main else None, topology)
    checkpoint = open_checkpoint(path, topology)
    values = {name: tensor.tolist() for name, tensor in {**checkpoint.weights(), **checkpoint.moments()}.items()}
    return len(source.walked), source.most, values, checkpoint.trainer() == STATE


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_write_and_open_together(tmp_path, world_size):
    path = tmp_path / "checkpoints" / step_name(7)
    results = run_ranks(_save, world_size, path, world_size)
    owners = layout(world_size)
    for rank, (walked, most, values, same_state) in enumerate(results):
        assert walked == sum(rank in group for _, group in owners.values()) and most <= 1 and same_state
        assert values == {name: tensor_of(name).tolist() for _, name in owners}
    one = open_checkpoint(path)  # by one process, too
    assert torch.equal(one.weights()["head"], tensor_of("head")) and one.trainer() == STATE
    expected = set()
    for kind in ("model", "optimizer"):
        count = len({owner for (of_kind, _), (owner, _) in owners.items() if of_kind == kind})
        expected |= {f"{kind}-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)}
    assert {file.name for file in path.iterdir()} == {*expected, "config.yaml", "trainer.json", "manifest.json"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    last = load_file(path / max(name for name in expected if name.startswith("model")))
    assert set(last) == ({"head"} if world_size == 3 else {*(f"blocks.{i}" for i in range(5)), "head"})


def _save_where_a_disk_fails(topology, path, world_size, bad_rank, step):
    source = Source(topology.rank, layout(world_size), value=2.0)
    if topology.rank == bad_rank:
        real, calls = getattr(TensorWriter, step), [0]

        def failing(self, *args):
            calls[0] += 1
            if calls[0] == 2 or step != "write":
                raise OSError(28, "No space left on device")
            return real(self, *args)

        setattr(TensorWriter, step, failing)
    try:
        save_distributed(path, CONFIG, source, STATE, topology)
    except UserError as error:
        return str(error), len(source.walked), sorted(file.name for file in path.parent.iterdir())
    return None


@pytest.mark.parametrize(
    ("world_size", "bad_rank", "step"), [(2, 1, "write"), (3, 2, "close"), (3, 0, "__init__")], ids=str
)
def test_a_failing_disk_fails_all_and_harms_nothing(tmp_path, world_size, bad_rank, step):
    path = tmp_path / "checkpoints" / step_name(7)
    save_distributed(path, CONFIG, Source(0, dict.fromkeys(layout(1 + 1), (0, (0,)))), STATE, Topology())
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    results = run_ranks(_save_where_a_disk_fails, world_size, path, world_size, bad_rank, step)
    messages = {message for message, *_ in results}
    assert len(messages) == 1
    (message,) = messages
    assert f"cannot save {path}: rank {bad_rank}, " in message and "No space left" in message
    assert ".safetensors: " in message and "free space" in message
    for rank, (_, walked, beside) in enumerate(results):
        assert walked == sum(rank in group for _, group in layout(world_size).values()), "all gather to the end"
        assert beside == [path.name], "no working directory is left"
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    open_checkpoint(path)


def _open_each(topology, paths):
    said = []
    for path in paths:
        try:
            open_checkpoint(path, topology)
            said.append("")
        except UserError as error:
            said.append(str(error))
    return said


def test_all_ranks_hear_of_the_same_damage(tmp_path):
    """Each file is hashed by one rank only; two are damaged, and every rank names the first."""
    path = tmp_path / "checkpoints" / step_name(7)
    owners = {key: (index % 2, (0, 1)) for index, key in enumerate(layout(2))}
    run_ranks(_save_layout, 2, path, owners)
    tensor_files = ["optimizer-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    damages = [[], tensor_files, *([file.name] for file in sorted(path.iterdir()))]
    paths = [tmp_path / f"damaged_{number}" for number in range(len(damages))]
    for copy, names in zip(paths, damages):
        shutil.copytree(path, copy)
        for name in names:
            data = bytearray((copy / name).read_bytes())
            data[-2] ^= 4
            (copy / name).write_bytes(data)
    by_rank = run_ranks(_open_each, 3, [*paths, tmp_path / "nowhere"])
    assert by_rank[0] == by_rank[1] == by_rank[2]
    whole, two, *each, nowhere = by_rank[0]
    assert whole == "" and tensor_files[1] in two and "neither a checkpoint" in nowhere
    for (name,), message in zip(damages[2:], each):
        assert name in message and "older checkpoint" in message
        assert name == "manifest.json" or "SHA-256 differs" in message


def _save_layout(topology, path, owners, other=None):
    mine = other if other is not None and topology.rank == 1 else owners
    try:
        save_distributed(path, CONFIG, Source(topology.rank, mine), STATE, topology)
    except (UserError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_ownership_that_does_not_add_up(tmp_path):
    """Two owners, or an owner that does not know of it, are mistakes in the caller; nothing is written."""
    both = {("model", "a"): (0, (0, 1)), ("model", "b"): (1, (0, 1))}
    twice = {("model", "a"): (1, (0, 1)), ("model", "b"): (1, (0, 1))}
    said = run_ranks(_save_layout, 2, tmp_path / "x", both, twice)
    assert said[0] == said[1] and "owned by ranks 0 and 1" in said[0]
    nobody = {("model", "a"): (0, (0, 1)), ("model", "b"): (1, (0,))}
    said = run_ranks(_save_layout, 2, tmp_path / "x", nobody)
    assert said[0] == said[1] and "rank 1 does not know" in said[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [None, torch.zeros(1), torch.zeros(1, 3, dtype=torch.float64), "text"], ids=str)
def test_what_is_gathered_is_checked(tmp_path, wrong):
    source = Source(0, {("model", "a"): (0, (0,)), ("model", "b"): (0, (0,))})
    source.gather = lambda entry, out=None: wrong
    with pytest.raises(UserError, match=r"rank 0, model-00001-of-00001\.safetensors: "):
        save_distributed(tmp_path / "x", CONFIG, source, STATE, Topology())
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_at_a_time(tmp_path):
    """Of many tensors, no two are alive at once."""
    owners = {(kind, f"{kind}.{i}"): (0, (0,)) for i in range(40) for kind in ("model", "optimizer")}
    source = Source(0, owners)
    gc.disable()
    try:
        save_distributed(tmp_path / "x", CONFIG, source, STATE, Topology())
    finally:
        gc.enable()
    assert len(source.walked) == 80 and source.most == 1
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest["version"] == 2 and manifest["tensors"] == {"model": 40, "optimizer": 40}
    assert isinstance(open_checkpoint(tmp_path / "x").path, Path)
