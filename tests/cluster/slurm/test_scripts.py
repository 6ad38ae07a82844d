"""The batch scripts, submit's options, fitting a run to nodes, and what SLURM's variables mean."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megameta.__main__ import main
from megameta.cluster.launch import make_topology, set_rendezvous
from megameta.cluster.slurm.environment import expand_hosts, one_device_each, rendezvous
from megameta.cluster.slurm.fit import fit, fit_exactly, granted
from megameta.cluster.slurm.script import FILES, Options, render
from megameta.cluster.slurm.submit import further_options, job_name, seconds_of
from megameta.config.validate import problems
from megameta.errors import UserError
from megameta.parallel.topology import Topology
from tests.support.paths import ROOT
from tests.support.training import tiny_config


@pytest.mark.parametrize("command", FILES)
def test_the_scripts_are_those_that_submit_writes(command):
    assert (ROOT / "slurm" / FILES[command]).read_text() == render(Options(command=command))


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").iterdir()), ids=lambda path: path.name)
def test_the_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "--gres" not in path.read_text()


@pytest.mark.parametrize("command", FILES)
def test_a_warning_that_comes_early_does_not_end_the_script(command, tmp_path):
    """In the minute in which Python reads the configuration; SLURM would not requeue a job that dies of it."""
    stub = tmp_path / "python"
    stub.write_text(
        "#!/bin/bash\n"
        'case "$4" in fit) kill -USR1 $PPID; kill -TERM $PPID; printf "1\\nrun\\n";; run) echo "$*";; esac\n'
    )
    stub.chmod(0o755)
    (tmp_path / "env.sh").write_text(f'export PATH="{tmp_path}:$PATH"\n')
    environment = {**os.environ, "MEGAMETA_ENV": str(tmp_path / "env.sh"), "SLURM_CPUS_PER_TASK": "1"}
    words = ["bash", str(ROOT / "slurm" / FILES[command]), "a.yaml"]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done
    assert done.stdout.startswith("-m megameta slurm run run srun --nodes=1"), done.stdout


@pytest.mark.parametrize("command", FILES)
def test_a_rank_listens_before_it_imports_torch(command):
    """The warning may come while the ranks start."""
    code = f"""
import os, signal, sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGUSR1)
sys.meta_path.insert(0, Hook())
from megameta.__main__ import main
main([{command!r}, "nowhere.yaml"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr.count("error:")) == (1, 1), done


def test_options_reach_the_script():
    more = {"partition": "gpu", "comment": None}
    text = render(
        Options(nodes=4, min_nodes=2, chain=True, exclusive=False, warning=90, arguments=("a.yaml",), more=more)
    )
    for wanted in (
        "--nodes=2-4",
        "--signal=B:USR1@90",
        "--partition=gpu",
        "--comment\n",
        "slurm run --chain",
        "set -- a.yaml",
    ):
        assert wanted in text
    assert "--exclusive" not in text and "--ntasks-per-node=8" in text
    assert "#SBATCH --ntasks-per-node" not in render(Options(nodes=4, min_nodes=2, gpus_per_node=1))
    assert "#SBATCH --ntasks-per-node=1" in render(Options(nodes=4, gpus_per_node=1))


def test_submit_shows_the_layout_and_quotes(tmp_path, capsys, monkeypatch):
    config = ROOT / "configs" / "paper" / "meta-rope.yaml"
    monkeypatch.chdir(tmp_path)
    odd = "run.dir=it's $HOME; rm -rf x"
    with pytest.raises(SystemExit) as ended:
        main(["slurm", "submit", str(config), odd, "--nodes", "4", "--min-nodes", "2", "--chain", "3", "--dry-run"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "32 ranks = pipeline 1 × data 32 × tensor 1" in out and "micro_batch_size 5 in place of 12" in out
    assert "on 3 node(s), should there be no more: micro-batch 10" in out  # 480 / 24 = 20 = 2 × 10
    assert "--dependency=singleton" in out and f"set -- {config} {shlex.quote(odd)}" in out
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "0"], "at least 1"),
        (["--nodes", "2", "--min-nodes", "3"], "between 1 and --nodes 2"),
        (["--nodes", "2", "--time", "soon"], "24:00:00"),
        (["--nodes", "7"], "56 ranks on 7 node"),  # 480 sequences do not divide by 56
        (["--nodes", "1", "--sbatch", "; rm"], "mail-type=END"),
        (["--nodes", "1", "--sbatch", "job-name=x"], "use --name"),
        (["--nodes", "1", "--time", "5"], "limit of 300 s"),  # it would be warned as soon as it begins
        (["--nodes", "1", "--warning", "0"], "one second"),
        (["--nodes", "1", "run.dir=50%j"], "%"),
    ],
)
def test_submit_refuses(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["slurm", "submit", str(ROOT / "configs/paper/meta-rope.yaml"), *words, "--dry-run"])
    assert ended.value.code == 1 and said in capsys.readouterr().err


