"""Jobs in a SLURM cluster of virtual nodes on this machine: time limit, preemption, scancel, lost nodes, a stale
attempt, an array.

Skipped where SLURM is not installed or the tests do not run as root; `.ci/run` installs it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from megameta.cluster.attempt import how_it_ended, newest_attempt
from megameta.cluster.status import run_status
from tests.scenarios.lab import Lab, read_logs, why_not
from tests.support.paths import ROOT
from tests.support.runs import hashes, last_step, latest_step, records
from tests.support.training import tiny_values, write_corpus

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]

#: Long enough to be caught in the middle, on a busy machine too.
STEPS, INTERVAL = 120, 20
#: A limit against hanging, in seconds.
PATIENCE = 600


@pytest.fixture(scope="module")
def lab():
    with tempfile.TemporaryDirectory(prefix="lab") as root:  # pytest's own folders are closed to munge
        Path(root).chmod(0o755)
        found = Lab(Path(root), nodes=2)
        try:
            found.up()
            yield found
        finally:
            left = found.down()
    assert left == [], "processes of the lab are left"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus and a configuration, on the file system that all nodes share."""
    folder = tmp_path_factory.mktemp("jobs")
    write_corpus(folder / "text")
    values = tiny_values(
        str(folder / "text"),
        train__num_steps=STEPS,
        train__peak_tflops=1.0,
        checkpoint__interval=INTERVAL,
        log__interval=50,
        cluster__lost_node_seconds=600,
        cluster__preflight_seconds=600,
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder


def submit(lab: Lab, place: Path, run: str, *words: str, nodes: int = 2) -> str:
    options = ["--nodes", str(nodes), "--gpus-per-node", "1", "--cpus-per-task", "1", "--time", "30", "--shared"]
    return lab.submit(place, "run.yaml", f"run.dir={run}", *options, *words)


def wait_for_step(lab: Lab, run: Path, step: int) -> None:
    lab.wait(lambda: last_step(run) >= step, timeout=PATIENCE, why=lambda: read_logs(run / "logs"))


def wait_for_idle_nodes(lab: Lab) -> None:
    lab.wait_for_slurm(lambda: lab.run("sinfo", "--noheader", "--format=%D %t").strip() == "2 idle", timeout=PATIENCE)


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in records(run)]


def ledger(run: Path) -> list[dict]:
    path = run / "logs" / "jobs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def whole(lab, place):
    """A run of two nodes that nothing disturbs."""
    job = submit(lab, place, "whole")
    lab.wait_for_state(job, "COMPLETED", timeout=PATIENCE, logs=place / "whole" / "logs")
    return place / "whole"


def test_what_a_job_leaves(whole):
    """Logs of each node, a record of the attempt, the checks before the first step, a status."""
    logs = whole / "logs"
    assert {path.name.partition("-")[2] for path in logs.glob("*-n*.log")} == {"n1.log", "n2.log"}
    attempt = logs / "attempt_0001"
    assert (attempt / "hosts.txt").read_text() == "n1 slots=1\nn2 slots=1\n"
    report = json.loads((attempt / "environment.json").read_text())
    assert report["variables"]["SLURM_JOB_NUM_NODES"] == "2" and report["packages"]["torch"] and "git" in report
    assert yaml.safe_load((attempt / "config.yaml").read_text())["train"]["num_steps"] == STEPS
    said = (logs / "rank_0.log").read_text()
    assert "all-reduce over 2 ranks on 2 nodes" in said and "\nnode" in said.replace(" node ", "\nnode ")
    status = run_status(whole, 0.0)
    assert (status["state"], status["step"], status["saved_step"], status["hosts"]) == (
        "done",
        STEPS,
        STEPS,
        ["n1", "n2"],
    )
    assert status["slowest_rank"]["host"] in ("n1", "n2")


def test_a_time_limit_is_survived_bitwise(lab, place, whole):
    run = place / "limited"
    job = submit(lab, place, "limited")
    wait_for_step(lab, run, 30)
    lab.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 sends before the limit
    lab.wait_for_slurm(lambda: lab.job(job)["Restarts"] == "1", timeout=PATIENCE, why=lambda: read_logs(run / "logs"))
    said = read_logs(run / "logs")
    assert said.count("SIGUSR1: the ranks are told") == 1 and "stopped by a signal" in said
    saved = latest_step(run)
    assert 30 <= saved < STEPS and (run_status(run, 0.0)["state"], run_status(run, 0.0)["attempt"]) == ("stopped", 1)
    lab.wait_for_state(job, "COMPLETED", timeout=PATIENCE, logs=run / "logs")
    first, second = ledger(run)
    assert (first["code"], first["state"], first["action"], first["saved"]) == (75, "RUNNING", "requeue", saved)
    assert (second["code"], second["action"], second["restart"]) == (0, "finish", "1")
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert records(run) == records(whole) and hashes(run) == hashes(whole)


