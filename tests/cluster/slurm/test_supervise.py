"""The supervisor against stand-ins of SLURM's commands: signals, exit codes, what is asked of the controller."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megameta.cluster.attempt import claim
from tests.support.paths import ROOT
from tests.support.waiting import LIMIT, wait_until


@pytest.fixture
def cluster(tmp_path):
    """Programs of SLURM's names that answer from files and write down what they were asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    asked = tmp_path / "asked"
    answers = {"squeue": 'case "$*" in *--name=*) echo "7 8 42";; *) cat "$HERE/state";; esac'}
    answers |= {
        "scontrol": 'case "$*" in *"show job"*) echo "JobId=42 Requeue=1 Restarts=$(cat $HERE/restarts)";; esac',
        "scancel": ":",
        "sinfo": "rm -f $HERE/cut; echo n2 down*",
    }
    for name, body in answers.items():
        path = folder / name
        cut_off = "" if name == "sinfo" else "[ -e $HERE/cut ] && exit 1"
        path.write_text(f'#!/bin/bash\nHERE={tmp_path}\necho "{name} $*" >> {asked}\n{cut_off}\n{body}\n')
        path.chmod(0o755)
    (tmp_path / "state").write_text("RUNNING\n")
    (tmp_path / "restarts").write_text("0\n")
    asked.touch()
    return tmp_path


def start(cluster: Path, body: str, *options: str) -> subprocess.Popen:
    """``megameta slurm run`` over a Python program in place of srun; what it would wait for SLURM is nothing."""
    program = cluster / "ranks.py"
    program.write_text(textwrap.dedent(body))
    code = (
        "import sys, time, types; from megameta.cluster.slurm import supervise;"
        "supervise.time = types.SimpleNamespace(**{**vars(time), 'sleep': lambda seconds: None});"
        "from megameta.__main__ import main; main(sys.argv[1:])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {"PATH": f"{cluster / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    environment |= {"SLURM_JOB_NAME": "megameta-x-12345678", "SLURM_JOB_NODELIST": "n[1-2]", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, "slurm", "run", *options, str(cluster / "run"), sys.executable, str(program)]
    with (cluster / "said").open("w") as said:
        return subprocess.Popen(words, env=environment, stderr=said, stdout=said)


def ledger(cluster: Path) -> list[dict]:
    return [json.loads(line) for line in (cluster / "run" / "logs" / "jobs.jsonl").read_text().splitlines()]


def asked(cluster: Path, word: str) -> list[str]:
    return [line for line in (cluster / "asked").read_text().splitlines() if line.startswith(word)]


def test_a_run_that_is_done_cancels_what_waits_of_its_chain(cluster):
    process = start(cluster, "", "--chain")
    assert process.wait(LIMIT) == 0
    assert asked(cluster, "scancel") == ["scancel 7 8"], "not the job itself"
    assert not asked(cluster, "scontrol requeue") and ledger(cluster)[0]["action"] == "finish"


def test_the_warning_reaches_the_ranks_and_the_job_is_requeued(cluster):
    body = f"""
        import pathlib, signal, sys
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
        pathlib.Path({str(cluster)!r}, "ready").touch()
        signal.pause()
        """
    process = start(cluster, body)
    try:
        wait_until((cluster / "ready").exists, unless=process.poll)
        process.send_signal(signal.SIGTERM)  # of scancel or a preemption: SLURM sends it to the ranks itself
        process.send_signal(signal.SIGUSR1)
        assert process.wait(LIMIT) == 75
    finally:
        process.kill()
        process.wait()
    assert asked(cluster, "scontrol requeue") == ["scontrol requeue 42"]
    assert (ledger(cluster)[0]["code"], ledger(cluster)[0]["failed"]) == (75, False)


def test_a_cancelled_job_is_not_brought_back(cluster):
    (cluster / "state").write_text("COMPLETING\n")
    assert start(cluster, "import sys; sys.exit(75)").wait(LIMIT) == 75
    assert not asked(cluster, "scontrol requeue") and not asked(cluster, "scancel")


@pytest.mark.parametrize(("kind", "requeued"), [("mistake", 0), ("lost", 1), ("superseded", 0)])
def test_what_the_attempt_said_decides(cluster, kind, requeued):
    body = f"""
        import sys
        from pathlib import Path
        from megameta.cluster.attempt import claim
        claim(Path({str(cluster / "run")!r})).note_end({kind!r}, "node n2 is gone")
        sys.exit(76)
        """
    claim(cluster / "run").note_end("mistake", "of an attempt before this job")
    process = start(cluster, body.replace("sys.exit(76)", "sys.exit(76)"))
    assert process.wait(LIMIT) != 0
    assert len(asked(cluster, "scontrol requeue")) == requeued, (cluster / "said").read_text()
    said = (cluster / "said").read_text()
    assert "attempt 2: node n2 is gone" in said and "before this job" not in said


def test_an_end_of_a_former_attempt_says_nothing_about_this_one(cluster):
    claim(cluster / "run").note_end("mistake", "of an attempt before this job")
    assert start(cluster, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").wait(LIMIT) == 137
    assert asked(cluster, "scontrol requeue") and "before this job" not in (cluster / "said").read_text()


def test_what_is_left_on_a_lost_node_touches_nothing(cluster):
    """Its node is back, the job runs elsewhere, and a newer attempt has ended for a reason of its own."""
    (cluster / "restarts").write_text("1\n")
    body = f"""
        import sys
        from pathlib import Path
        from megameta.cluster.attempt import claim
        claim(Path({str(cluster / "run")!r})).note_end("superseded", "attempt 2 has started")
        claim(Path({str(cluster / "run")!r})).note_end("lost", "node n3 is gone")
        sys.exit(76)
        """
    assert start(cluster, body).wait(LIMIT) == 76
    assert not asked(cluster, "scontrol requeue") and not asked(cluster, "scancel")
    assert "attempt 1: attempt 2 has started" in (cluster / "said").read_text()
    assert "n3" not in (cluster / "said").read_text()
    assert "the job runs elsewhere by now" in (cluster / "said").read_text()


def test_a_node_that_was_cut_off_asks_again_before_it_requeues(cluster):
    """No controller answers when the ranks end; when one does again, the job runs elsewhere."""
    body = f"""
        import sys
        from pathlib import Path
        from megameta.cluster.attempt import claim
        claim(Path({str(cluster / "run")!r})).note_end("lost", "node n2 is gone")
        Path({str(cluster)!r}, "restarts").write_text("1")
        Path({str(cluster)!r}, "cut").touch()
        sys.exit(76)
        """
    assert start(cluster, body).wait(LIMIT) == 76
    assert ledger(cluster)[0]["action"] == "wait" and ledger(cluster)[0]["state"] is None
    assert not (cluster / "cut").exists() and not asked(cluster, "scontrol requeue")
    assert "the job runs elsewhere by now" in (cluster / "said").read_text()


def test_failures_end(cluster):
    for number in range(3):
        assert start(cluster, "import sys; sys.exit(9)").wait(LIMIT) == 9
        assert len(asked(cluster, "scontrol requeue")) == min(number + 1, 2)
    assert [line["action"] for line in ledger(cluster)] == ["requeue", "requeue", "give up"]


def test_outside_a_job(cluster, capsys, monkeypatch):
    from megameta.cluster.slurm.supervise import run_job
    from megameta.errors import UserError

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match=r"sbatch slurm/pretrain\.sbatch"):
        run_job(cluster / "run", ["true"], chain=False)