def dry_run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["slurm", "submit", str(ROOT / "configs/paper/meta-rope.yaml"), "--nodes", "4", *words, "--dry-run"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_a_chain_keeps_its_name_and_what_it_waits_for(capsys):
    out = dry_run(capsys, "run.dir=a/b", "--chain", "2", "--name", "mine", "--sbatch", "dependency=afterok:5")
    assert "--dependency=afterok:5,singleton\n" in out and f"--job-name={job_name(Path('a/b'), 'mine')}\n" in out
    alone = dry_run(capsys, "--name", "mine", "--sbatch", "dependency=afterok:5")
    assert "--dependency=afterok:5\n" in alone and "--job-name=mine\n" in alone


def test_the_environment_is_a_file_by_its_whole_path(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MEGAMETA_ENV", str(tmp_path / "other.sh"))
    mine = tmp_path / "my env.sh"
    assert "not there yet: " + str(mine) in dry_run(capsys, "--env", str(mine))
    mine.touch()
    out = dry_run(capsys, "--env", str(mine))
    assert f"source '{mine}'\n" in out and "not there yet: /" not in out
    assert f"source {tmp_path / 'other.sh'}\n" in dry_run(capsys)
    with pytest.raises(SystemExit):
        main(["slurm", "submit", str(ROOT / "configs/paper/meta-rope.yaml"), f"run.dir={tmp_path}/r", "--nodes", "4"])
    assert "copy slurm/env.sh" in capsys.readouterr().err and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("1-12", 129600), ("1-2:03:04", 93784), ("1-0:30", 88200)],
)
def test_time_limits(text, seconds):
    assert seconds_of(text) == seconds and seconds_of(text + "x") is None


def test_further_options_and_names(tmp_path):
    assert further_options(["--mail-type=END", "licenses=a,b", "wait"]) == {
        **{"mail-type": "END", "licenses": "a,b"},
        "wait": None,
    }
    names = {job_name(tmp_path / "a b"), job_name(tmp_path / "a-b"), job_name(tmp_path / "c" / "a b")}
    assert len(names) == 3 and all(name.startswith("megameta-a-b-") for name in names)


def test_fewer_nodes_keep_the_global_batch():
    """Against brute force over micro-batches and nodes."""
    config = tiny_config("x", train__global_batch_size=24, train__micro_batch_size=6)
    for nodes in range(1, 9):
        expected = None
        for used in range(nodes, 0, -1):
            sizes = [m for m in range(1, 7) if 24 % (m * used * 2) == 0]
            if sizes:
                expected = (used, max(sizes))
                break
        found = fit(config, nodes, 2, "cpu")
        assert (found.nodes, found.micro_batch_size) == expected
        fitted = found.apply(config)
        assert not problems(fitted, world_size=2 * found.nodes, device="cpu")
        assert fitted.train.global_batch_size == 24
        assert found.overrides(config) == ([] if expected[1] == 6 else [f"train.micro_batch_size={expected[1]}"])
    assert fit_exactly(config, 5, 2, "cpu") is None
    with pytest.raises(UserError, match="does not fit 1 node"):
        fit(tiny_config("x", parallel__tensor_parallel_size=4), 1, 2, "cpu")


def test_granted():
    assert granted({"SLURM_JOB_NUM_NODES": "3", "SLURM_NTASKS_PER_NODE": "8"}) == (3, 8)
    with pytest.raises(UserError, match="not in a job"):
        granted({})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12],gpu7", ["n08", "n09", "n10", "n12", "gpu7"]),
        ("r[1-2]n[1-2].x", ["r1n1.x", "r1n2.x", "r2n1.x", "r2n2.x"]),
        ("a,b[1,3],c", ["a", "b1", "b3", "c"]),
    ],
)
def test_host_lists(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-", "n[a-b]", "n 1", "n[1-2]]"])
def test_what_is_no_host_list(text):
    with pytest.raises(UserError, match="list of hosts"):
        expand_hosts(text)


SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
SRUN["SLURM_STEP_NODELIST"] = "n[5-6]"


def test_ranks_of_srun_meet_on_the_first_host():
    address, port = rendezvous(SRUN)
    again, other = rendezvous({**SRUN, "SLURM_PROCID": "0"}), rendezvous({**SRUN, "SLURM_RESTART_COUNT": "1"})
    assert address == "n5" and again == (address, port) and other[1] != port, "a stale attempt holds the former port"
    assert 12000 <= port < 28000
    environment = dict(SRUN)
    set_rendezvous(Topology(4, 3, 1), environment)
    assert (environment["MASTER_ADDR"], environment["RANK"], environment["WORLD_SIZE"]) == ("n5", "3", "4")
    assert environment["MASTER_PORT"] == str(port)
    given = {**SRUN, "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    set_rendezvous(Topology(4, 3, 1), given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("x", "1"), "what the user has set stays"


def test_tasks_that_see_one_gpu_each(monkeypatch):
    assert one_device_each({"SLURM_GPUS_PER_TASK": "1"}) and one_device_each({"SLURM_GPU_BIND": "single:1"})
    assert not one_device_each({}) and not one_device_each({"SLURM_GPU_BIND": "none"})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert make_topology("cuda", environment={**SRUN, "SLURM_GPUS_PER_TASK": "1"}).device == "cuda:0"
    with pytest.raises(UserError, match="rank 3 is number 1 on this machine"):
        make_topology("cuda", environment=SRUN)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert make_topology("cuda", environment=SRUN).device == "cuda:1"