def test_slurms_own_warning_before_a_time_limit(lab, place):
    """On a run without an end: the warning comes up to half a minute after the limit is lowered."""
    run = place / "warned"
    wait_for_idle_nodes(lab)
    job = submit(lab, place, "warned", "train.num_steps=100000")
    wait_for_step(lab, run, 30)
    hours, minutes, _ = lab.job(job)["RunTime"].split(":")
    lab.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * int(hours) + int(minutes) + 4}")
    lab.wait_for_slurm(lambda: lab.job(job)["Restarts"] == "1", timeout=PATIENCE, why=lambda: read_logs(run / "logs"))
    lab.wait(lambda: ledger(run), timeout=PATIENCE)
    assert (ledger(run)[0]["code"], ledger(run)[0]["action"]) == (75, "requeue")
    assert read_logs(run / "logs").count("SIGUSR1: the ranks are told") == 1
    lab.run("scancel", job)
    wait_for_idle_nodes(lab)


def test_a_preempted_job_saves_and_comes_back(lab, place):
    run = place / "preempted"
    wait_for_idle_nodes(lab)
    job = submit(lab, place, "preempted", "train.num_steps=100000", nodes=1)
    wait_for_step(lab, run, 30)
    words = ["--parsable", "--partition=high", "--nodes=2", "--exclusive", "--time=5", f"--output={place}/urgent.out"]
    urgent = lab.run("sbatch", *words, "--wrap=sleep 1", cwd=place).strip()
    lab.wait_for_slurm(lambda: lab.job(job)["Restarts"] == "1", timeout=PATIENCE, why=lambda: read_logs(run / "logs"))
    lab.wait(lambda: ledger(run), timeout=PATIENCE)
    (end,) = ledger(run)
    assert (end["code"], end["action"]) == (75, "requeue") and end["saved"] == last_step(run) >= 30
    lab.wait_for_state(urgent, "COMPLETED", timeout=PATIENCE)
    wait_for_step(lab, run, end["saved"] + 10)
    lab.run("scancel", job)
    steps = steps_of(run)
    assert steps == list(range(1, steps[-1] + 1)), "nothing twice, nothing left out"
    wait_for_idle_nodes(lab)


def test_a_cancelled_job_stays_cancelled(lab, place):
    run = place / "cancelled"
    job = submit(lab, place, "cancelled")
    wait_for_step(lab, run, 10)
    lab.run("scancel", job)
    lab.wait(lambda: ledger(run), timeout=PATIENCE, why=lambda: read_logs(run / "logs"))
    lab.wait_for_state(job, "CANCELLED", timeout=PATIENCE, logs=run / "logs")
    (end,) = ledger(run)
    assert end["action"] == "leave" and end["state"] != "RUNNING"
    lab.wait_for_slurm(lambda: not lab.run("squeue", "--noheader").strip(), timeout=PATIENCE)
    assert lab.job(job)["Restarts"] == "0"
    assert latest_step(run) == last_step(run) >= 10, "the ranks saved when they were told to end"


def test_a_node_without_power_is_named_and_the_rest_goes_on(lab, place, whole):
    """At fewer nodes, as allowed: the same samples in every step."""
    run = place / "lost"
    wait_for_idle_nodes(lab)  # with --min-nodes a job begins small rather than wait
    job = submit(lab, place, "lost", "--min-nodes", "1", "checkpoint.interval=10", "cluster.lost_node_seconds=15")
    wait_for_step(lab, run, 40)
    lab.script("poweroff", "n2")
    try:
        lab.wait(
            lambda: how_it_ended(newest_attempt(run)) or newest_attempt(run).number > 1,
            timeout=PATIENCE,
            why=lambda: read_logs(run / "logs"),
        )
        said = read_logs(run / "logs")
        assert said.count("error: lost node n2 (rank 1)") == 1, said
        lab.wait_for_state(job, "COMPLETED", timeout=PATIENCE, logs=run / "logs")
    finally:
        lab.script("boot", "n2")
    status = run_status(run, 0.0)
    assert (status["state"], status["attempt"], status["hosts"]) == ("done", 2, ["n1"])
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert [line["targets"] for line in records(run)] == [line["targets"] for line in records(whole)]
    assert records(run)[-1]["loss"] == pytest.approx(records(whole)[-1]["loss"], rel=1e-2)
    wait_for_idle_nodes(lab)


