"""Places from a launcher's environment, and the launcher for one machine: signals, exit codes, nothing left behind."""

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from megameta.cluster import launch
from megameta.cluster.launch import free_port, launch_local, make_topology, pick_device, ranks_from_environment
from megameta.errors import EXIT_LOST, MachineError, UserError
from tests.support.paths import ROOT
from tests.support.waiting import LIMIT, wait_until

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (3, 4, 1)),
        (SRUN, (5, 8, 2)),
        ({**SRUN, **TORCHRUN}, (3, 4, 1)),  # torchrun under srun
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0)),  # in sbatch's script, no step
        ({"WORLD_SIZE": "4"}, (0, 1, 0)),
    ],
)
def test_places(environment, expected):
    assert ranks_from_environment(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}, {**TORCHRUN, "LOCAL_RANK": "x"}, {**SRUN, "SLURM_NTASKS": ""}],
)
def test_half_an_environment_is_refused(environment):
    with pytest.raises(UserError, match=r"variables .* are not all set to numbers"):
        ranks_from_environment(environment)


def test_topology():
    topology = make_topology("cpu", environment=TORCHRUN)
    assert (topology.world_size, topology.rank, topology.local_rank, topology.device) == (4, 3, 1, "cpu")
    assert (topology.data_parallel_size, topology.data_parallel_rank) == (4, 3)
    assert not topology.is_main and topology.device_type == "cpu"
    parallel = make_topology("cpu", tensor_parallel_size=2, environment=SRUN)
    assert (parallel.data_parallel_size, parallel.data_parallel_rank) == (4, 2)
    with pytest.raises(UserError, match=r"8 process\(es\) .* 3 × parallel.pipeline_parallel_size 1 ranks"):
        make_topology("cpu", tensor_parallel_size=3, environment=SRUN)
    assert make_topology("cpu", environment={}).is_main


def test_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == "cpu"
    with pytest.raises(UserError, match=r"run\.device=cpu"):
        pick_device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert pick_device("auto") == "cuda" and pick_device("cpu") == "cpu"
    with pytest.raises(MachineError, match=r"node .*: rank 3 is number 1 on this machine, .* sees 1 GPU"):
        make_topology("cuda", environment=TORCHRUN)


