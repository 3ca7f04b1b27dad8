"""What leaves for an analyzer: secrets, people's names and addresses taken out. Pure.

Redaction errs on the side of taking too much out: an analyzer that has to do without a file name judges almost
as well, a key that left cannot be called back.
"""

from __future__ import annotations

import ipaddress
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from reconciler.model import SECRET

LONGEST = 2_000
CUT = "(cut here)"
DEPTH = 8
ITEMS = 50
_READ = 20_000  # what is looked through of one text: ten times what is kept
_TOO_LONG_TO_BE_A_WORD = 24
_BITS = 3.0  # per character; English words have fewer, random letters of any alphabet more

_ANYWHERE = r"pass(?:word|wd|phrase|code)|secret|token|credential|authorization|cookie|api_?key|private_?key"
_SECRET_NAME = re.compile(_ANYWHERE, re.IGNORECASE)
_SECRET_WORDS = frozenset({"key", "keys", "auth", "pass", "pwd", "pw", "pin", "bearer", "jwt", "signature"})
_NAMING = ("name", "field", "variable", "header", "key")

_PEM = re.compile(r"-----BEGIN [^-\n]{1,60}-----.*?(?:-----END [^-\n]{1,60}-----|\Z)", re.DOTALL)
_HEADER = re.compile(r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie)(\"?'?\s*[:=]\s*)[^\r\n]+")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}")
_QUOTED = r"""\"(?:[^"\\]|\\.)*(?:"|\Z)|'(?:[^'\\]|\\.)*(?:'|\Z)"""
_BLOCK = r"\[[^\]]*(?:\]|\Z)|\{[^}]*(?:\}|\Z)|[|>][-+]?[ \t]*\n(?:[ \t]+[^\n]*(?:\n|\Z))+"
_VALUE = rf"({_QUOTED}|{_BLOCK}|[^\s,;]+)"
_SHORT = r"(?<![a-z])(?:[\w.-]{0,60}[_.-])?(?:key|auth|pass|pwd|pw|pin)"
_NAME = rf"(?:[\w.-]{{0,60}}?(?:{_ANYWHERE})[\w.-]{{0,60}}|{_SHORT})"
_ASSIGNED = re.compile(rf"""(?i)({_NAME}["']?\s*(?:=|:(?!//))\s*){_VALUE}""")
_OPTION = re.compile(rf"(?i)((?<!\S)--?{_NAME}\s+){_VALUE}")
# In prose a word with a digit; without one it is more likely "password required" than a password.
_SAID = re.compile(rf"(?i)\b((?:{_ANYWHERE}|passphrase|api key)\s+(?:(?:is|was|to)\s+)?)(?=\S{{0,80}}\d)\S+")
_PROGRAMS = re.compile(
    r"(?i)(\b(?:sshpass|mysql\w*|mariadb\w*)\b[^\n]{0,200}?\s-p\s?)\S+|((?<!\S)(?:-u|--user)[ =]?[^\s:]{1,80}:)\S+"
)
_HOOKS = re.compile(r"(?i)((?:hooks\.slack\.com/services|/api/webhooks|/open-apis/bot/v\d/hook)/)\S+")
_TOKENS = re.compile(
    r"gh[a-z]_[A-Za-z0-9]{8,}|github_pat_\w{8,}|glpat-[\w-]{8,}|xox[a-z]-[\w-]{8,}|AIza[\w-]{16,}|hf_[A-Za-z0-9]{16,}"
    r"|npm_[A-Za-z0-9]{16,}|pypi-[\w-]{16,}|(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{8,}|(?<![A-Za-z])[sr]k[-_][\w-]{8,}"
    r"|(?<![\w-])eyJ[\w-]{6,}(?:\.[\w-]*){1,4}"
)
_USERINFO = re.compile(
    r"([a-z][a-z0-9+.-]{0,20}://)[^\s/@:]*:(?!\d{1,5}(?:[/?#]|$))[^\s]{0,300}@", re.IGNORECASE
)
_LONG = re.compile(r"[A-Za-z0-9+/=_-]{20,}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_CAMEL_CASE = re.compile(r"[A-Z]?[a-z]{2,14}(?:[A-Z][a-z]{2,14})*")
_WORD = re.compile(r"[a-z]{1,16}\d{0,3}|[A-Z]{1,16}|[A-Z][a-z]{1,15}|\d{1,8}")
_HOME = re.compile(r"((?:/|\\)(?:home|Users)(?:/|\\)|(?<![\w/])~)([^\s/\\\"':;,)]+)")
_V4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
_V6 = re.compile(r"(?<![\w:])[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{0,38}(?:\d{1,3}(?:\.\d{1,3}){3})?")


def redact(value: Any) -> Any:
    """The same structure, fit for JSON, less what must not leave.

    Users and addresses get numbers in the order in which they appear, the same one everywhere in ``value``.
    """
    return _Redaction().value(value)


def is_secret_name(name: str) -> bool:
    """Whether what stands under this name is a secret: ``api_key`` and ``GitHubToken``, not ``monkey``."""
    if _SECRET_NAME.search(name):
        return True
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    return any(word.lower() in _SECRET_WORDS for word in re.split(r"[^A-Za-z]+", words))


class _Redaction:
    """One value's redaction: remembers who got which placeholder."""

    def __init__(self) -> None:
        self.placeholders: dict[str, str] = {}
        self.counts: Counter[str] = Counter()

    def value(self, value: Any, depth: int = 0) -> Any:
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, bytes | bytearray):
            return f"({len(value)} bytes)"
        if isinstance(value, Mapping | AbstractSet | list | tuple):
            return self._structure(value, depth)
        if isinstance(value, float) and math.isfinite(value):
            return value
        return self.text(str(value))

    def _structure(self, value: Any, depth: int) -> Any:
        if depth > DEPTH:
            return "(nested too deeply)"
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        return self._sequence(sorted(value, key=str) if isinstance(value, AbstractSet) else value, depth)

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        # {"name": "API_TOKEN", "value": …}: the name of what is secret may itself be a value.
        names = [value[key] for key in _NAMING if isinstance(value.get(key), str)]
        named = any(is_secret_name(name) for name in names)
        found: dict[str, Any] = {}
        for key, item in itertools.islice(value.items(), ITEMS):
            hidden = is_secret_name(str(key)) or (named and key not in _NAMING)
            shown = item is None or isinstance(item, bool) or item == ""
            found[self.text(str(key))] = SECRET if hidden and not shown else self.value(item, depth + 1)
        if len(value) > ITEMS:
            found["(cut)"] = f"{len(value) - ITEMS} more"
        return found

    def _sequence(self, value: Sequence[Any], depth: int) -> list[Any]:
        found: list[Any] = []
        after_option = False
        for item in value[:ITEMS]:
            found.append(SECRET if after_option else self.value(item, depth + 1))
            is_option = isinstance(item, str) and re.fullmatch(r"--?[\w-]+", item) is not None
            after_option = is_option and is_secret_name(item)
        if len(value) > ITEMS:
            found.append(f"({len(value) - ITEMS} more)")
        return found

    def text(self, text: str) -> str:
        """A text less secrets, names and addresses, and not too long."""
        clean = without_secrets(text)
        clean = _HOME.sub(self._user, clean)
        clean = _V4.sub(self._address, clean)
        clean = _V6.sub(self._address, clean)
        if len(text) > _READ or len(clean) > LONGEST:
            return f"{clean[:LONGEST]} {CUT}"
        return clean

    def _user(self, match: re.Match[str]) -> str:
        return match[1] + self._placeholder("user", match[2])

    def _address(self, match: re.Match[str]) -> str:
        found = match[0].rstrip(":")
        try:
            address = ipaddress.ip_address(found)
        except ValueError:
            return match[0]
        if not any(character.isalnum() for character in found):
            return match[0]  # "::" stands in many texts
        return self._placeholder("ip", str(address)) + match[0][len(found) :]

    def _placeholder(self, what: str, name: str) -> str:
        key = f"{what} {name}"
        if key not in self.placeholders:
            self.counts[what] += 1
            self.placeholders[key] = f"({what}-{self.counts[what]})"
        return self.placeholders[key]


