"""The kit's forked processes: nothing of a test reaches the next one, and a command is what a person starts."""

import os
import random
import signal
import subprocess
import sys
import threading

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.support.commands import Command, plain_environment, run_command, true_process
from tests.support.forking import Forked
from tests.support.paths import ROOT
from tests.support.ranks import RankError, run_ranks
from tests.support.runs import last_step
from tests.support.server import CORE
from tests.support.training import step_loader, take_steps, tiny_config, weights_digest
from tests.support.waiting import wait_until

SEED = 5


def _train(topology, corpus):
    """What a test could leave behind, as it is found; then three steps at ZeRO 3, which patches torch's functions."""
    from megameta.engine.pipeline_engine import make_engine

    found = {
        "linear": torch.nn.functional.linear.__module__,
        "precision": str(torch.get_default_dtype()),
        "seeded": (torch.initial_seed() == SEED, random.random() == random.Random(SEED).random()),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "variables": sorted(os.environ.items() - {("MASTER_PORT", os.environ["MASTER_PORT"])}),
        "directory": os.getcwd(),
        "groups": dist.get_world_size(),
    }
    config = tiny_config(corpus, parallel__zero_stage=3)
    engine, loader = make_engine(config, topology), step_loader(config, topology)
    losses = [result.loss for result in take_steps(engine, loader, config, 1, 3)]
    return found, losses, weights_digest(engine)


def _spoil(topology, corpus):
    """Leave behind whatever can be left, and fail."""
    _train(topology, corpus)
    os.environ["OMP_NUM_THREADS"] = "7"
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    random.seed(SEED)
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    torch.nn.functional.linear = None
    dist.new_group([0])
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    raise ValueError("a failed neighbour")


def test_a_case_first_last_and_after_a_failed_neighbour(corpus):
    first = run_ranks(_train, 2, corpus)
    with pytest.raises(RankError, match="a failed neighbour"):
        run_ranks(_spoil, 2, corpus)
    after = run_ranks(_train, 2, corpus)
    last = run_ranks(_train, 2, corpus)
    assert first == after == last and first[0][0]["seeded"] == (False, False)


def _server(topology):
    parent = psutil.Process().parent()
    return parent.pid, parent.num_threads(), CORE in sys.modules


def test_the_server_has_imported_and_has_one_thread():
    """A thread would hold locks that nobody releases in what is forked meanwhile."""
    ((one, threads, preloaded),) = run_ranks(_server, 1)
    ((again, *_),) = run_ranks(_server, 1)
    assert one == again != os.getpid()
    assert preloaded and threads == 1


SCRIPT = """
import os, sys
print(sys.argv[1:], os.getcwd(), os.environ["GIVEN"], "RANK" in os.environ, os.isatty(0), sys.stdin.read() == "")
print("to the other stream", file=sys.stderr)
sys.exit({code})
"""


@pytest.mark.parametrize(("code", "expected"), [("3", 3), ("None", 0), ("'a word'", 1), ("1 / 0", 1)])
def test_a_command_is_what_an_interpreter_would_run(tmp_path, code, expected):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(code=code))
    environment = plain_environment(GIVEN="yes")
    forked = run_command(tmp_path, str(script), "a", "--b=1", environment=environment)
    alone = true_process(sys.executable, script, "a", "--b=1", folder=tmp_path, environment=environment)
    assert forked.returncode == alone.returncode == expected
    assert forked.stdout == alone.stdout == f"['a', '--b=1'] {tmp_path} yes False False True\n"
    assert forked.stderr.splitlines()[0] == alone.stderr.splitlines()[0] == "to the other stream"
    assert ("ZeroDivisionError" in forked.stderr) == ("ZeroDivisionError" in alone.stderr) == (code == "1 / 0")
    assert alone.stderr.splitlines()[-1] == forked.stderr.splitlines()[-1]


def test_signals_reach_a_command(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, signal, sys, time\natexit.register(lambda: print('at the end'))\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('ready', flush=True)\ntime.sleep(3600)\n"
    )
    for number, expected in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        command = Command(tmp_path, str(script))
        wait_until(lambda command=command: "ready" in command.stdout, unless=command.poll)
        assert psutil.pid_exists(command.pid) and command.poll() is None
        command.send_signal(number)
        assert command.wait() == expected
        assert ("at the end" in command.stdout) == (number == signal.SIGTERM)


def test_ranks_of_a_command_are_processes_of_their_own(tmp_path):
    values = "{run: {device: cpu}, data: {train: nowhere}}"
    (tmp_path / "run.yaml").write_text(values)
    done = run_command(tmp_path, "megameta", "train", "run.yaml", "--nproc-per-node", "2")
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert last_step(tmp_path) == 0 and str(ROOT) not in done.stdout


WORDS = (
    ["-m", "megameta", "--version"],
    ["-m", "megameta", "train"],
    ["tools/quickstart.py", "--nothing"],
    ["-c", "import os, sys; print(sys.argv, os.environ['GIVEN'], os.getpgid(0) == os.getpid())"],
    ["-c", "import time; time.sleep(3600)"],
)


def _ends(topology, start, folder):
    """Code and output of each of the commands; how the last one ends when it is told to, after a wait in vain."""
    os.chdir(ROOT)
    environment, found = plain_environment(GIVEN="yes"), []
    for number, words in enumerate(WORDS):
        with open(f"{folder}/{number}", "w+") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            process = start([sys.executable, *words], env=environment, process_group=0, **streams)
            assert process.pid != os.getpid() and os.getpgid(process.pid) == process.pid
            if "sleep" in words[-1]:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.1)
                process.terminate()
            code = process.wait()
            assert process.poll() == code == process.returncode
            file.seek(0)
            found.append((code, file.read()))
    return found


def test_what_a_command_starts_is_forked_like_a_process(tmp_path):
    (forked,), (true,) = (run_ranks(_ends, 1, start, str(tmp_path)) for start in (Forked, subprocess.Popen))
    assert forked == true
    assert [code for code, _ in forked] == [0, 2, 2, 0, -signal.SIGTERM]
    assert all(said for _, said in forked[:-1])
