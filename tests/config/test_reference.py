"""docs/configuration.md lists every key as the schema has it."""

import re

from megameta.config.reference import key_table
from tests.support.paths import ROOT

DOCS = ROOT / "docs"


def test_the_documented_keys_are_those_of_the_schema() -> None:
    documented = (DOCS / "configuration.md").read_text(encoding="utf-8")
    remedy = 'python -c "from megameta.config.reference import key_table; print(key_table())"'
    assert documented.endswith(key_table()), f"docs/configuration.md is out of date; its tables come from {remedy}"


def test_the_same_packages_are_asked_for_everywhere() -> None:
    """By README.md (tests/bare.sh installs what its line says), the Makefile's check, CONTRIBUTING.md and .ci/run."""
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "Makefile", "CONTRIBUTING.md")}
    found = re.search(r"^ *apt install ([a-z0-9 -]+?) *# optional: ([a-z0-9+ -]+),", texts["README.md"], re.MULTILINE)
    assert found
    needed, optional = found.groups()
    assert f"apt install {needed};" in texts["Makefile"] and f"`apt install {needed}`" in texts["CONTRIBUTING.md"]
    assert f"`{optional}`" in texts["CONTRIBUTING.md"]
    installed = (ROOT / ".ci/run").read_text(encoding="utf-8").split("apt-get install")[0].split()
    for name in f"{needed} {optional}".split():
        assert any(name in word for word in installed), f".ci/run does not install {name}"
