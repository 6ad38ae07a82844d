"""``megameta train`` as a person starts it: processes, signals, exit codes, messages."""

import functools
import json
import shutil
import signal

import psutil
import pytest
import yaml

from tests.support.commands import Command, one_error, run_command
from tests.support.runs import checkpoints, hashes, last_step, latest_step, records
from tests.support.training import tiny_values, write_corpus
from tests.support.waiting import wait_until

#: Long enough to be caught by a signal in the middle.
STEPS, INTERVAL = 110, 20


@pytest.fixture
def start(place):
    started = []

    def begin(*arguments):
        started.append(Command(place, "megameta", *arguments))
        return started[-1]

    yield begin
    for command in started:
        command.end()


def caught(start, run, step, number, *options, again=None, ranks=None):
    """A run that gets the signal after this step, and not at its end: one that was faster is started once more.

    Args:
        again: what the run directory holds at the start; default: nothing.
        ranks: its processes at that moment are put here.
    """
    while True:
        command = start("train", "run.yaml", f"run.dir={run}", *options)
        folder = command.folder / run
        wait_until(functools.partial(_at_step_or_ended, command, folder, step))
        if ranks is not None and command.poll() is None:
            ranks[:] = psutil.Process(command.pid).children()
        command.send_signal(number)
        if command.wait() != 0 and last_step(folder) < STEPS:
            return command
        shutil.rmtree(folder)
        if again is not None:
            shutil.copytree(again, folder)


