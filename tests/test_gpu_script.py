"""benchmarks/gpu.sh says at once which packages it lacks."""

import importlib.metadata
import sys

import pytest

from tests.support.commands import plain_environment, true_process
from tests.support.server import ROOT

SCRIPT = str(ROOT / "benchmarks" / "needs.py")
#: Puts the script's names into a namespace, with some packages hidden from it.
HIDING = """
import importlib.metadata, runpy, sys
from importlib.metadata import PackageNotFoundError, requires, version
hidden = set(sys.argv[2].split())
def found(ask):
    def asked(name):
        if name in hidden:
            raise PackageNotFoundError(name)
        return ask(name)
    return asked
importlib.metadata.version, importlib.metadata.requires = found(version), found(requires)
names = runpy.run_path(sys.argv[1])
"""


def said(code: str, *hidden: str) -> str:
    done = true_process(sys.executable, "-c", HIDING + code, SCRIPT, " ".join(hidden))
    assert done.returncode == 0, done.stderr
    return done.stdout


CUDA_IMAGE_LACKS = ("annotated-types", "deepspeed", "hjson", "pydantic", "pydantic-core", "typing-inspection")


@pytest.mark.parametrize("hidden", [(), ("hjson",), CUDA_IMAGE_LACKS])
def test_what_is_hidden_is_missing(hidden):
    assert said("print(*names['missing']())", *hidden).split() == sorted(hidden)


def test_the_table_says_what_installed_packages_say():
    """For the versions that are tested: others may need other things, and say so themselves."""
    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    code = "print(names['REQUIRES'] == {name: ' '.join(names['requirements'](name)) for name in names['REQUIRES']})"
    names = said("print(*names['REQUIRES'])").split()
    other = [name for name in names if importlib.metadata.version(name) != tested.get(name)]
    if other:
        pytest.skip(f"other versions than constraints.txt has: {', '.join(other)}")
    assert said(code) == "True\n"


def test_nothing_runs_where_something_is_missing(tmp_path):
    """In a Python that has no packages at all: they are named before anything is written."""
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = plain_environment(PYTHON=f"{tmp_path}/python")
    done = true_process("bash", ROOT / "benchmarks" / "gpu.sh", tmp_path / "out", environment=environment)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    wanted = ["deepspeed", "hjson", "numpy", "pydantic-core", "torch", "typing-inspection"]
    assert [name for name in wanted if f" {name}," in line or f" {name};" in line] == wanted
    assert "WHEELS" in line and not (tmp_path / "out").exists()
