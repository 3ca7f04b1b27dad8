"""The JSON Schema of desired-state files (draft-07, which editors understand), made from the models."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from reconciler.desired.models import Header
from reconciler.desired.references import KEYS
from reconciler.kinds.registry import sections
from reconciler.kinds.words import Described

DRAFT = "http://json-schema.org/draft-07/schema#"
HEADER_MODELS = ("Classes", "Defaults", "Limits", "PolicyFields")
_OUTER = ("title", "description", "default", "examples")
_REFERENCE = {"$ref": "#/definitions/Reference"}


def schema() -> dict[str, Any]:
    """One schema for a whole file: the header's keys and one list per kind."""
    models: list[type[BaseModel]] = [Header, *sections().values()]
    references, definitions = models_json_schema(
        [(model, "validation") for model in models], by_alias=True, schema_generator=Described
    )
    found = definitions["$defs"]
    header = found.pop("Header")
    properties = dict(header["properties"])
    for section, model in sections().items():
        reference = references[(model, "validation")]
        properties[section] = {
            "description": (model.__doc__ or "").strip(),
            "anyOf": [{"type": "array", "items": reference}, {"type": "null"}],
        }
    document: dict[str, Any] = {
        "$schema": DRAFT,
        "title": "Desired state of a fleet",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "definitions": {**found, "Reference": _reference()},
    }
    for name, definition in found.items():
        if name not in HEADER_MODELS:
            _allow_references(definition)
    text = json.dumps(document).replace("#/$defs/", "#/definitions/")
    result: dict[str, Any] = json.loads(text)
    return result


def text() -> str:
    """The schema as it is shipped."""
    return json.dumps(schema(), indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _reference() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "A value that stands elsewhere.",
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
        "properties": {key: {"type": "string", "description": what} for key, what in KEYS.items()},
    }


def _allow_references(definition: dict[str, Any]) -> None:
    """Every value but name and nodes may be a reference, also within lists and mappings."""
    for name, field in definition.get("properties", {}).items():
        if name in ("name", "nodes"):
            continue
        outer = {key: field.pop(key) for key in _OUTER if key in field}
        inner = [_inside(option) for option in field.pop("anyOf", None) or [dict(field)]]
        field.clear()
        field |= {**outer, "anyOf": [*inner, _REFERENCE]}


def _inside(option: dict[str, Any]) -> dict[str, Any]:
    found = dict(option)
    for key in ("items", "additionalProperties"):
        if isinstance(found.get(key), dict):
            found[key] = {"anyOf": [found[key], _REFERENCE]}
    return found
