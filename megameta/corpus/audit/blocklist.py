"""What a user forbids: lists of words, phrases and domains, and a function of their own."""

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megameta.corpus.audit.words import UNSPACED
from megameta.errors import UserError

Hook = Callable[[str, dict[str, Any]], str | None]

_TOKEN = re.compile(r"\w+")
_HAS_UNSPACED = re.compile(f"[{UNSPACED}]")
#: Characters of a hook's reason that are kept.
_REASON = 200


class Blocklist:
    """Entries (words, phrases, domains) that match case-insensitively between word boundaries.

    White space in an entry matches any white space. Entries in scripts without spaces, and those without a letter or
    digit, match anywhere. Costs follow the matches: an entry is searched for where its first word occurs.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self.entries = list(dict.fromkeys(entries))
        self._by_token: dict[str, list[str]] = {}
        self._anywhere: list[str] = []
        for entry in self.entries:
            tokens = _TOKEN.findall(entry.lower())
            if not tokens or _HAS_UNSPACED.search(entry):
                self._anywhere.append(entry)
            else:
                self._by_token.setdefault(tokens[0], []).append(entry)
        self._compiled: dict[str, re.Pattern[str]] = {}

    @classmethod
    def load(cls, files: Sequence[str]) -> "Blocklist":
        """From files of an entry a line; blank lines and lines that begin with # are skipped."""
        entries: list[str] = []
        for name in files:
            try:
                with open(name, encoding="utf-8-sig") as file:
                    lines = [line.strip() for line in file]
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--blocklist {name} cannot be read: {error}") from error
            found = [line for line in lines if line and not line.startswith("#")]
            if not found:
                raise UserError(f"--blocklist {name} has no entries: write a word, phrase or domain a line")
            entries += found
        return cls(entries)

    def begins_entry(self, token: str) -> bool:
        """Whether an entry's first word is ``token`` (lower case)."""
        return token in self._by_token

    def matches(self, text: str, listed: Sequence[str]) -> list[str]:
        """Entries found in ``text``, in the list's order. ``listed``: its words with a token that begins an entry."""
        candidates = set(self._anywhere)
        for word in listed:
            for token in _TOKEN.findall(word.lower()):
                candidates.update(self._by_token.get(token, ()))
        if not candidates:
            return []
        return [entry for entry in self.entries if entry in candidates and self._expression(entry).search(text)]

    def _expression(self, entry: str) -> re.Pattern[str]:
        compiled = self._compiled.get(entry)
        if compiled is None:
            body = r"\s+".join(map(re.escape, entry.split()))
            if entry not in self._anywhere:
                before = r"(?<!\w)" if re.match(r"\w", entry) else ""
                after = r"(?!\w)" if re.search(r"\w$", entry) else ""
                body = before + body + after
            compiled = self._compiled[entry] = re.compile(body, re.IGNORECASE)
        return compiled


def load_hook(name: str) -> Hook:
    """The function of "module:function"; modules of the current directory are found too.

    It takes (text, document) and returns None to keep the document or a reason to drop it.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise UserError(f"--hook {name}: expected module:function, as in my_rules:judge")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise UserError(f"--hook {name}: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"--hook {name}: {module_name} has no function {function_name}")
    return function


def ask_hook(hook: Hook, name: str, location: str, text: str, document: dict[str, Any]) -> str | None:
    """The hook's reason for a document, shortened, or None. Raises UserError for an error in the hook."""
    try:
        reason = hook(text, document)
    except Exception as error:  # whatever a user's function raises
        raise UserError(f"{location}: --hook {name} raised {type(error).__name__}: {error}") from error
    if reason is not None and not isinstance(reason, str):
        raise UserError(f"{location}: --hook {name} returned {type(reason).__name__}; None or a string is expected")
    return None if reason is None else reason[:_REASON]
