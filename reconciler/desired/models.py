"""What may stand at the top of a desired-state file, besides the kinds' own sections."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, create_model

from reconciler.kinds.base import PolicyFields, Strict
from reconciler.kinds.registry import kinds

# Never written to, whatever is declared: people and other programs own these files.
ALWAYS_PROTECTED = ("~/.ssh/config", "nodes.json", "projects.json")


def _share(text: str) -> str:
    if not re.fullmatch(r"\d{1,3}%|\d+", text):
        raise ValueError('write a share such as "30%" or a number of nodes such as "5"')
    return text


class Limits(Strict):
    """Guards over a whole pass."""

    max_changed_nodes: Annotated[str, AfterValidator(_share)] = Field("100%", examples=["30%", "5"])
    """The largest part of the fleet that one pass may change."""


def _defaults_model() -> type[PolicyFields]:
    """Defaults for all resources, and per kind."""
    per_kind: dict[str, Any] = {
        f"{name}_": (
            PolicyFields | None,
            Field(None, alias=name, description=f"Defaults for the kind {name}."),
        )
        for name in kinds()
    }
    model = create_model("Defaults", __base__=PolicyFields, **per_kind)
    model.__doc__ = "How drift is treated where a resource does not say."
    return model


Defaults = _defaults_model()


class Header(Strict):
    """The settings of a fleet; each may stand in one of the files only."""

    defaults: Defaults | None = None  # type: ignore[valid-type]
    """How drift is treated where a resource does not say."""
    limits: Limits | None = None
    """Guards over a whole pass."""
    protected: list[str] | None = Field(None, examples=[["~/.ssh/authorized_keys", "projects.json"]])
    """Paths, glob patterns or bare file names that are never written to, on any node."""
