"""The table of every configuration key, for docs/configuration.md."""

from typing import Any

from megameta.config import RunConfig, config_schema


def key_table() -> str:
    """Markdown: a table a section, from the schema and the defaults."""
    schema, defaults = config_schema(), RunConfig().to_dict()
    lines: list[str] = []
    for section, entry in schema["properties"].items():
        if section in ("base", "deepspeed"):
            continue
        definition = schema["$defs"][entry["$ref"].rpartition("/")[2]]
        lines += [f"## {section}", "", "| key | default | what |", "|---|---|---|"]
        for key, field in definition["properties"].items():
            description = field.get("description", "").replace("\n", " ").replace("|", "\\|")
            lines.append(f"| `{section}.{key}` | {_shown(defaults[section][key])} | {description}{_choices(field)} |")
        lines.append("")
    lines += ["## deepspeed", "", schema["properties"]["deepspeed"]["description"]]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return "–" if value in (None, [], {}) else f"`{_written(value)}`"


def _written(value: Any) -> str:
    """As in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _choices(field: dict[str, Any]) -> str:
    found = [choice for part in (field, *field.get("anyOf", ())) for choice in part.get("enum", ())]
    return f" ({', '.join(f'`{_written(choice)}`' for choice in found)})" if found else ""
