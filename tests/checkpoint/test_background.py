"""Saves that a thread writes, of one process: the same files, one at a time, what is left of one that is dropped."""

import math
import shutil
import threading

import pytest
import torch

from megameta.checkpoint import TrainerState, background, open_checkpoint, write_checkpoint
from megameta.checkpoint.background import BackgroundSaver
from megameta.checkpoint.ranks import Alone
from megameta.checkpoint.save import _InMemory
from megameta.checkpoint.store import point_latest, step_name
from megameta.checkpoint.tensor_file import TensorWriter
from megameta.config import build_config
from megameta.errors import UserError
from tests.support.waiting import LIMIT

CONFIG = build_config({"data": {"train": "x"}})
STATE = TrainerState(step=7, next_batch=9, tokens=100, targets=80, optimizer_step=6)


class Source(_InMemory):
    """As an engine's state: one rank's only part of each tensor is a view of it."""

    def holders(self, entry):
        return {0: math.prod(entry.shape)}

    def part(self, entry):
        return self._tensors[entry.kind][entry.name].view(-1)

    def assemble(self, entry, parts):
        return parts[0].view(entry.shape)


def tensors():
    draw = torch.Generator().manual_seed(0)
    return {f"blocks.{i}": torch.randn(40, i + 1, generator=draw) for i in range(9)}


def begun(path, weights):
    saver = BackgroundSaver(Alone())
    saver.begin(path, CONFIG, Source(weights, {"exp_avg.a": weights["blocks.3"]}), STATE)
    return saver


def test_the_files_are_those_of_a_save_without_a_thread(tmp_path):
    weights = tensors()
    plain, path = tmp_path / "plain", tmp_path / "run" / step_name(7)
    write_checkpoint(plain, CONFIG, weights, {"exp_avg.a": weights["blocks.3"]}, STATE)
    saver = begun(path, weights)
    saver.wait_for_copies()
    for tensor in weights.values():
        tensor.zero_()  # training goes on
    assert saver.is_pending and not path.exists()
    with pytest.raises(ValueError, match="has not been completed"):
        saver.begin(path, CONFIG, Source(weights, {}), STATE)
    assert saver.complete() == path and not saver.is_pending and not saver.is_writing
    assert {f.name: f.read_bytes() for f in path.iterdir()} == {f.name: f.read_bytes() for f in plain.iterdir()}
    memory = {key: tensor.data_ptr() for key, tensor in saver._memory.items()}
    again = tmp_path / "run" / step_name(8)
    saver.begin(again, CONFIG, Source(weights, {"exp_avg.a": weights["blocks.3"]}), STATE)
    saver.complete()
    assert {key: tensor.data_ptr() for key, tensor in saver._memory.items()} == memory, "no new memory"
    assert open_checkpoint(again).weights()["blocks.3"].count_nonzero() == 0
    with pytest.raises(ValueError, match="no save has been begun"):
        saver.complete()


class Runtime:
    """CUDA's, as far as memory of the host is locked with it."""

    def __init__(self, result):
        self.result, self.locked = result, []

    def cudaHostRegister(self, pointer, size, flags):
        self.locked.append((pointer, size, flags))
        return self.result


@pytest.mark.parametrize("result", [0, 2])
def test_pages_are_locked_to_the_byte(tmp_path, monkeypatch, caplog, result):
    """Once for all saves; where the system refuses it, the save is made without."""

    def check_error(error):
        if error:
            raise RuntimeError("out of memory")

    runtime = Runtime(result)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    saver, weights = BackgroundSaver(Alone(), pin_memory=True), tensors()
    for step in (7, 8):
        saver.begin(tmp_path / step_name(step), CONFIG, Source(weights, {"exp_avg.a": weights["blocks.3"]}), STATE)
        saver.complete()
    size = sum(tensor.nbytes for tensor in (*weights.values(), weights["blocks.3"]))
    [(pointer, locked, _)] = runtime.locked
    assert locked == size
    ends = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in saver._memory.values()]
    assert min(ends)[0] == pointer and max(ends)[1] == pointer + size
    assert ("cannot lock 0.0 GB of host memory" in caplog.text) == bool(result)
    assert torch.equal(open_checkpoint(tmp_path / step_name(8)).weights()["blocks.3"], weights["blocks.3"])


