"""pydantic's errors in the words of a person who wrote YAML, at the place where it stands."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from reconciler.desired.places import Document, Path_, suggestion
from reconciler.model import Problem

_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def kind_of(value: Any) -> str:
    """What a YAML value is, for a message."""
    return "nothing" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def problems(
    error: ValidationError, model: type[BaseModel], document: Document, base: Path_, where: str = ""
) -> Iterator[Problem]:
    """One problem per place; of a union's several complaints about one value the first is enough."""
    seen = set()
    for item in error.errors():
        path = _existing(document, base, item["loc"])
        unknown = item["type"] == "extra_forbidden"
        place = document.mark((*base, *item["loc"]) if unknown else path, key=unknown)
        if str(place) in seen:
            continue
        seen.add(str(place))
        message, hint = _words(item, model, document, path)
        yield Problem(message + where, place, hint)


def without_value(problem: Problem) -> Problem:
    """The same problem for an entry that refers to a secret: messages quote what they found."""
    return Problem(
        "this will not do; as the entry refers to a secret, what was found is not shown", problem.mark
    )


def _existing(document: Document, base: Path_, loc: tuple[int | str, ...]) -> Path_:
    path = base
    for part in loc:
        if (*path, part) in document.values:
            path = (*path, part)
    return path


def _words(  # noqa: PLR0911 - one return per kind of mistake
    item: Any, model: type[BaseModel], document: Document, path: Path_
) -> tuple[str, str]:
    loc, value = item["loc"], item.get("input")
    name = str(
        next(
            (
                part
                for part in reversed(loc)
                if isinstance(part, str) and not part.startswith(("function", "["))
            ),
            "",
        )
    )
    if item["type"] == "extra_forbidden":
        return f"unknown key {loc[-1]!r}", suggestion(str(loc[-1]), _known(model, loc[:-1]))
    if item["type"] == "missing":
        return f"{loc[-1]} is missing", ""
    if item["type"] in ("string_type", "enum", "literal_error") and not isinstance(value, str):
        raw = document.raw.get(path)
        if raw is not None and value is not None:
            name = f"an item of {path[-2]}" if isinstance(path[-1], int) else str(path[-1])
            return f"{name} is text, but YAML reads {raw} as {kind_of(value)}", f'write it in quotes: "{raw}"'
        return f"{name} is text, this is {kind_of(value)}", ""
    if item["type"] in ("enum", "literal_error"):
        expected = str(item.get("ctx", {}).get("expected", ""))
        choices = [word.strip(" '") for word in expected.replace(" or ", ",").split(",")]
        return f"{name} may be {expected}, not {value!r}", suggestion(str(value), choices)
    if item["type"] == "value_error":
        return f"{name}: {value!r} will not do", str(item["ctx"]["error"])
    if item["type"] == "string_pattern_mismatch":
        return f"{name}: {value!r} has a form that is not allowed", f"the form is {item['ctx']['pattern']}"
    if item["type"].endswith("_type"):
        wanted = str(item["msg"]).removeprefix("Input should be ").replace("a valid ", "a ")
        return f"{name} should be {wanted}, this is {kind_of(value)}", ""
    return f"{name}: {item['msg'][0].lower()}{item['msg'][1:]}", ""


def _known(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the model at ``loc`` takes."""
    current: Any = model
    for part in loc:
        if isinstance(current, type) and issubclass(current, BaseModel) and isinstance(part, str):
            found = {field.alias or key: field for key, field in current.model_fields.items()}
            if part not in found:
                break
            current = _inner(found[part].annotation)
    if isinstance(current, type) and issubclass(current, BaseModel):
        return [field.alias or key for key, field in current.model_fields.items()]
    return []


def _inner(annotation: Any) -> Any:
    """The model inside Optional[...], list[...] or dict[..., ...]; the annotation itself where there is none."""
    if not typing.get_args(annotation):
        return annotation
    for part in reversed(typing.get_args(annotation)):
        found = _inner(part)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return annotation
