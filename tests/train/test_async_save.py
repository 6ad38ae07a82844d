"""checkpoint.async_save: the same checkpoints as without, published by all ranks together, nothing lost in between.

tests/checkpoint/test_background.py has what one process can show without training. Runs share starts of processes.
"""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megameta.checkpoint import TrainerState, background, latest_checkpoint, open_checkpoint, save_distributed
from megameta.checkpoint.background import BackgroundSaver
from megameta.checkpoint.tensor_file import TensorWriter
from megameta.engine.pipeline_engine import make_engine
from megameta.errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from tests.support.ranks import RankError, run_ranks
from tests.support.runs import hashes, records
from tests.support.training import step_loader, take_steps, tiny_config
from tests.support.waiting import LIMIT, wait_until

STEPS = 6


def make_trainer(corpus: str, run_dir: Path | str, topology, after_step=None, **changes):
    """A trainer that calls ``after_step(trainer)`` after each step."""
    from megameta.train.loop import Trainer

    values = {"checkpoint__interval": 2, "checkpoint__keep": 9, "checkpoint__async_save": True}
    values |= {"train__num_steps": STEPS, "train__peak_tflops": 1.0, **changes}
    trainer = Trainer(tiny_config(corpus, run__dir=str(run_dir), **values), topology)
    step = trainer._step

    def stepping():
        step()
        if after_step is not None:
            after_step(trainer)

    trainer._step = stepping
    return trainer


def run(trainer) -> int:
    code = trainer.run()
    trainer.engine.destroy()
    return code