def test_a_thread_copies(tmp_path, monkeypatch):
    may_copy, copied_by, copy = threading.Event(), set(), background._copy

    def slow(parts):
        copied_by.add(threading.current_thread().name)
        assert may_copy.wait(LIMIT)
        copy(parts)

    monkeypatch.setattr(background, "_copy", slow)
    saver = begun(tmp_path / step_name(1), tensors())
    waiting = threading.Thread(target=saver.wait_for_copies)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive(), "the state would change while it is copied"
    may_copy.set()
    waiting.join(LIMIT)
    assert not waiting.is_alive() and copied_by == {"checkpoint-writer"}
    saver.complete()
    saver.wait_for_copies()


def test_a_copy_that_fails_is_said_when_the_save_is_completed(tmp_path, monkeypatch):
    def failing(_):
        raise MemoryError("no host memory")

    monkeypatch.setattr(background, "_copy", failing)
    saver = begun(tmp_path / step_name(7), tensors())
    saver.wait_for_copies()
    with pytest.raises(UserError, match=r"cannot save .*rank 0, copying the state: MemoryError: no host memory"):
        saver.complete()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["write", "close"])
def test_a_full_disk_is_said_when_the_save_is_completed(tmp_path, monkeypatch, step):
    def failing(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorWriter, step, failing)
    saver = begun(tmp_path / step_name(7), tensors())
    with pytest.raises(UserError, match=r"cannot save .*step_00000007: rank 0, .*safetensors: .*No space left.*free"):
        saver.complete()
    assert list(tmp_path.iterdir()) == [] and not saver.is_pending


def test_a_save_that_is_dropped_leaves_nothing(tmp_path):
    saver = begun(tmp_path / step_name(7), tensors())
    saver.cancel()
    assert list(tmp_path.iterdir()) == [] and not saver.is_pending
    saver.cancel()


def test_old_checkpoints_go_beside_training(tmp_path, monkeypatch, caplog):
    """The caller does not wait; whoever ends the run does; a disk that refuses is said, and the rest still goes."""
    saver, may_go = BackgroundSaver(Alone()), threading.Event()
    removed = shutil.rmtree

    def slow(path, **options):
        if path.suffix != ".old":
            return removed(path, **options)
        assert may_go.wait(LIMIT)
        if path.name == ".step_00000001.old":
            raise OSError(30, "Read-only file system")
        removed(path)

    for step in (1, 2, 3):
        write_checkpoint(tmp_path / step_name(step), CONFIG, tensors())
    point_latest(tmp_path / step_name(3))
    monkeypatch.setattr(shutil, "rmtree", slow)
    saver.prune(tmp_path, 1)
    doomed = [tmp_path / f".{step_name(step)}.old" for step in (1, 2)]
    assert all(path.exists() for path in doomed), "the caller has waited"
    assert [path.name for path in tmp_path.glob("step_*")] == [step_name(3)]
    # another save goes on while they are there, but does not write before they are gone
    write, gone = TensorWriter.write, []

    def noting(self, name, tensor):
        gone.append(not doomed[1].exists())
        write(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", noting)
    saver.begin(tmp_path / step_name(4), CONFIG, Source(tensors(), {}), STATE)
    saver.wait_for_copies()
    may_go.set()
    saver.complete()
    assert gone and all(gone)
    saver.cancel()
    assert [path.exists() for path in doomed] == [True, False]
    assert "cannot remove the old checkpoint" in caplog.text and ".step_00000001.old" in caplog.text
    assert "Read-only" in caplog.text
