"""benchmarks/gpu.py says at once which packages it lacks, and keeps what its parts find."""

import importlib.metadata
import importlib.util
import json
import sys
import tarfile
from pathlib import Path

import psutil
import pytest

from tests.support.commands import true_process
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

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
    # The script calls the Python that runs it, which this is told to be.
    code = "import runpy, sys; sys.executable, sys.argv = sys.argv[1], sys.argv[2:];"
    code += " runpy.run_path(sys.argv[0], run_name='__main__')"
    script = ROOT / "benchmarks" / "gpu.py"
    done = true_process(sys.executable, "-S", "-c", code, tmp_path / "python", script, tmp_path / "out")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    wanted = ["deepspeed", "hjson", "numpy", "pydantic-core", "torch", "typing-inspection"]
    assert [name for name in wanted if f" {name}," in line or f" {name};" in line] == wanted
    assert "--wheels" in line and not (tmp_path / "out").exists()


#: Runs pytest as in a Python without what its users seldom install.
BARE = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
HIDDEN = {"hypothesis", "datasets", "dill", "zstandard", "lm_eval", "rensa", "py3langid"}
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import pytest
options = ["-q", "--collect-only", "-p", "no:hypothesispytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu"]
sys.exit(pytest.main([*options, *sys.argv[1:]]))
"""


def test_gpu_tests_need_what_is_looked_for():
    """One that does not import would keep all of them from running."""
    marked = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark." + "gpu" in path.read_text())
    done = true_process(sys.executable, "-c", BARE, *marked)
    assert done.returncode == 0 and "tests collected" in done.stdout, done.stdout + done.stderr
    code = "print(*names['GPU_TESTS'])"
    listed = true_process(sys.executable, "-c", HIDING + code, ROOT / "benchmarks" / "gpu.py", "")
    assert sorted(ROOT / name for name in listed.stdout.split()) == marked


# --- parts ----------------------------------------------------------------------------------------------------------

#: Writes a result, starts a process that outlives it, and goes on for good.
HANGING = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text('{"child": %d}' % child.pid)
print("half done", flush=True)
time.sleep(600)
"""
GOOD = 'import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(\'{"mfu": {"branch": 0.4}}\')'


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """The script, with parts of ours, and no look for packages."""
    spec = importlib.util.spec_from_file_location("gpu_driver", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_driver", module)  # where a dataclass looks for its own
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.Driver, "missing", lambda self: 0)

    def part(name, seconds, code):
        words = ("-c", code.replace("{", "{{").replace("}", "}}"), "{json}")
        return module.Part(name, seconds, words, words)

    def run(parts, *words):
        monkeypatch.setattr(module, "PARTS", tuple(part(*values) for values in parts))
        monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path / "out"), *words])
        code = module.main()
        return code, json.loads((tmp_path / "out" / "gpu.json").read_text())

    return run


def test_what_fails_is_kept_and_the_rest_goes_on(driver, tmp_path, monkeypatch):
    ends_within = sys.modules["gpu_driver"].ends_within

    def in_time(process, seconds):
        """The hanging one is cut off when it has done what it does."""
        if seconds != 61:
            return ends_within(process, seconds)
        (result,) = [word for word in process.args if str(word).endswith(".json")]
        wait_until(lambda: Path(result).exists() and "half done" in Path(result).with_suffix(".txt").read_text())
        return False

    monkeypatch.setattr(sys.modules["gpu_driver"], "ends_within", in_time)
    parts = [
        ("bad", 60, "print('a reason'); raise SystemExit(3)"),
        ("hanging", 61, HANGING),
        ("engine_152m", 60, GOOD),
    ]
    code, found = driver(parts)
    assert code == 1 and found["failed"] == ["bad", "hanging"] and found["missed"] == ["engine_152m"]
    bad, hanging, engine = found["parts"].values()
    assert bad["exit_code"] == 3 and bad["said"] == ["a reason"] and "result" not in bad
    assert hanging["failed"] == "cut off by its time limit" and hanging["said"] == ["half done"]
    child = hanging["result"]["child"]
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    assert engine["bar"] == {**engine["bar"], "found": 0.4, "bar": 0.45, "met": False}
    with tarfile.open(tmp_path / "out" / "details.tar.gz") as archive:
        assert {"bad.txt", "hanging.txt", "engine_152m.json"} <= set(archive.getnames())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["details.tar.gz", "gpu.json"]


def test_what_ended_well_is_not_run_again(driver, tmp_path):
    parts = [("machine", 60, GOOD), ("kernels", 60, "raise SystemExit(1)")]
    _, first = driver(parts)
    (tmp_path / "old.json").write_text(json.dumps(first))
    again = [("machine", 60, "raise SystemExit(9)"), ("kernels", 60, GOOD), ("late", 60, GOOD)]
    code, found = driver(again, "--previous", str(tmp_path / "old.json"), "--parts", "machine,kernels")
    assert code == 0 and found["failed"] == [] and list(found["parts"]) == ["machine", "kernels"]
    assert found["parts"]["machine"] == first["parts"]["machine"]
    code, found = driver(again[2:], "--seconds", "5")
    assert code == 1 and found["parts"]["late"]["said"] == ["left out: no time was left"]


def test_parts_use_options_that_their_scripts_have():
    code = "import json; print(json.dumps([p.on_cuda + p.on_cpu for p in names['PARTS']]))"
    done = true_process(sys.executable, "-c", HIDING + code, ROOT / "benchmarks" / "gpu.py", "")
    assert done.returncode == 0, done.stderr
    commands = [words for words in json.loads(done.stdout) if words[0] != "-m"]
    assert len(commands) == 9
    for words in commands:
        source = (ROOT / words[0]).read_text()
        missing = [word for word in words if word.startswith("--") and f'"{word}"' not in source]
        assert not missing, (words[0], missing)
