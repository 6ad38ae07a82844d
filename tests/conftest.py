"""What holds for the whole suite: one kit (``tests/support``), one thread of torch, no network, heavy files first."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest
import torch

from tests.support.server import ALL, CORE
from tests.support.server import start as start_server
from tests.support.shared import Shared

STARTERS = ("tests.support.ranks", "tests.support.commands", "tests.support.server")
SCENARIOS = Path(__file__).parent / "scenarios"
#: Waits for SLURM's clocks, minutes in all, while other files use the cores.
WAITING = SCENARIOS / "test_slurm_lab.py"

# A shell's job in the background ignores Ctrl-C, and so would every process of a test that is sent one.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the shapes are tiny: one is faster than several, and leaves the cores to other tests


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """What all workers share; see ``tests/support/shared.py``."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared"
    folder.mkdir(exist_ok=True)
    things = Shared(folder)
    yield things
    things.check()


@pytest.fixture(scope="session")
def corpus(shared: Shared) -> str:
    """The prefix of a tiny tokenised corpus: 4000 tokens of 60, documents of 1 to 300 tokens. Not to be changed."""
    from tests.support.training import write_corpus  # imports the trainer

    return str(shared.get("corpus", lambda folder: write_corpus(folder / "text")) / "text")


@pytest.fixture(scope="session")
def tokenizer(shared: Shared) -> str:
    """The folder of a byte-level BPE of 300 entries. Not to be changed."""
    from megameta.tokenizers.training import train_bpe
    from tests.support.preprocessing import CORPUS

    return str(shared.get("tokenizer", lambda folder: train_bpe(iter(CORPUS), 300, folder)))


def pytest_configure(config: pytest.Config) -> None:
    """Where files are named, start the server of processes that they need beside the collection: five seconds less."""
    named = [Path(argument.partition("::")[0]) for argument in config.args]
    source = "".join(path.read_text(encoding="utf-8") for path in named if path.is_file())
    runs_here = not getattr(config.option, "numprocesses", None) and not config.option.collectonly
    if runs_here and any(starter in source for starter in STARTERS):
        start_server(ALL if "hf" in source or "export" in source else CORE)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the scenarios; files that wait, start processes or are slow come first: no worker is left alone with one."""
    for item in items:
        if SCENARIOS in item.path.parents:
            item.add_marker(pytest.mark.scenario)
    heavy = {item.path for item in items if item.get_closest_marker("slow") or _starts_processes(item)}
    items.sort(key=lambda item: (item.path != WAITING, item.path not in heavy))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the server of processes do its imports while the first tests run."""
    if any(map(_starts_processes, session.items)) and not session.config.option.collectonly:
        start_server()


def _starts_processes(item: pytest.Item) -> bool:
    """Whether the test's module takes something from the parts of the kit that start processes."""
    taken = {getattr(value, "__module__", None) for value in vars(getattr(item, "module", None) or object).values()}
    return not taken.isdisjoint(STARTERS)