def content(run_dir: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of every file but config.yaml (which says async_save), by checkpoint."""
    found = {}
    for path in sorted((run_dir / "checkpoints").glob("step_*")):
        files = json.loads((path / "manifest.json").read_text())["files"]
        found[path.name] = {name: entry["sha256"] for name, entry in files.items() if name != "config.yaml"}
    return found


# --- two ranks ------------------------------------------------------------------------------------------------------


def _two_ranks(topology, corpus, root):
    codes = []
    for name, asynchronous in (("sync", False), ("async", True)):
        codes.append(run(make_trainer(corpus, f"{root}/{name}", topology, checkpoint__async_save=asynchronous)))
    codes += _copied_late(topology, corpus, root)
    return codes, _published_late(topology, corpus, f"{root}/late"), _disk_fails(topology, corpus, f"{root}/full")


def _copied_late(topology, corpus, root):
    """Threads copy not before the next update is about to be made, which then has to wait."""
    trainer = make_trainer(corpus, f"{root}/late_copies", topology)
    about_to = threading.Event()
    wait, copy = trainer.engine.before_update, background._copy

    def waiting():
        about_to.set()
        wait()
        if trainer.state.step < STEPS - 1:  # no update comes after the last save
            about_to.clear()

    def copying(parts):
        for part in parts:
            assert about_to.wait(LIMIT)
            time.sleep(0.01)  # for an update that does not wait to come in between
            copy([part])

    trainer.engine.before_update, background._copy = waiting, copying
    try:
        return [run(trainer)]
    finally:
        background._copy = copy


def _published_late(topology, corpus, root):
    """Rank 1's thread takes from step 3 to step 5; what ``latest`` names after each step. Ranks hear of it in the next
    step."""
    go_on, seen, close = threading.Event(), [], TensorWriter.close

    def closing(self):
        if topology.rank == 1:
            go_on.wait(LIMIT)
        return close(self)

    def after_step(trainer):
        found = latest_checkpoint(Path(root))
        seen.append(found and found.name)
        if trainer.state.step == 5:
            go_on.set()
        if trainer.state.step == 5 or (trainer.state.step == 4 and topology.rank == 0):
            wait_until(lambda: not trainer.checkpoints.saver.is_writing)

    TensorWriter.close = closing
    try:
        changes = {"checkpoint__interval": 3, "train__num_steps": STEPS + 1}
        return run(make_trainer(corpus, root, topology, after_step, **changes)), seen
    finally:
        TensorWriter.close = close


def _disk_fails(topology, corpus, root):
    """Rank 1's disk is full from the second checkpoint on."""
    write = TensorWriter.write

    def writing(self, name, tensor):
        if topology.rank == 1 and "step_00000004" in str(self.path):
            raise OSError(28, "No space left on device")
        write(self, name, tensor)

    TensorWriter.write = writing
    trainer = make_trainer(corpus, root, topology)
    try:
        run(trainer)
    except UserError as error:
        return str(error), trainer.state.step
    return None


@pytest.fixture(scope="module")
def two(tmp_path_factory, corpus):
    root = tmp_path_factory.mktemp("two")
    return root, run_ranks(_two_ranks, 2, corpus, str(root))


def test_the_same_checkpoints_as_without(two):
    root, results = two
    assert [codes for codes, *_ in results] == [[EXIT_OK] * 3] * 2
    expected = content(root / "sync")
    assert list(expected) == [f"step_{step:08d}" for step in (2, 4, 6)]
    assert content(root / "async") == expected
    assert records(root / "async") == records(root / "sync")
    left = [path.name for path in (root / "async" / "checkpoints").iterdir()]
    assert sorted(left) == ["latest", *expected], "no working directory is left"
    assert open_checkpoint(root / "async").trainer().step == STEPS


def test_weights_wait_for_the_threads_that_copy_them(two):
    root, _ = two
    assert content(root / "late_copies") == content(root / "sync")


def test_it_counts_when_every_rank_has_written(two):
    _, results = two
    for _, (code, seen), _ in results:
        assert code == EXIT_OK
        assert seen == [None] * 6 + ["step_00000003"], "while one rank writes there is no checkpoint"


def test_a_failing_writer_is_said_on_every_rank(two):
    root, results = two
    (message,) = {message for *_, (message, _) in results}
    assert "cannot save" in message and "rank 1, " in message and ".safetensors: " in message
    assert "No space left" in message and "free space" in message and "earlier checkpoints are untouched" in message
    assert len({step for *_, (_, step) in results}) == 1, "at the same step"
    assert open_checkpoint(root / "full").trainer().step == 2
    assert not list((root / "full" / "checkpoints").glob(".*")), "nothing half written is left"


# --- every layout: parts put together by threads, against the tensors that DeepSpeed's collectives gather ------------

UNTIED = {"model__tie_embeddings": False}
SEQUENCE = {"parallel__sequence_parallel": True}
#: World size, and its layouts: (tensor, pipeline, ZeRO, changes). Not all parameters divide by 2, 3 or 4 ranks; the
#: vocabulary (61 entries) is padded, and the second of two tensor-parallel ranks has none of it. ZeRO 3 has processes
#: of its own: it leaves a linear of its own in torch's place.
LAYOUTS: list[tuple[int, list[tuple[int, int, int, dict]]]] = [
    (1, [(1, 1, 0, {}), (1, 1, 1, {})]),
    (2, [(1, 1, 0, {}), (2, 1, 0, {}), (1, 2, 1, {}), (1, 1, 2, {})]),
    (3, [(1, 1, 1, {})]),
    (3, [(1, 1, 3, {})]),
    (4, [(2, 1, 0, UNTIED), (2, 1, 1, SEQUENCE), (1, 2, 1, {}), (2, 2, 1, UNTIED)]),
    (4, [(2, 1, 3, {})]),
]


def _saved_both_ways(topology, corpus, root, layouts):
    """Two steps under each layout, and the state saved by ``save_distributed`` and twice by threads."""
    group = dist.new_group(backend="gloo") if topology.world_size > 1 else None
    for number, (tensor, pipeline, zero, changes) in enumerate(layouts):
        place = dataclasses.replace(topology, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
        values = {"parallel__tensor_parallel_size": tensor, "parallel__pipeline_parallel_size": pipeline}
        values |= {"parallel__zero_stage": zero, "train__global_batch_size": 12, **changes}
        config = tiny_config(corpus, **values)
        engine = make_engine(config, place)
        loader = step_loader(config, place)
        take_steps(engine, loader, config, 1, 2)
        state = TrainerState(2, 2, 0, 0, engine.state.optimizer_step)
        save_distributed(Path(root, f"{number}-sync"), config, engine.state, state, place)
        saver = BackgroundSaver(place, group)
        for again in range(2):
            saver.begin(Path(root, f"{number}-async{again}"), config, engine.state, state)
            saver.complete()
        loader.close()
        engine.destroy()


@pytest.mark.parametrize(("world_size", "layouts"), LAYOUTS)
def test_every_layout_saves_the_same_files(tmp_path, corpus, world_size, layouts):
    run_ranks(_saved_both_ways, world_size, corpus, str(tmp_path), layouts)
    for number, layout in enumerate(layouts):
        expected, *others = ({f.name: f.read_bytes() for f in path.iterdir()} for path in folders(tmp_path, number))
        assert len(others) == 2 and all(found == expected for found in others), layout
        moments = open_checkpoint(tmp_path / f"{number}-sync").moments()
        assert moments and all(tensor.count_nonzero() for tensor in moments.values())


def folders(root: Path, number: int) -> list[Path]:
    return [root / f"{number}-{kind}" for kind in ("sync", "async0", "async1")]


# --- one rank: stopped, killed, and gone on -------------------------------------------------------------------------


def _stopped_and_killed(topology, corpus, root):
    """A run that is stopped after step 3; another that is killed when the files of step 4 are written."""
    complete = BackgroundSaver.complete

    def stop(trainer):
        if trainer.state.step == 3:
            trainer.stop.request(signal.SIGTERM, None)

    def completing(self):
        if "killed" in str(self._save.path) and "step_00000004" in str(self._save.path):
            self._save.writer.join()  # everything is written, nothing published
            os.kill(os.getpid(), signal.SIGKILL)
        return complete(self)

    code = run(make_trainer(corpus, f"{root}/stopped", topology, stop))
    Path(root, "code").write_text(str(code))
    BackgroundSaver.complete = completing
    run(make_trainer(corpus, f"{root}/killed", topology))


def _gone_on(topology, corpus, root):
    return [run(make_trainer(corpus, f"{root}/{name}", topology)) for name in ("killed", "stopped", "whole")]


def test_a_kill_between_copy_and_publication(tmp_path, corpus):
    root = str(tmp_path)
    stopped, killed, whole = (tmp_path / name for name in ("stopped", "killed", "whole"))
    with pytest.raises(RankError, match="-9"):
        run_ranks(_stopped_and_killed, 1, corpus, root)
    assert int((tmp_path / "code").read_text()) == EXIT_INTERRUPTED
    assert open_checkpoint(stopped).trainer().step == 3, "a stop waits for its save"
    assert open_checkpoint(killed).trainer().step == 2, "the older one is the newest whole one"
    assert list((killed / "checkpoints").glob(".step_00000004*.writing")), "the other had been written"
    assert run_ranks(_gone_on, 1, corpus, root) == [[EXIT_OK] * 3]
    for other in (killed, stopped):
        assert records(other) == records(whole) and hashes(other) == hashes(whole)
        assert not list((other / "checkpoints").glob(".*")), "what the killed start left is gone"