def test_a_stale_attempt_writes_nothing_more(lab, place):
    """The node is cut off and goes on training; SLURM starts the job again elsewhere."""
    run = place / "stale"
    job = submit(lab, place, "stale", "train.num_steps=3000", nodes=1)
    wait_for_step(lab, run, 30)
    node = lab.job(job)["NodeList"]
    lab.script("unplug", node)
    try:
        lab.wait(lambda: newest_attempt(run).number == 2, timeout=PATIENCE, why=lambda: read_logs(run / "logs"))
        first = run / "logs" / "attempt_0001"
        ended = lab.wait(
            lambda: (first / "end.json").exists() and json.loads((first / "end.json").read_text()), timeout=PATIENCE
        )
        assert ended["kind"] == "superseded" and "attempt 2 has started" in ended["message"]
        saved = latest_step(run)
        wait_for_step(lab, run, saved + 30)
        lab.script("replug", node)
        lab.run("scancel", "--batch", "--signal=USR1", job)
        lab.wait(
            lambda: run_status(run, 0.0)["state"] == "stopped", timeout=PATIENCE, why=lambda: read_logs(run / "logs")
        )
        lab.wait(lambda: any(line["action"] == "requeue" for line in ledger(run)), timeout=PATIENCE)
        lab.run("scancel", job)
        # The first batch script is still there on the node that came back: it must not touch the job of the second.
        assert [line["restart"] for line in ledger(run) if line["action"] == "requeue"] == ["1"]
    finally:
        lab.script("replug", node)
    steps = steps_of(run)
    assert steps == list(range(1, steps[-1] + 1)), "no line of the stale attempt, none twice"
    assert latest_step(run) == steps[-1]
    assert not list((run / "checkpoints").glob(".*writing"))


def test_an_array_of_shards_then_training(lab, place):
    texts = ["the cat sat on the mat and looked at the rain\n", "a dog ran over the hill into the long grass\n"]
    for number, text in enumerate(texts):
        lines = [json.dumps({"text": text * (1 + i % 3)}) for i in range(60)]
        (place / f"shard{number}.jsonl").write_text("\n".join(lines) + "\n")
    shards = [str(place / f"shard{number}.jsonl") for number in range(2)]
    (place / "shards.txt").write_text("\n".join(shards) + "\n")
    root = ROOT
    train = [sys.executable, str(root / "tools" / "train_tokenizer.py"), "--input", *shards]
    subprocess.run(
        [*train, "--output", str(place / "tok"), "--type", "bpe", "--vocab-size", "300"], check=True, timeout=PATIENCE
    )
    options = ["--parsable", "--array=0-1", "--cpus-per-task=1", f"--output={place}/array-%a.out"]
    script = root / "slurm" / "preprocess.sbatch"
    words = [str(place / "shards.txt"), str(place / "part"), "--tokenizer", str(place / "tok"), "--append-eod"]
    array = lab.run("sbatch", *options, str(script), *words, cwd=place).strip()
    values = {
        "run": {"dir": "after", "device": "cpu"},
        "model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
        "data": {
            "train": [str(place / f"part_{number:05d}_text_document") for number in range(2)],
            "tokenizer": str(place / "tok"),
            "sequence_length": 32,
        },
        "train": {"num_steps": 5, "micro_batch_size": 4, "global_batch_size": 4, "peak_tflops": 1.0},
        "optimizer": {"warmup_steps": 1},
        "log": {"tensorboard": False},
    }
    (place / "after.yaml").write_text(yaml.safe_dump(values))
    options = ["--parsable", f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", "--nodes=2"]
    options += ["--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", f"--output={place}/after.out"]
    job = lab.run("sbatch", *options, str(root / "slurm" / "pretrain.sbatch"), "after.yaml", cwd=place).strip()
    lab.wait_for_state(job, "COMPLETED", timeout=PATIENCE, logs=place / "after" / "logs")
    assert (run_status(place / "after", 0.0)["state"], steps_of(place / "after")) == ("done", [1, 2, 3, 4, 5])
    assert (place / "after" / "logs" / "attempt_0001" / "hosts.txt").read_text() == "n1 slots=2\nn2 slots=2\n"
