"""What an audit is told: inputs, rules with their thresholds, what a filter drops."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import yaml

from megameta.errors import UserError

#: What --filter can drop a document for. "bad" documents, which cannot be read, are always dropped.
DROPS = (
    "exact",
    "normalised",
    "near",
    "gopher",
    "contaminated",
    "secrets",
    "personal",
    "blocklist",
    "hook",
    "encoding",
    "language",
)
#: E-mail addresses and telephone numbers are common in good text, so ``personal`` is asked for by name.
DEFAULT_DROPS = tuple(name for name in DROPS if name != "personal")
CLEAN_FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst")


@dataclass(frozen=True)
class Rules:
    """Thresholds. A document that is beyond one is named by that one; null (None) switches a rule off.

    The first 26 are Gopher's (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1 and table A1), with its values.
    Shares are of 1; lengths in words or characters. See quality.py and repetition.py for what each one counts.
    """

    min_words: float | None = 50
    max_words: float | None = 100_000
    min_mean_word_length: float | None = 3
    max_mean_word_length: float | None = 10
    max_hash_ratio: float | None = 0.1
    max_ellipsis_ratio: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic_words: float | None = 0.8
    min_stop_words: float | None = 2
    max_duplicate_lines: float | None = 0.30
    max_duplicate_paragraphs: float | None = 0.30
    max_duplicate_line_characters: float | None = 0.20
    max_duplicate_paragraph_characters: float | None = 0.20
    max_top_2gram: float | None = 0.20
    max_top_3gram: float | None = 0.18
    max_top_4gram: float | None = 0.16
    max_duplicate_5gram: float | None = 0.15
    max_duplicate_6gram: float | None = 0.14
    max_duplicate_7gram: float | None = 0.13
    max_duplicate_8gram: float | None = 0.12
    max_duplicate_9gram: float | None = 0.11
    max_duplicate_10gram: float | None = 0.10
    #: Damaged characters of a document, as a share (see damage.py).
    max_damage: float | None = 0.001
    #: Estimated Jaccard similarity from which two documents are near duplicates.
    near_jaccard: float | None = 0.8
    #: Share of an evaluation example's 13-grams from which a document holds it, and the corpus too.
    contaminated_share: float | None = 0.5
    #: Languages that may stay (ISO 639 codes); null: all.
    languages: tuple[str, ...] | None = None

    def threshold(self, name: str) -> float | None:
        return getattr(self, name)


@dataclass(frozen=True)
class AuditOptions:
    """What ``audit`` does; the names are those of the command's flags."""

    output: str
    inputs: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    against_keys: list[str] = field(default_factory=list)
    json_key: str = "text"
    tokenizer: str | None = None
    rules: Rules = field(default_factory=Rules)
    blocklists: list[str] = field(default_factory=list)
    hook: str | None = None
    find_languages: bool = True
    filter: bool = False
    drop: tuple[str, ...] = DEFAULT_DROPS
    clean_format: str = "jsonl"
    #: Megabytes of text in one file of the cleaned corpus; 0: one file for each source.
    shard_mb: int = 0
    workers: int = 1
    on_error: str = "stop"
    overwrite: bool = False
    seed: int = 1


def load_rules(config: str | None, settings: Sequence[str]) -> Rules:
    """Rules from a YAML file of NAME: VALUE (or none) and NAME=VALUE settings on top of it.

    Raises UserError for an unknown name, with the nearest known one, and for a value that is no threshold.
    """
    values: dict[str, Any] = {}
    if config is not None:
        try:
            with open(config, encoding="utf-8") as file:
                loaded = yaml.safe_load(file) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--config {config} cannot be read: {error}") from error
        if not isinstance(loaded, dict):
            raise UserError(f"--config {config}: expected lines of RULE: VALUE")
        values |= {name: (f"--config {config}", value) for name, value in loaded.items()}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--rule {setting}: expected NAME=VALUE, as in min_words=20")
        try:
            values[name] = ("--rule", yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise UserError(f"--rule {setting}: {text!r} is no number") from error
    known = [entry.name for entry in fields(Rules)]
    checked: dict[str, Any] = {}
    for name, (where, value) in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise UserError(f"{where}: there is no rule {name}{hint}")
        checked[name] = _checked(where, name, value)
    return replace(Rules(), **checked)


def _checked(where: str, name: str, value: Any) -> Any:
    if value is None:
        return None
    if name == "languages":
        codes = value.split(",") if isinstance(value, str) else value
        if not isinstance(codes, list) or not codes or not all(isinstance(code, str) for code in codes):
            raise UserError(f"{where}: languages: {value!r} is no list of codes; write [en, de]")
        return tuple(code.strip() for code in codes)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise UserError(f"{where}: {name}: {value!r} is no threshold; give a number of 0 or more, or null for off")
    if name in ("near_jaccard", "contaminated_share") and not 0 < value <= 1:
        raise UserError(f"{where}: {name}: {value!r} is a share, more than 0 and at most 1")
    return value
