"""What an analyzer may answer: its shape, and the door through which an answer becomes an analysis."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from reconciler.model import Analysis

MOST_BYTES = 1_000_000
SENTENCE, PARAGRAPH = 500, 4_000
MOST_COMMANDS, MOST_WORDS, LONGEST_WORD = 10, 20, 500
_NOT_SHOWN = frozenset(
    {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
)  # controls, direction, lone surrogates, private use
_STARTS = 200  # opening braces that are tried before prose with braces counts as having no JSON in it
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL | re.IGNORECASE)


class Unavailable(Exception):  # noqa: N818 - what happened, not whose mistake it is
    """A backend has no answer that can be used; the message says why, in one line."""


def clean(text: str, longest: int, *, lines: bool = False) -> str:
    """Text that is safe to show: no control characters, nothing that turns its direction; at most ``longest``."""
    kept = "".join(
        character
        for character in text[: 4 * longest]
        if character in "\n\t" or unicodedata.category(character) not in _NOT_SHOWN
    )
    kept = kept.strip() if lines else " ".join(kept.split())
    return kept if len(kept) <= longest else kept[: longest - 1] + "…"


def _text(longest: int, *, lines: bool = False) -> BeforeValidator:
    return BeforeValidator(
        lambda found: clean(found, longest, lines=lines) if isinstance(found, str) else found
    )


def _word(text: str) -> str:
    # Not stripped: a command that is not what was proposed must not come out of the stripping.
    if not text or any(unicodedata.category(character) in _NOT_SHOWN for character in text):
        raise ValueError("a word of a command has characters that do not belong there")
    return text


_Word = Annotated[str, Field(max_length=LONGEST_WORD), AfterValidator(_word)]
_Command = Annotated[list[_Word], Field(min_length=1, max_length=MOST_WORDS)]
_Value = Annotated[str, Field(max_length=LONGEST_WORD), AfterValidator(_word)]


class Answer(BaseModel):
    """The JSON object that every backend is asked for."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    severity: int = Field(ge=1, le=5)
    root_cause: Annotated[str, _text(SENTENCE), Field(min_length=1)]
    plan: Annotated[str, _text(PARAGRAPH, lines=True)] = ""
    install: Annotated[dict[_Value, _Value | None], Field(max_length=MOST_COMMANDS)] | None = None
    commands: Annotated[list[_Command], Field(max_length=MOST_COMMANDS)] = []
    prevention: Annotated[str, _text(PARAGRAPH, lines=True)] = ""


_STRING = {"type": "string"}
FORMAT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["severity", "root_cause", "plan", "install", "commands", "prevention"],
    "properties": {
        "severity": {"type": "integer", "minimum": 1, "maximum": 5},
        "root_cause": {**_STRING, "description": "one sentence"},
        "plan": {**_STRING, "description": "what a person or the product should do"},
        "install": {"type": ["object", "null"], "additionalProperties": _STRING},
        "commands": {
            "type": "array",
            "maxItems": MOST_COMMANDS,
            "items": {"type": "array", "items": _STRING, "minItems": 1, "maxItems": MOST_WORDS},
        },
        "prevention": {**_STRING, "description": "empty unless the issue keeps recurring"},
    },
}


def parse(text: str, backend: str, *, prose: bool) -> Analysis:
    """The analysis that ``text`` is; with ``prose``, the only JSON object in it. Raises Unavailable."""
    fenced = _FENCE.fullmatch(text)
    found = _only_object(text) if prose else _object(fenced[1] if fenced else text)
    try:
        answer = Answer.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the answer"
        raise Unavailable(f"the answer has a wrong {clean(place, 60)}: {clean(first['msg'], 120)}") from None
    install = {key: value for key, value in (answer.install or {}).items() if value is not None}
    return Analysis(
        severity=answer.severity,
        root_cause=answer.root_cause,
        plan=answer.plan,
        install=install or None,
        commands=tuple(map(tuple, answer.commands)),
        prevention=answer.prevention,
        backend=backend,
    )


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_constant)


def _object(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        raise Unavailable("the answer is not JSON") from None


def _only_object(text: str) -> Any:
    """The one JSON object among words. Two are none: nobody knows which one is meant."""
    found: list[Any] = []
    at = text.find("{")
    for _ in range(_STARTS):
        if at < 0:
            break
        try:
            value, end = _DECODER.raw_decode(text, at)
            found.append(value)
        except (ValueError, RecursionError):
            end = at + 1
        at = text.find("{", end)
    if len(found) != 1:
        raise Unavailable(f"the answer has {len(found) or 'no'} JSON objects in it, not one")
    return found[0]
