"""From YAML files and overrides to a checked configuration; messages say where a key was given."""

import copy
import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from megameta.config.sections import RunConfig
from megameta.config.yaml_format import StrictLoader
from megameta.errors import UserError


def load_raw(path: str | os.PathLike[str], overrides: list[str] | None = None) -> dict[str, Any]:
    """A YAML file, what it is based on, and overrides, merged into plain values; nothing is checked yet but the YAML.

    Raises:
        UserError: unreadable file, bad YAML (with its line), a key given twice, a malformed override.
    """
    return apply_overrides(_read_with_bases(Path(path), ()), overrides or [])


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Plain values with each ``a.b=c`` put in its place; the values are YAML."""
    raw = copy.deepcopy(raw)
    for override in overrides:
        _apply_override(raw, override)
    return raw


def _read_with_bases(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise UserError(f"{path}: is its own base ({' → '.join(str(p) for p in chain)})")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8, so not a configuration (byte {error.start})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a configuration is a mapping of sections, not {type(raw).__name__}")
    base = raw.pop("base", None)
    raw = {section: {} if value is None else value for section, value in raw.items()}  # all its keys commented out
    if base is not None:
        raw = _merge(_read_with_bases(path.parent / str(base), (*chain, path.resolve())), raw)
    return raw


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write it as section.key=value")
    try:
        value = yaml.load(text, StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML") from error
    *sections, last = key.split(".")
    place = raw
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise UserError(f"override {override!r}: {section} is a value, not a section")
    place[last] = value


def build_config(
    raw: dict[str, Any], source: str = "configuration", locations: dict[str, str] | None = None
) -> RunConfig:
    """Typed configuration from plain values. ``locations`` says where keys were given, for messages.

    Raises:
        UserError: every unknown key (with the nearest known one) and every bad value, by key.
    """
    try:
        return RunConfig.model_validate(raw)
    except pydantic.ValidationError as error:
        problems = [_explain(problem, locations or {}) for problem in error.errors()]
        raise UserError("\n  ".join([f"{source}: {len(problems)} problem(s)", *problems])) from error


def load_config(path: str | os.PathLike[str], overrides: list[str] | None = None) -> RunConfig:
    """``build_config(load_raw(path, overrides))``."""
    return build_config(load_raw(path, overrides), str(path), key_locations(path, overrides or []))


def key_locations(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, str]:
    """Where each section.key was given: a line, from 1, of the file or of one that it is based on, or an override."""
    locations: dict[str, str] = {}

    def visit(node: yaml.Node | None, prefix: str, file: str) -> None:
        if isinstance(node, yaml.MappingNode) and prefix.count(".") < 3:
            for key_node, value_node in node.value:
                locations[f"{prefix}{key_node.value}"] = f"{file}line {key_node.start_mark.line + 1}"
                visit(value_node, f"{prefix}{key_node.value}.", file)

    def read(path: Path, file: str) -> None:
        root = yaml.compose(path.read_text(encoding="utf-8"), StrictLoader)
        entries = root.value if isinstance(root, yaml.MappingNode) else []
        for base in (value.value for key, value in entries if key.value == "base" and value.value not in ("", "null")):
            read(path.parent / base, f"{base}, ")
        visit(root, "", file)

    read(Path(path), "")
    return locations | {override.partition("=")[0]: f"override {override}" for override in overrides}


def _explain(problem: Any, locations: dict[str, str]) -> str:
    location = [str(part) for part in problem["loc"]]
    # an item of a list has no place of its own
    known = [".".join(location[:depth]) for depth in range(len(location), 0, -1)]
    where = next((f"{locations[key]}: " for key in known if key in locations), "")
    return where + _explain_key(problem, ".".join(location))


def _explain_key(problem: Any, key: str) -> str:
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = [name for name, _ in known_keys()]
        hint = nearest_key(key, known)
        return f"{key}: unknown key" + (f"; did you mean {hint}?" if hint else "")
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool | list | None) else ""
    said = problem["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list, in brackets")
    return f"{key}: {said}{shown}"


def nearest_key(key: str, known: list[str]) -> str | None:
    """The known key that the writer most likely meant: first within the section, then anywhere by its last part."""
    section = key.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    if match := difflib.get_close_matches(key, siblings, n=1, cutoff=0.75):
        return match[0]
    last = key.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in known if "." in name}
    match = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.75)
    return by_last[match[0]] if match else None


def known_keys() -> Iterator[tuple[str, str]]:
    """Every key as section.key with its description."""
    schema = config_schema()
    for section, entry in schema["properties"].items():
        reference = entry.get("$ref") or next((part["$ref"] for part in entry.get("allOf", [])), None)
        if reference is None:
            yield section, entry.get("description", "")
            continue
        yield section, ""
        for key, value in schema["$defs"][reference.rpartition("/")[2]]["properties"].items():
            yield f"{section}.{key}", value.get("description", "")


def config_schema() -> dict[str, Any]:
    """JSON schema of a configuration file, for editors (yaml-language-server)."""
    schema = RunConfig.model_json_schema()
    schema["title"] = "megameta run configuration"
    # The short forms of data.train and data.valid are written out before the model sees them: it does not know them.
    prefix, prefixes = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
    source = {"anyOf": [{"$ref": "#/$defs/Source"}, {"type": ["number", "null"]}, prefix, prefixes]}
    weighted = {"type": "array", "items": {"type": ["number", "string"]}}
    data = schema["$defs"]["DataSection"]["properties"]
    for key, several, each in (("train", weighted, source), ("valid", prefixes, {"anyOf": [prefix, prefixes]})):
        told = {name: data[key][name] for name in ("title", "description", "default")}
        data[key] = {**told, "anyOf": [prefix, several, {"type": "object", "additionalProperties": each}]}
    schema["properties"]["base"] = {"type": "string", "description": "Start from this file (relative to this one)."}
    return schema
