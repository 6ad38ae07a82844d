"""Imports point one way, from top to bottom of ``LAYERS``, and in no circle.

Read from the source (nothing is imported), so that an import inside a function, under TYPE_CHECKING, or by
``import_module("megameta…")`` counts too. A part may import from layers below its own and from itself; not from its
neighbours of the same layer. A new part needs a place in LAYERS.
"""

import ast
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = "megameta"

#: From top to bottom. Names joined by "+" count as one part.
LAYERS: list[list[str]] = [
    ["tools", "commands+__main__"],
    ["paper"],
    ["quickstart"],
    ["finetune"],
    ["train"],
    ["engine", "cluster"],
    ["hf"],
    ["checkpoint", "plan"],
    ["corpus"],
    ["data", "parallel", "tokenizers"],
    ["config"],
    ["model"],
]
RANK = {name: depth for depth, layer in enumerate(LAYERS) for part in layer for name in part.split("+")}
PART = {name: part for layer in LAYERS for part in layer for name in part.split("+")}
#: May be imported by every part but model, and import no part themselves.
SHARED = {"errors", "files", "html", "log", "statistics", "__init__"}
#: What model/ may import besides the standard library; flash_attn only inside a function, where it is installed.
MODEL_NEEDS = {"torch", "flash_attn"}


def part_of(module: str) -> str | None:
    """``megameta.data.indexed`` → data, ``tools.x`` → tools, ``megameta`` → __init__; None for what is not ours."""
    names = module.split(".")
    if names[0] == "tools":
        return "tools"
    if names[0] != PACKAGE:
        return None
    return names[1] if len(names) > 1 else "__init__"


