"""What the fields of a model are for: the texts below them in the source, read when somebody asks.

pydantic can read them while a class is made; every pass would then parse the source of every model first.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue


@cache
def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Field name to its text, inherited ones included."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= _own(base)
    return found


def _own(model: type[BaseModel]) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(model)))
    except (OSError, TypeError):  # made at run time: it has no source
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found = {}
    for field, text in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
        ):
            value = text.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[field.target.id] = inspect.cleandoc(value.value)
    return found


class Described(GenerateJsonSchema):
    """JSON Schema with these texts as descriptions, where a field has none of its own."""

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        """As it is, with descriptions."""
        found = super().model_schema(schema)
        model: type[BaseModel] = schema["cls"]
        texts = descriptions(model)
        for name, field in model.model_fields.items():
            shown = found.get("properties", {}).get(field.alias or name)
            if isinstance(shown, dict) and name in texts and not field.description:
                shown.setdefault("description", texts[name])
        return found