def _whole_words(text: str) -> str:
    """Less the last word: half of a secret would not be recognized."""
    return text[: max((text.rfind(blank) for blank in " \n\t"), default=-1) + 1]


def without_secrets(text: str) -> str:
    """A text for people: less secrets, with names and addresses. What is very long is cut."""
    text = text if len(text) <= _READ else _whole_words(text[:_READ])
    text = _PEM.sub(SECRET, text)
    text = _HEADER.sub(rf"\1\2{SECRET}", text)
    text = _BEARER.sub(rf"\1 {SECRET}", text)
    text = _USERINFO.sub(rf"\1{SECRET}@", text)
    text = _TOKENS.sub(SECRET, text)
    text = _ASSIGNED.sub(rf"\1{SECRET}", text)
    text = _OPTION.sub(rf"\1{SECRET}", text)
    text = _SAID.sub(rf"\1{SECRET}", text)
    text = _PROGRAMS.sub(rf"\1\2{SECRET}", text)
    text = _HOOKS.sub(rf"\1{SECRET}", text)
    return _LONG.sub(_unless_ordinary, text)


def _unless_ordinary(match: re.Match[str]) -> str:
    """Long strings that look random: a path, a slug, a digest of 64 digits or a long word stays."""
    text = match[0]
    if _DIGEST.fullmatch(text):
        return text
    # Base64 has slashes, too; what is a secret as a whole need not be one piece by piece.
    parts = re.split(r"[/=+]", text)
    words = [word for part in parts for word in re.split(r"[_-]", part) if word]
    if all(_is_word(word) for word in words):
        return text
    mixed = sum(any(map(kind, text)) for kind in (str.islower, str.isupper, str.isdigit))
    if mixed == 3 and entropy(text) > _BITS:  # noqa: PLR2004 - all three of them
        return SECRET
    if any(len(word) >= _TOO_LONG_TO_BE_A_WORD or not _is_word(word) for word in words):
        return SECRET if entropy(text) > _BITS else text
    return text


def _is_word(word: str) -> bool:
    return bool(_WORD.fullmatch(word) or _CAMEL_CASE.fullmatch(word) or _DIGEST.fullmatch(word))


def entropy(text: str) -> float:
    """Shannon's bits per character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())