def imports(source: str, module: str, is_package: bool, members: Collection[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module that the source imports.

    Args:
        members: ``from package import name`` imports one of these modules, or else the package itself.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{name}.{alias.name}" for alias in node.names}
            yield from ((node.lineno, each) for each in sorted({each if each in members else name for each in inner}))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def complaints(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, a line each."""
    here = part_of(module)
    assert here is not None
    found = []
    for line, name in imports(source, module, is_package, {f"{PACKAGE}.{part}" for part in [*RANK, *SHARED]}):
        there, top = part_of(name), name.split(".")[0]
        wrong = None
        if there is None:
            if here == "model" and top not in MODEL_NEEDS and top not in sys.stdlib_module_names:
                wrong = "model/ needs torch and the standard library only"
        elif there in SHARED:
            if here == "model":
                wrong = "model/ imports nothing else of the package"
        elif here in SHARED:
            wrong = "is imported by every part, so it may import none"
        elif there not in RANK:
            wrong = "has no place in LAYERS of tests/test_layering.py"
        elif PART[here] != PART[there] and RANK[there] <= RANK[here]:
            wrong = "lies not below"
        if wrong is not None:
            found.append(f"{module}:{line}: {here} → {name}: {wrong}")
    return found


def modules() -> list[tuple[str, Path]]:
    files = [*sorted((ROOT / PACKAGE).rglob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]
    result = []
    for path in files:
        names = path.relative_to(ROOT).with_suffix("").parts
        result.append((".".join(names[:-1] if names[-1] == "__init__" else names), path))
    return result


def test_every_part_has_its_place() -> None:
    found = {part_of(name) for name, _ in modules()}
    assert found == set(RANK) | SHARED, "LAYERS and SHARED (tests/test_layering.py) name the parts that there are"


def test_imports_point_one_way() -> None:
    found = []
    for name, path in modules():
        found += complaints(path.read_text(encoding="utf-8"), name, is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


def graph(sources: dict[str, tuple[str, bool]]) -> dict[str, set[str]]:
    """The modules that each module imports, of (source, whether it is a package) by name."""
    found: dict[str, set[str]] = {}
    for name, (source, is_package) in sources.items():
        taken = {taken for _, taken in imports(source, name, is_package, set(sources))}
        found[name] = taken & set(sources) - {name}
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that import one another, however long the way round."""
    reached = {name: {name} for name in edges}
    for name in edges:
        waiting = [name]
        while waiting:
            for other in edges[waiting.pop()] - reached[name]:
                reached[name].add(other)
                waiting.append(other)
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in edges}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_no_circle() -> None:
    sources = {name: (path.read_text(encoding="utf-8"), path.name == "__init__.py") for name, path in modules()}
    edges = graph(sources)
    assert edges["megameta.train.loop"] >= {"megameta.train.saving", "megameta.checkpoint"}
    assert circles(edges) == []


def test_circles_are_found() -> None:
    sources = {
        "megameta": ("", True),
        "megameta.a": ("from megameta.b import x", False),
        "megameta.b": ("def f():\n    from megameta import c", False),
        "megameta.c": ("from .a import y", False),
        "megameta.d": ("import megameta.a", False),
    }
    assert circles(graph(sources)) == [["megameta.a", "megameta.b", "megameta.c"]]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megameta.model.gpt", "import torch.nn as nn\nimport math\nfrom megameta.model.rope import rotate"),
        ("megameta.model.gpt", "from . import rope\nfrom .rope import rotate\nfrom .. import model"),
        ("megameta.data.indexed", "import numpy\nfrom megameta.errors import UserError\nimport megameta.model"),
        (
            "megameta.config",
            "from megameta.model.config import ModelConfig\nfrom megameta.config.loading import x",
        ),
        ("megameta.engine.build", "from megameta.hf.start import start_weights"),
        ("megameta.train.loop", "from megameta import __version__, data, checkpoint\nfrom megameta.parallel import x"),
        ("megameta.hf.export", "from megameta.tokenizers import Tokenizer\nfrom .names import to_hf_name"),
        ("megameta.paper.analysis.maps", "import megameta.engine.build\nfrom ..hf import importer"),
        ("megameta.__main__", "from megameta.commands import train"),
        ("tools.convert_checkpoint", "from megameta.hf.export import export"),
        ("megameta", "import importlib.metadata"),
    ],
)
def test_allowed(module: str, source: str) -> None:
    assert complaints(source, module, is_package=module == PACKAGE) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megameta.model.gpt", "import numpy as np"),
        ("megameta.model.gpt", "from megameta.errors import UserError"),
        ("megameta.model.gpt", "from megameta import __version__"),
        ("megameta.model.gpt", "def f():\n    from ..config import RunConfig"),
        ("megameta.model.gpt", "import importlib\nimportlib.import_module('deepspeed')"),
        ("megameta.config", "import megameta.data.indexed"),
        ("megameta.config.validate", "from ..parallel.topology import Topology"),
        ("megameta.data.loader", "from megameta import parallel"),
        ("megameta.checkpoint.store", "from megameta.engine.engine import Engine"),
        ("megameta.checkpoint.store", "from ..hf.export import export"),
        ("megameta.hf.export", "if TYPE_CHECKING:\n    from megameta.engine.build import x"),
        ("megameta.finetune.parity", "from megameta.paper.analysis import x"),
        ("megameta.train.loop", "from megameta.commands import train"),
        ("megameta.train.run", "def f():\n    from megameta.paper.analysis.training import AttentionProbe"),
        ("megameta.finetune.examples", "from megameta.paper.tasks.definitions import TASKS"),
        ("megameta.quickstart.line", "from ..paper.tasks.generate import generate"),
        ("megameta.__main__", "from tools.convert_checkpoint import main"),
        ("megameta.corpus.readers", "import tools"),
        ("megameta.corpus.readers", "from megameta.unheard_of import x"),
        ("megameta.errors", "import megameta.config"),
        ("megameta", "from megameta.model import GPT"),
    ],
)
def test_refused(module: str, source: str) -> None:
    assert len(complaints(source, module, is_package=module == PACKAGE)) == 1
