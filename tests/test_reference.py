"""docs/configuration.md lists every key as the schema has it."""

from pathlib import Path

from megameta.commands.reference import key_table

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_documented_keys_are_those_of_the_schema() -> None:
    documented = (DOCS / "configuration.md").read_text(encoding="utf-8")
    remedy = 'python -c "from megameta.commands.reference import key_table; print(key_table())"'
    assert documented.endswith(key_table()), f"docs/configuration.md is out of date; its tables come from {remedy}"
