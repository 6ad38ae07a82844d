"""Jobs that depend on one another: order, several at a time, interruption, failure."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megameta.errors import UserError
from megameta.paper.reproduce import jobs as module
from megameta.paper.reproduce.jobs import Job, JobRunner, Stopped, fingerprints
from tests.support.waiting import LIMIT, wait_until


def job(root: Path, name: str, code: str, *needs: str, inputs: object = None) -> Job:
    """Runs code, in which OUT is the job's output, LOG appends a word to a common file and UNTIL waits."""
    out = root / "out" / name
    begin = (
        "import sys, time, pathlib\n"
        f"OUT = pathlib.Path({str(out)!r})\nOUT.parent.mkdir(parents=True, exist_ok=True)\n"
        f"def LOG(word):\n    with open({str(root / 'log')!r}, 'a') as f: f.write(word + '\\n')\n"
        "def UNTIL(happened):\n"
        f"    end = time.monotonic() + {LIMIT}\n"
        "    while not happened():\n"
        "        assert time.monotonic() < end, 'it did not happen'\n"
        "        time.sleep(0.05)\n"
    )
    return Job(name, (("-c", begin + textwrap.dedent(code)),), (out,), needs, 1.0, inputs)


def log(root: Path) -> list[str]:
    path = root / "log"
    return path.read_text().split() if path.exists() else []


MAKE = "LOG('{0}'); OUT.write_text('{0}')"


def test_a_job_waits_for_those_it_needs_and_done_ones_are_kept(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "a", MAKE.format("a")),
        job(tmp_path, "b", MAKE.format("b"), "a"),
        job(tmp_path, "c/d", MAKE.format("c"), "a", "b"),
    ]
    JobRunner(tmp_path, jobs, 3).run()
    assert log(tmp_path) == ["a", "b", "c"]
    again = JobRunner(tmp_path, jobs, 3)
    assert all(again.is_done(each) for each in jobs)
    again.run()
    assert log(tmp_path) == ["a", "b", "c"]
    assert again.seconds().keys() == {"a", "b", "c/d"} and all(again.seconds().values())


def test_as_many_run_at_once_as_there_are_slots_each_in_its_environment(tmp_path: Path) -> None:
    meet = """
    import os
    LOG(os.environ['PLACE'])
    UNTIL(lambda: len(open({path!r}).read().split()) == 2)
    OUT.write_text('')
    """.format(path=str(tmp_path / "log"))
    jobs = [job(tmp_path, name, meet) for name in ("a", "b")]
    JobRunner(tmp_path, jobs, 2, environments=[{"PLACE": "first"}, {"PLACE": "second"}]).run()
    assert sorted(log(tmp_path)) == ["first", "second"]


def test_the_last_line_of_a_job_at_work_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last_line = module._last_line

    def tell(log: Path) -> str:
        line = last_line(log)
        if "3 of 7" in line:
            (tmp_path / "told").touch()
        return line

    monkeypatch.setattr(module, "_REPORT_EVERY", 0.0)
    monkeypatch.setattr(module, "_last_line", tell)
    code = f"""
    print('step 1 of 7', end='\\rstep 3 of 7\\n\\n', flush=True)
    UNTIL(pathlib.Path({str(tmp_path / "told")!r}).exists)
    OUT.write_text('')
    """
    JobRunner(tmp_path, [job(tmp_path, "a", code)], 1).run()
    assert "    a: step 3 of 7\n" in capsys.readouterr().out


def test_another_input_starts_a_job_and_those_after_it_anew_and_no_other(tmp_path: Path) -> None:
    def jobs(inputs: int) -> list[Job]:
        begin = "LOG('went' if OUT.exists() else 'began'); OUT.write_text('')"
        return [
            job(tmp_path, "a", MAKE.format("a")),
            job(tmp_path, "b", begin, inputs=inputs),
            job(tmp_path, "c", begin, "b"),
        ]

    JobRunner(tmp_path, jobs(1), 1).run()
    JobRunner(tmp_path, jobs(2), 1).run()
    assert log(tmp_path) == ["a", "began", "began", "began", "began"]  # outputs were removed first
    before, after = fingerprints(jobs(1)), fingerprints(jobs(2))
    assert before["a"] == after["a"] and before["b"] != after["b"] and before["c"] != after["c"]


def test_a_failure_stops_the_others_and_shows_the_end_of_its_log(tmp_path: Path) -> None:
    jobs = [
        job(
            tmp_path,
            "bad",
            f"""
            while not pathlib.Path({str(tmp_path / "log")!r}).exists():
                time.sleep(0.01)
            print('what went wrong')
            sys.exit(3)
            """,
        ),
        job(
            tmp_path,
            "long",
            """
            import signal
            signal.signal(signal.SIGTERM, lambda *_: (LOG('told'), sys.exit(75)))
            LOG('began')
            signal.pause()
            OUT.write_text('')
            """,
        ),
    ]
    with pytest.raises(UserError, match=r"bad failed \(exit code 3\)(.|\n)*what went wrong"):
        JobRunner(tmp_path, jobs, 2).run()
    assert log(tmp_path) == ["began", "told"]
    assert not (tmp_path / "out" / "long").exists()


def test_a_job_that_leaves_nothing_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a ended well but left no"):
        JobRunner(tmp_path, [job(tmp_path, "a", "pass")], 1).run()


def test_what_was_interrupted_goes_on_with_what_it_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is over as soon as the job has done a half: the clock jumps then."""
    code = """
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    if not OUT.exists():
        OUT.write_text('half')
        LOG('half')
        signal.pause()
    LOG('whole')
    """
    jobs = [job(tmp_path, "a", code), job(tmp_path, "b", MAKE.format("b"), "a")]
    clock = SimpleNamespace(sleep=time.sleep, monotonic=lambda: time.monotonic() + 1e6 * bool(log(tmp_path)))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(module, "time", clock)
        JobRunner(tmp_path, jobs, 1).run(seconds=1e5)
    assert log(tmp_path) == ["half"]
    JobRunner(tmp_path, jobs, 1).run()
    assert log(tmp_path) == ["half", "whole", "b"]


def test_a_signal_ends_all_jobs_and_a_second_process_is_kept_out(tmp_path: Path) -> None:
    program = f"""
        from pathlib import Path
        from megameta.paper.reproduce.jobs import Job, JobRunner, Stopped
        root = Path({str(tmp_path)!r})
        code = "import os, pathlib, signal; pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))"
        code += "; signal.pause()"
        try:
            JobRunner(root, [Job("a", (("-c", code),), ())], 1).run()
        except Stopped:
            print("stopped")
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), unless=process.poll)
        with pytest.raises(UserError, match="another process is at work"):
            JobRunner(tmp_path, [job(tmp_path, "a", "pass")], 1).run()
        process.send_signal(signal.SIGTERM)
        assert "stopped" in process.communicate(timeout=LIMIT)[0]
    finally:
        process.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
