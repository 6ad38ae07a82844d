"""Orders on disk: whole or absent, made again when they are damaged, one maker at a time."""

import fcntl
import multiprocessing
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from megameta.corpus.indexed_writer import IndexedDatasetWriter
from megameta.data.index_cache import IndexCache, digest
from megameta.data.samples import Corpus, DocumentSamples, SampleIndex
from tests.support.paths import ROOT
from tests.support.waiting import LIMIT, wait_until


class Maker:
    def __init__(self, *arrays):
        self.arrays, self.calls = arrays, 0

    def __call__(self):
        self.calls += 1
        return {f"x{i}": array for i, array in enumerate(self.arrays)}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_made_once_and_read_after(tmp_path):
    make = Maker(np.arange(10), np.arange(5, dtype=np.int32))
    for _ in range(3):
        found = IndexCache(tmp_path / "c").get("f", 0, make)
        assert found["x0"].tolist() == list(range(10)) and found["x1"].dtype == np.int32
    assert make.calls == 1
    assert files(tmp_path / "c") == ["f-0/index.json", "f-0/x0.npy", "f-0/x1.npy", "f.lock"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "index", "empty", "other"])
def test_damage_is_noticed(damage, tmp_path):
    make = Maker(np.arange(1000))
    IndexCache(tmp_path).get("f", 0, make)
    array, index = tmp_path / "f-0" / "x0.npy", tmp_path / "f-0" / "index.json"
    if damage == "flip":
        content = bytearray(array.read_bytes())
        content[-100] ^= 1
        array.write_bytes(content)
    elif damage == "truncate":
        array.write_bytes(array.read_bytes()[:-8])
    elif damage == "remove":
        array.unlink()
    elif damage == "other":
        np.save(array, np.arange(999))
    else:
        index.write_text("{" if damage == "index" else "")
    assert IndexCache(tmp_path).get("f", 0, make)["x0"].tolist() == list(range(1000))
    assert make.calls == 2
    IndexCache(tmp_path).get("f", 0, make)
    assert make.calls == 2  # and it was mended


def test_only_the_last_two_epochs_stay(tmp_path):
    cache = IndexCache(tmp_path)
    for number in range(5):
        cache.get("f", number, Maker(np.arange(3)))
    cache.get("other", 0, Maker(np.arange(3)))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["f-3", "f-4", "other-0"]


def test_a_place_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache, make = IndexCache(tmp_path / "file" / "c"), Maker(np.arange(3))
    for _ in range(2):
        assert cache.get("f", 0, make)["x0"].tolist() == [0, 1, 2]
    assert make.calls == 2 and len([r for r in caplog.records if "is not kept there" in r.message]) == 1


def test_a_failure_leaves_nothing(tmp_path):
    def make():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        IndexCache(tmp_path).get("f", 0, make)
    assert files(tmp_path) == ["f.lock"]


MANY = 12


def _start(folder, locks, queue):
    """Says that it is about to ask for the lock; whoever makes the order does so when all have said that."""
    flock = fcntl.flock if locks else _no_locks

    def asking(file, operation):
        (folder / f"asked-{os.getpid()}").touch()
        flock(file, operation)

    def make():
        (folder / f"made-{os.getpid()}").touch()
        wait_until(lambda: len(list(folder.glob("asked-*"))) == MANY or len(list(folder.glob("made-*"))) > 1)
        if not locks:
            wait_until(lambda: len(list(folder.glob("made-*"))) == MANY)
        return {"x0": np.arange(100_000)}

    fcntl.flock = asking
    queue.put(int(IndexCache(folder / "c").get("f", 0, make)["x0"].sum()))


@pytest.mark.parametrize("locks", [True, False])
def test_many_start_together(locks, tmp_path):
    """With locks one of them makes the order; without, each does, and all read a whole one."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_start, args=(tmp_path, locks, queue)) for _ in range(MANY)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=LIMIT) for _ in processes]
    for process in processes:
        process.join(timeout=LIMIT)
        assert process.exitcode == 0
    assert set(results) == {sum(range(100_000))}
    assert len(list(tmp_path.glob("made-*"))) == (1 if locks else MANY)
    assert not list((tmp_path / "c").glob("*.tmp-*"))


def _no_locks(*_):
    raise OSError(95, "Operation not supported")


def test_a_killed_maker_holds_nobody_up(tmp_path):
    script = f"""
        import os, signal
        import numpy as np
        from megameta.data.index_cache import IndexCache

        def make():
            os.kill(os.getpid(), signal.SIGKILL)

        IndexCache({str(tmp_path)!r}).get("f", 0, make)
    """
    root = str(ROOT)
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": root},
        timeout=LIMIT,
        check=False,
    )
    assert process.returncode == -9
    assert IndexCache(tmp_path).get("f", 0, Maker(np.arange(3)))["x0"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", [SampleIndex, DocumentSamples])
def test_the_same_samples_with_a_cache_and_without(kind, tmp_path):
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        for length in (30, 1, 0, 55, 17, 200):
            writer.add_document(np.arange(length))
    corpus = Corpus([str(tmp_path / "d")])
    plain = kind(corpus, 9, 5)
    for _ in range(2):  # written, then read
        kept = kind(corpus, 9, 5, IndexCache(tmp_path / "cache", min_entries=1))
        for index in range(3 * plain.samples_per_epoch):
            assert kept.text(index).token_L.tolist() == plain.text(index).token_L.tolist()
    assert len(list((tmp_path / "cache").glob("*.lock"))) == 1
    kind(corpus, 9, 6, IndexCache(tmp_path / "cache", min_entries=1)).text(0)  # another seed, another order
    assert len(list((tmp_path / "cache").glob("*.lock"))) == 2


def test_a_digest_is_of_content():
    assert digest(np.arange(3)) == digest(np.arange(6)[:3]) == digest(np.arange(0, 6, 2) // 2)
    different = [
        digest(np.arange(3)),
        digest(np.arange(4)),
        digest(np.arange(3, dtype=np.int32)),
        digest(np.arange(3), 1),
    ]
    assert len(set(different)) == 4
