"""Personal data and secrets in text. What is found is shown masked, never in full.

Every expression is bounded: no repetition within a repetition that could match the same text in two ways, and each is
tried only on texts that a cheap look says may hold one. They find what has the form of a thing; they do not know
whether an address is in use or a key still opens something.
"""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Characters of a find that a report shows.
SHOWN = 4

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}+@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9_-])"
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])", re.ASCII)
#: International numbers with +, and North American ones with separators: 8 to 15 digits, one separator between two.
_PHONE = re.compile(
    r"(?<![\w+.-])(?:\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"
    r"|(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[.-]\d{4})(?![\w-])",
    re.ASCII,
)
_ASSIGNMENT = re.compile(
    r"(?i:password|passwd|pwd|secret|api[_-]?key|secret[_-]?key|access[_-]?token|auth[_-]?token|client[_-]?secret)"
    r"[\"']?[ \t]{0,3}(?::=|[:=])[ \t]{0,3}[\"']?([^\s\"'<>{}()$,;]{8,200}+)",
    re.ASCII,
)
_ASSIGNED_NAMES = ("passw", "pwd", "secret", "key", "token")


@dataclass(frozen=True)
class Pattern:
    """``prefix``: literals of which a text must hold one. ``accept``: a last check of a match."""

    name: str
    expression: re.Pattern[str]
    prefix: tuple[str, ...] = ()
    accept: Callable[[str], bool] = lambda match: True


def _is_ipv4(match: str) -> bool:
    return all(part == "0" or (not part.startswith("0") and int(part) < 256) for part in match.split("."))


def _is_ipv6(match: str) -> bool:
    try:
        ipaddress.IPv6Address(match)
    except ValueError:
        return False
    # A name after :: in C++ or a time of day is no address.
    return sum(bool(part) for part in match.split(":")) >= 3 and any(map(str.isdigit, match))


def _is_phone(match: str) -> bool:
    return 8 <= sum(map(str.isdigit, match)) <= 15


def _is_assigned_secret(value: str) -> bool:
    """Words of prose and names of variables follow "password:" too; keys and good passwords mix digits and letters."""
    return any(map(str.isdigit, value)) and any(map(str.isalpha, value)) and "://" not in value


def _token(name: str, expression: str, *prefix: str) -> Pattern:
    return Pattern(name, re.compile(rf"(?<![A-Za-z0-9_-])(?:{expression})(?![A-Za-z0-9_-])", re.ASCII), prefix)


PERSONAL = (
    Pattern("email", _EMAIL, ("@",)),
    Pattern("ipv4", _IPV4, (), _is_ipv4),
    Pattern("ipv6", _IPV6, (), _is_ipv6),
    Pattern("phone", _PHONE, (), _is_phone),
)
SECRETS = (
    _token("aws_access_key", "(?:AKIA|ASIA)[A-Z0-9]{16}", "AKIA", "ASIA"),
    _token("github_token", "gh[pousr]_[A-Za-z0-9]{36,255}+", "ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    _token("github_fine_grained_token", "github_pat_[A-Za-z0-9_]{22,255}+", "github_pat_"),
    Pattern(
        "private_key",
        # With the lines of the key itself, so that all of it is masked.
        re.compile(r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----[A-Za-z0-9+/=:,\s-]{0,10000}+"),
        ("PRIVATE KEY",),
    ),
    _token("slack_token", "xox[abeoprs]-[A-Za-z0-9-]{10,250}+", "xox"),
    Pattern(
        "slack_webhook",
        re.compile(r"hooks\.slack\.com/services/[A-Za-z0-9]{1,20}/[A-Za-z0-9]{1,20}/[A-Za-z0-9]{10,60}+"),
        ("hooks.slack.com",),
    ),
    _token("google_api_key", "AIza[A-Za-z0-9_-]{35}", "AIza"),
    _token("stripe_key", "[sr]k_live_[A-Za-z0-9]{16,120}+", "k_live_"),
    _token("huggingface_token", "hf_[A-Za-z0-9]{34,40}+", "hf_"),
    _token("jwt", r"eyJ[A-Za-z0-9_-]{8,4000}+\.eyJ[A-Za-z0-9_-]{8,8000}+\.[A-Za-z0-9_-]{8,2000}+", "eyJ"),
    Pattern("assigned_password", _ASSIGNMENT, (), _is_assigned_secret),
)
PATTERNS = (*PERSONAL, *SECRETS)
NAMES = tuple(pattern.name for pattern in PATTERNS)


def find(text: str, utf8: bytes) -> dict[str, list[str]]:
    """What each pattern finds in a text, unmasked; names without a find are left out. ``utf8``: the same, encoded."""
    may = _may_hold(text, utf8)
    found: dict[str, list[str]] = {}
    for pattern in PATTERNS:
        if pattern.prefix:
            if not any(prefix in text for prefix in pattern.prefix):
                continue
        elif not may[pattern.name]:
            continue
        matches = [
            match[0] for match in pattern.expression.finditer(text) if pattern.accept(match[match.re.groups])
        ]  # the value of an assignment is group 1, of all else group 0
        if matches:
            found[pattern.name] = matches
    return found


def mask(match: str) -> str:
    """The first SHOWN characters of a find and how many there are; for an assignment the name stays, not the value."""
    assigned = _ASSIGNMENT.fullmatch(match)
    value = assigned[1] if assigned else match
    name = match[: match.index(value)] if assigned else ""
    shown = value[: SHOWN if len(value) > 2 * SHOWN else 1]
    return f"{name}{shown}… ({len(value)} characters)"


def redact(text: str) -> str:
    """``text`` with every find masked."""
    for matches in find(text, text.encode("utf-8", "surrogatepass")).values():
        for match in matches:
            text = text.replace(match, mask(match))
    return text


def _may_hold(text: str, utf8: bytes) -> dict[str, bool]:
    """Whether patterns without literals are worth a search, from the places of digits, dots and colons."""
    codes = np.frombuffer(utf8, dtype=np.uint8)
    digit = (codes - np.uint8(48)) < 10
    dots = np.flatnonzero(digit[:-2] & (codes[1:-1] == 46) & digit[2:])
    colons = np.flatnonzero(codes == 58)
    places = np.flatnonzero(digit)
    lowered = text.lower() if len(colons) or b"=" in utf8 else ""
    return {
        "ipv4": len(dots) >= 3 and bool((dots[2:] - dots[:-2] <= 8).any()),
        "ipv6": bool((np.diff(colons) <= 5).any()),
        "phone": len(places) >= 8 and bool((places[7:] - places[:-7] <= 24).any()),
        "assigned_password": bool(lowered) and any(name in lowered for name in _ASSIGNED_NAMES),
    }
