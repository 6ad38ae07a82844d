"""Preprocessing that is killed at any moment ends in the bytes of a run that nobody disturbed.

New interpreters, as their start is one of the moments.
"""

import gzip
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.support.commands import TIMEOUT
from tests.support.paths import ROOT
from tests.support.preprocessing import TOOL, documents, lines, output


def command(tokenizer, file, prefix, *flags):
    words = ["--input", file, "--output-prefix", prefix, "--tokenizer", tokenizer, "--append-eod"]
    return [sys.executable, *map(str, [ROOT / TOOL, *words, "--json-keys", "text", "title", *flags])]


def wait_for_commit(run, journal):
    """Until the command has committed anew; False where it has ended."""

    def when():
        try:
            return journal.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    before = when()
    while run.poll() is None and when() in (None, before):
        time.sleep(0.005)
    return run.poll() is None


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_killed_at_random_moments(tokenizer, tmp_path, name):
    """After none to three commits of a start; until there have been 12 kills, and 5 starts that went on."""
    data = lines(documents(40_000))  # some 14 MB, 14 blocks
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    subprocess.run(command(tokenizer, tmp_path / name, tmp_path / "whole", "--workers", 1), check=True, timeout=TIMEOUT)
    draws, journal = random.Random(name), tmp_path / "o.partial" / "journal.json"
    kills = went_on = 0
    last = False
    while not last:
        last = kills >= 12 and went_on >= 5
        flags = ("--workers", 1 + kills % 3, "--commit-interval", 0.02)
        words, unfinished = command(tokenizer, tmp_path / name, tmp_path / "o", *flags), journal.exists()
        run = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        commits = draws.choice([0, 1, 1, 2, 3])
        if not last:
            alive = all(wait_for_commit(run, journal) for _ in range(commits))
            time.sleep(draws.uniform(0, 0.05 if commits else 2.0))  # any moment will do
            kills += alive
            run.kill()
        errors = run.communicate(timeout=TIMEOUT)[1]
        assert run.returncode in ((0,) if last else (0, -signal.SIGKILL)), errors
        went_on += "going on from" in errors
        if commits or run.returncode == 0:
            assert ("going on from" in errors) == unfinished, errors
        # A kill after the last rename, before the process ended, leaves finished work too.
        if run.returncode == 0 or (not journal.exists() and (tmp_path / "o_title_document.idx").exists()):
            assert output(tmp_path / "o", ["text", "title"]) == output(tmp_path / "whole", ["text", "title"])
            assert not journal.exists()
            for file in tmp_path.glob("o_*"):
                file.unlink()