def test_a_node_of_a_job_with_gpus_does_not_go_on_without_them(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    granted = {**SRUN, "SLURM_GPUS_ON_NODE": "8", "SLURMD_NODENAME": "n7"}
    with pytest.raises(UserError, match=r"node n7: SLURM gave 8 GPU\(s\)"):
        pick_device("auto", granted)
    assert pick_device("cpu", granted) == pick_device("auto", {**granted, "SLURM_GPUS_ON_NODE": "0"}) == "cpu"


def test_a_rank_whose_gpu_is_missing_says_so_itself(tmp_path):
    """No other rank of its machine has that fault, and no process group is there yet to ask who may speak."""
    (tmp_path / "a.yaml").write_text("data: {train: x}\n")
    code = (
        "import torch; torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1;"
        f"from megameta.train.run import train; train({str(tmp_path / 'a.yaml')!r}, [])"
    )
    environment = {**os.environ, **TORCHRUN, "SLURMD_NODENAME": "n7"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 1 and done.stderr.count("error: node n7: rank 3 is number 1") == 1, done


def test_a_full_disk_is_one_message(tmp_path):
    (tmp_path / "a.yaml").write_text("{data: {train: x}, run: {device: cpu}, train: {num_steps: 5000}}\n")
    code = (
        "import errno; from megameta.train import run\n"
        "def full(*_): raise OSError(errno.ENOSPC, 'No space left on device', 'runs/a/.lock')\n"
        f"run.open_run = full; run.train({str(tmp_path / 'a.yaml')!r}, [])"
    )
    environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stderr.count("Traceback")) == (1, 0), done
    assert (
        "error: runs/a/.lock: No space left on device; free space, or set run.dir to a place that can be written"
        in done.stderr
    )


def test_ranks_that_do_not_connect_end_with_a_message():
    code = (
        "import time; from megameta.cluster import launch; from megameta.parallel.topology import Topology\n"
        "with launch._within(3600, Topology(4, 2, 0)): pass\n"
        "with launch._within(0.5, Topology(4, 2, 0)): time.sleep(1_000_000)"
    )
    environment = {**os.environ, "SLURMD_NODENAME": "n2"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == EXIT_LOST and "node n2, rank 2: all 4 ranks have come, but" in done.stderr, done


def test_free_port_is_free():
    assert 1024 <= free_port() < 65536


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package megameta of one file, so that a rank does what the test wants and starts at once."""

    def write(body):
        (tmp_path / "megameta").mkdir()
        (tmp_path / "megameta" / "__init__.py").write_text("")
        head = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
        (tmp_path / "megameta" / "__main__.py").write_text(head + textwrap.dedent(body))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return write


def children():
    return {p.pid for p in psutil.Process().children(recursive=True)}


def test_ranks_get_their_places_and_arguments(stand_in):
    folder = stand_in("""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        open(f"out{rank}", "w").write(" ".join([*(os.environ[n] for n in names), *sys.argv[1:]]))
    """)
    assert launch_local(["train", "x.yaml", "a.b=c d"], 2) == 0
    first, second = ((folder / f"out{rank}").read_text().split(" ", 5) for rank in (0, 1))
    assert first[:4] == ["0", "0", "2", "127.0.0.1"] and second[:4] == ["1", "1", "2", "127.0.0.1"]
    assert first[4:] == second[4:] and first[5] == "train x.yaml a.b=c d"


@pytest.mark.parametrize(
    ("code", "expected"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("sys.exit(75)", 75)]
)
def test_the_first_failure_is_the_code_and_stragglers_are_ended(stand_in, monkeypatch, code, expected):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    before = children()
    stand_in(f"""
        if rank == 1:
            {code}
        time.sleep(1_000_000)
    """)
    assert launch_local([], 3) == expected
    assert children() == before


def test_a_killed_rank_cannot_say_so_and_the_launcher_does(stand_in, monkeypatch, capfd):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    stand_in("""
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1_000_000)
    """)
    assert launch_local([], 3) == 137
    said = capfd.readouterr().err
    assert said.startswith("error: rank 1 was ended by SIGKILL (if nobody did that, memory may have run out")
    assert said.count("error: ") == 1 and "start the run again" in said, "nothing of those that the launcher ended"


def test_others_may_end_by_themselves_within_the_grace(stand_in, monkeypatch):
    """Rank 0 saves a while after the launcher has seen the other one's end: its process is reaped then."""
    monkeypatch.setattr(launch, "GRACE_SECONDS", LIMIT)
    folder = stand_in("""
        if rank == 1:
            open("pid.writing", "w").write(str(os.getpid()))
            os.rename("pid.writing", "pid")
            sys.exit(4)
        while not os.path.exists("pid") or os.path.exists("/proc/" + open("pid").read()):
            time.sleep(0.01)
        time.sleep(0.3)  # for a launcher that knows no grace to end it
        open("saved", "w").write("x")
    """)
    assert launch_local([], 2) == 4
    assert (folder / "saved").exists()


def test_handlers_are_put_back(stand_in):
    stand_in("pass")
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    assert launch_local([], 1) == 0
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_signals_reach_every_rank(stand_in):
    folder = stand_in("""
        def stop(number, frame):
            open(f"got{rank}", "a").write(f"{number} ")
            if number == signal.SIGTERM:
                sys.exit(75)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, stop)
        open(f"got{rank}", "w").close()
        open(f"ready{rank}", "w").close()
        while True:
            time.sleep(0.1)
    """)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from megameta.cluster.launch import launch_local;"
    process = subprocess.Popen([sys.executable, "-P", "-c", code + "sys.exit(launch_local([], 2))"], env=os.environ)
    try:
        wait_until(lambda: all((folder / f"ready{rank}").exists() for rank in (0, 1)), unless=process.poll)
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
            wait_until(lambda last=f"{number} ": all((folder / f"got{r}").read_text().endswith(last) for r in (0, 1)))
        assert process.wait(timeout=LIMIT) == 75
    finally:
        for member in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            member.kill()
        process.kill()
        process.wait()
    assert [(folder / f"got{rank}").read_text() for rank in (0, 1)] == ["10 2 15 "] * 2