def _at_step_or_ended(command, folder, step):
    return last_step(folder) >= step or command.poll() is not None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus, run.yaml, and the run ``whole`` that nothing interrupts."""
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "text")
    values = tiny_values(
        "text",
        data__valid="text",
        train__num_steps=STEPS,
        checkpoint__interval=INTERVAL,
        eval__interval=70,
        eval__num_samples=4,
        train__peak_tflops=1.0,
        log__interval=50,
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    overrides = ("run.dir=whole", "log.tensorboard=true", "train.peak_tflops=")
    run_command(folder, "megameta", "train", "run.yaml", *overrides, check=True)
    return folder


def test_what_a_run_leaves(place):
    whole = place / "whole"
    assert checkpoints(whole) == ["latest", "step_00000100", "step_00000110"]
    assert latest_step(whole) == STEPS
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "eval" not in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert {"loss", "grad_norm", "lr", "tokens", "tokens_per_second", "mfu"} <= steps[0].keys()
    assert all(line["mfu"] > 0 and line["tokens_per_second"] > 0 for line in steps)
    assert steps[-1]["tokens"] == STEPS * 8 * 32
    assert sum(line["loss"] for line in steps[-10:]) < sum(line["loss"] for line in steps[:10]) - 10 * 0.5
    evaluations = [line for line in lines if "eval" in line]
    assert [line["step"] for line in evaluations] == [70, 110]
    assert evaluations[-1]["eval"].keys() == {"valid", "valid/no-meta"}
    assert yaml.safe_load((whole / "config.yaml").read_text())["train"]["num_steps"] == STEPS
    assert any((whole / "tensorboard").iterdir()) and (whole / "logs" / "rank_0.log").read_text()


@pytest.mark.slow
def test_signals_and_a_kill_then_the_same_numbers(place, start):
    """SIGTERM, kill -9, and a start to the end, all in one directory; then a start of the complete run."""
    cut = place / "cut"
    command = caught(start, "cut", 7, signal.SIGTERM)
    assert command.wait() == 75, command.said
    assert 7 <= latest_step(cut) == last_step(cut) < STEPS
    assert "start it again to go on" in command.said
    shutil.copytree(cut, place / "stopped")
    command = caught(start, "cut", 66, signal.SIGKILL, again=place / "stopped")
    assert command.wait() == -signal.SIGKILL, command.said
    saved = latest_step(cut)
    assert saved % INTERVAL == 0 and saved >= 60
    with (cut / "metrics.jsonl").open("a") as file:  # what a kill in the middle of a line leaves
        file.write('{"step": 9999, "lo')
    command = start("train", "run.yaml", "run.dir=cut")
    assert command.wait() == 0, command.said
    assert records(cut) == records(place / "whole")
    assert hashes(cut) == hashes(place / "whole")
    assert checkpoints(cut) == checkpoints(place / "whole")
    command = start("train", "run.yaml", "run.dir=cut")
    assert command.wait() == 0
    assert "complete at step 110" in command.said
    assert records(cut) == records(place / "whole")


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(place, start):
    ranks = []
    pair = caught(start, "pair", 25, signal.SIGTERM, "--nproc-per-node", "2", ranks=ranks)
    assert len(ranks) == 2
    assert pair.wait() == 75, pair.said
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    again = start("train", "run.yaml", "run.dir=pair", "--nproc-per-node", "2")
    assert again.wait() == 0, again.said
    # The samples of a step are those of one process (test_resume_exact compares two with two, bitwise).
    two, one = (
        [line for line in records(place / name) if "eval" not in line and line["step"] <= 60]
        for name in ("pair", "whole")
    )
    assert [line["targets"] for line in two] == [line["targets"] for line in one]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)


@pytest.mark.slow
def test_a_directory_in_use_is_refused_and_a_changed_key_too(place, start):
    first = start("train", "run.yaml", "run.dir=busy", "train.num_steps=100000")
    first.wait_for_step("busy", 1)
    second = start("train", "run.yaml", "run.dir=busy", "train.num_steps=100000")
    assert second.wait() == 1
    assert "busy: another run is using this directory" in one_error(second.said)
    first.send_signal(signal.SIGUSR1)
    assert first.wait() == 75, first.said
    changed = start("train", "run.yaml", "run.dir=busy", "optimizer.lr=0.5", "model.num_layers=3", "train.num_steps=9")
    assert changed.wait() == 1
    message = one_error(changed.said)
    assert "optimizer.lr: 0.002 in the checkpoint, 0.5 now" in message
    assert "model.num_layers: 2 in the checkpoint, 3 now" in message
    assert "num_steps" not in message and "init.from_checkpoint" in message


@pytest.mark.slow
def test_a_new_run_from_weights_alone_with_batches_passed_over(place, start):
    command = start(
        *("train", "run.yaml", "run.dir=tuned", "init.from_checkpoint=whole", "train.num_steps=6"),
        *("data.skip=[[2,4],[0,1]]", "optimizer.lr=1e-5", "optimizer.min_lr=1e-6", "checkpoint.interval=2"),
        *("checkpoint.keep=1", "optimizer.warmup_steps=1"),
    )
    assert command.wait() == 0, command.said
    steps = [line for line in records(place / "tuned") if "eval" not in line]
    assert [line["batch"] for line in steps] == [1, 4, 5, 6, 7, 8]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[0]["tokens"] == 256 and steps[0]["lr"] == 1e-5
    end = [line["loss"] for line in records(place / "whole") if "eval" not in line][-10:]
    assert steps[0]["loss"] < max(end) + 0.5, "it did not start from the weights"
    assert checkpoints(place / "tuned") == ["latest", "step_00000006"]
    # Goes on with allowed changes: longer, other intervals, another stage, more batches passed over.
    command = start(
        *("train", "run.yaml", "run.dir=tuned", "init.from_checkpoint=whole", "train.num_steps=9"),
        *("data.skip=[[2,4],[0,1],[8,20],[21,22]]", "optimizer.lr=1e-5", "optimizer.min_lr=2e-6"),
        *("optimizer.warmup_steps=1", "parallel.zero_stage=2", "train.micro_batch_size=4", "eval.interval=3"),
    )
    assert command.wait() == 0, command.said
    steps = [line for line in records(place / "tuned") if "eval" not in line]
    assert [line["batch"] for line in steps] == [1, 4, 5, 6, 7, 8, 20, 22, 23]
    assert steps[-1]["lr"] == pytest.approx(2e-6)


@pytest.mark.slow
def test_mistakes_get_one_message(place, start):
    """All at once, as each takes a start."""
    write_corpus(place / "odd", odd_token=59)
    shutil.copytree(place / "whole", place / "damaged")
    target = place / "damaged" / "checkpoints" / "step_00000110" / "optimizer-00001-of-00001.safetensors"
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    (place / "typo.yaml").write_text("run: {device: cpu}\ntrain:\n  num_step: 5\n")
    two = ("--nproc-per-node", "2")
    cases = [
        (("train", "typo.yaml", *two), ["typo.yaml", "line 3", "train.num_step", "train.num_steps?"]),
        (("train", "run.yaml", "run.dir=bad", "train.micro_batch_size=3", *two), ["global_batch_size 8", "3 × 2"]),
        (("train", "run.yaml", "run.dir=bad", "data.train=nowhere"), ["there is no dataset nowhere"]),
        (("train", "run.yaml", "run.dir=damaged"), ["step_00000110/optimizer-0000", "SHA-256", "older"]),
        (("train", "run.yaml", "run.dir=bad2", "model.vocab_size=50", "model.meta_token_id=49"), ["vocab_size is 50"]),
        # One rank alone meets it; the other one's broken collective is not what the person has to hear of.
        (
            (
                "train",
                "run.yaml",
                "run.dir=bad3",
                "data.train=odd",
                "model.vocab_size=59",
                "model.meta_token_id=58",
                *two,
            ),
            ["holds token 59", "vocab_size is 59", "data.skip=[["],
        ),
        (("train", "absent.yaml"), ["cannot read the configuration absent.yaml"]),
    ]
    for first in range(0, len(cases), 3):
        running = [(start(*arguments), words) for arguments, words in cases[first : first + 3]]
        for command, words in running:
            assert command.wait() == 1, command.said
            message = one_error(command.said)
            for word in words:
                assert word in message
    assert not (place / "bad" / "metrics.jsonl").exists()
