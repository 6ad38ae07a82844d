"""safetensors files written tensor by tensor are what the library would have written, and are read by slice."""

import hashlib
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megameta.checkpoint.tensor_file import MadeTensors, StoredTensors, TensorEntry, TensorWriter, entry_of
from megameta.errors import UserError

SHAPES = {"b.weight": (5, 3), "a": (7,), "one": (), "none": (0, 4), "α∕β": (2, 3, 4), "big": (300, 257)}


def tensors(dtype=torch.float32):
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


def write(path, given):
    writer = TensorWriter(path, [TensorEntry(name, tuple(t.shape), t.dtype) for name, t in given.items()])
    for name, tensor in given.items():
        writer.write(name, tensor)
    return writer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_library_reads_what_it_would_have_written(tmp_path, dtype):
    given = tensors(dtype)
    size, digest = write(tmp_path / "ours", given)
    data = (tmp_path / "ours").read_bytes()
    assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())
    save_file(given, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() == given.keys()
    for name, tensor in given.items():
        assert ours[name].dtype == theirs[name].dtype == dtype
        assert torch.equal(ours[name], tensor) and torch.equal(theirs[name], tensor)
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_bytes_are_the_librarys_where_the_order_is(tmp_path):
    """The library writes in the order of names: given in that order, the files are the same but for the header's."""
    given = dict(sorted(tensors().items()))
    write(tmp_path / "ours", given)
    save_file(given, tmp_path / "theirs", metadata={"format": "pt"})
    headers, bodies = [], []
    for name in ("ours", "theirs"):
        data = (tmp_path / name).read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        headers.append(json.loads(data[8 : 8 + length]))
        bodies.append(data[8 + length :])
    assert headers[0] == headers[1] and bodies[0] == bodies[1]


def test_strided_tensors(tmp_path):
    tensor = torch.randn(6, 4).T[1:3]
    write(tmp_path / "x", {"t": tensor})
    assert torch.equal(load_file(tmp_path / "x")["t"], tensor)


def test_only_the_next_entry_can_be_written(tmp_path):
    writer = TensorWriter(tmp_path / "x", [("a", (2, 3)), ("b", (4,))])
    wrong = [
        ("b", torch.zeros(4)),
        ("a", torch.zeros(3, 2)),
        ("a", torch.zeros(6)),
        ("a", torch.zeros(2, 3, dtype=torch.float64)),
        ("a", torch.zeros(2, 3, device="meta")),
    ]
    for name, tensor in wrong:
        with pytest.raises(ValueError, match=r"comes next"):
            writer.write(name, tensor)
    writer.write("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="comes next"):
        writer.write("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="b was not written"):
        writer.close()
    writer = TensorWriter(tmp_path / "x", [])
    with pytest.raises(ValueError, match="after the last"):
        writer.write("a", torch.zeros(1))
    writer.close()
    assert load_file(tmp_path / "x") == {}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("a", (1,)), ("a", (2,))], "two tensors are called a"),
        ([("__metadata__", (1,))], "two tensors are called __metadata__"),
        ([("a", (1,), torch.int64)], "only"),
        ([("a", (1,), torch.bfloat16), ("b", (1,), torch.float32)], "wider types"),
    ],
)
def test_entries_that_make_no_file(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        TensorWriter(tmp_path / "x", entries)
    assert not (tmp_path / "x").exists()


def test_reading_over_several_files(tmp_path):
    given = tensors()
    names = list(given)
    write(tmp_path / "1", {name: given[name] for name in names[:2]})
    write(tmp_path / "2", {name: given[name] for name in names[2:]})
    stored = StoredTensors([tmp_path / "1", tmp_path / "2"])
    assert len(stored) == len(names) and stored.keys() == given.keys() and "a" in stored and "c" not in stored
    for name, tensor in given.items():
        assert stored.shape(name) == tuple(tensor.shape) == SHAPES[name]
        assert stored.entry(name) == TensorEntry(name, tuple(tensor.shape), torch.float32) == entry_of(given, name)
        assert torch.equal(stored[name], tensor)
        assert stored[name].untyped_storage().nbytes() == tensor.numel() * 4, "memory of its own"
    with pytest.raises(KeyError):
        stored["c"]


def test_every_slice_is_the_tensors(tmp_path):
    given = tensors()
    write(tmp_path / "x", given)
    stored = StoredTensors([tmp_path / "x"])
    for name in ("α∕β", "b.weight", "a"):
        tensor = given[name]
        for dim, length in enumerate(tensor.shape):
            for start in range(length + 1):
                for stop in range(start, length + 1):
                    piece = stored.read(name, dim, start, stop)
                    assert torch.equal(piece, tensor.narrow(dim, start, stop - start)) and piece.is_contiguous()
                    assert piece.untyped_storage().nbytes() == piece.numel() * 4
    for dim, start, stop in [(0, 0, 6), (2, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 2, 1)]:
        with pytest.raises(ValueError, match=r"b.weight of shape \(5, 3\)"):
            stored.read("b.weight", dim, start, stop)


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    from megameta.checkpoint import tensor_file

    write(tmp_path / "x", tensors())
    with safe_open(tmp_path / "x", "pt") as real:
        reads = []

        class Counting:
            def __init__(self, *_args, **_kwargs): ...
            def __enter__(self):
                return self

            def __exit__(self, *_):
                return None

            keys, get_slice = real.keys, real.get_slice

            def get_tensor(self, name):
                reads.append(name)
                return real.get_tensor(name)

        monkeypatch.setattr(tensor_file, "safe_open", Counting)
        stored = StoredTensors([tmp_path / "x"])
        assert sum(math.prod(stored.shape(name)) for name in stored) == sum(map(math.prod, SHAPES.values()))
        assert "a" in stored and len(list(stored)) == len(stored) and reads == []
        stored["a"]
        assert reads == ["a"]


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "header", "integers"])
def test_damaged_files_are_named(tmp_path, damage):
    path = tmp_path / "x"
    write(path, tensors())
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "integers":
        save_file({"ids": torch.arange(3)}, path)
    else:
        path.write_bytes({"cut": data[:-4], "empty": b"", "header": data[:8] + b"\xff" + data[9:]}[damage])
    with pytest.raises(UserError, match=str(path)):
        StoredTensors([path])


def test_damage_that_comes_later_is_named(tmp_path):
    path = tmp_path / "x"
    write(path, tensors())
    stored = StoredTensors([path])
    path.unlink()
    with pytest.raises(UserError, match=str(path)):
        stored["a"]
    with pytest.raises(UserError, match=str(path)):
        stored.read("a", 0, 0, 1)


def test_a_name_in_two_files_is_refused(tmp_path):
    write(tmp_path / "1", {"a": torch.zeros(1)})
    write(tmp_path / "2", {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="holds a, which"):
        StoredTensors([tmp_path / "1", tmp_path / "2"])


def test_made_tensors():
    made = MadeTensors({"a": (TensorEntry("a", (2,)), lambda: torch.ones(2))})
    assert made.shape("a") == (2,) and list(made) == ["a"] and torch.equal(made["a"], torch.ones(2))
    assert made["a"] is not made["a"]
