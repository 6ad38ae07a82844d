"""What the documents name is there."""

import re

import pytest

from tests.support.paths import ROOT

#: What is no file or module of the repository: sources of other projects, files that commands write.
ELSEWHERE = {
    "tests/utils/test_modeling_rope_utils.py",
    "quickstart/report.md",
    "megameta.audit",
    "megameta.schema.json",
}
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "tests/README.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]
#: A file of the repository, from its root or, as tests and modules are named for short, from tests/ or megameta/.
FILE = re.compile(r"(?<![\w/.<-])([a-z_]+(?:/[\w-]+)+\.(?:py|md|yaml|sh|sbatch))\b")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    first = {
        path.name for root in (ROOT, ROOT / "megameta", ROOT / "tests") for path in root.iterdir() if path.is_dir()
    }
    named = {found for found in FILE.findall(text) if found.partition("/")[0] in first} - ELSEWHERE
    missing = [
        each for each in named if not any((ROOT / root / each).exists() for root in ("", "megameta", "tests", "docs"))
    ]
    assert not missing


def test_modules_that_are_named() -> None:
    """As imports and dotted names; CHANGELOG.md alone speaks of former ones."""
    missing = []
    for name in DOCUMENTS:
        for found in re.findall(r"\bmegameta(?:\.[a-z_]+)+\b", (ROOT / name).read_text(encoding="utf-8")):
            if found in ELSEWHERE:
                continue
            package, _, rest = found.partition(".")
            parts = [package, *rest.split(".")]
            known = [ROOT.joinpath(*parts[:count]) for count in (len(parts), len(parts) - 1) if count > 1]
            if not any(path.is_dir() or path.with_suffix(".py").is_file() for path in known):
                missing.append(f"{name}: {found}")
    assert missing == []
