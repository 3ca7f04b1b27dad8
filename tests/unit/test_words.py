"""What the fields of a model are for, read from the source."""

from __future__ import annotations

from pydantic import Field, create_model

from reconciler.analyze.prompt import _proposable
from reconciler.kinds.base import Strict
from reconciler.kinds.words import Described, descriptions


class Base(Strict):
    """A model."""

    size: int = 1
    """How large
    it is."""
    plain: str = ""


class Derived(Base):
    """One that says more."""

    plain: str = Field("", description="said elsewhere")
    """Not taken where the field itself says it."""


def test_texts_below_fields_are_theirs_and_inherited() -> None:
    """In the words of the source, without its indentation."""
    assert descriptions(Base) == {"size": "How large\nit is."}
    assert descriptions(Derived)["size"] == "How large\nit is."
    shown = Derived.model_json_schema(schema_generator=Described)["properties"]
    assert shown["size"]["description"] == "How large\nit is."
    assert shown["plain"]["description"] == "said elsewhere"


def test_model_that_was_made_at_run_time_has_those_of_its_base() -> None:
    """It has no source of its own."""
    made = create_model("Made", __base__=Base, more=(int, 1))
    assert descriptions(made) == descriptions(Base)


def test_analyzers_are_told_what_they_may_propose() -> None:
    """Each install method with its first sentence."""
    texts = _proposable("tool")
    assert texts is not None
    assert all(texts.values()), texts
