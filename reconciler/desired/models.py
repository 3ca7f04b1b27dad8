"""What may stand at the top of a desired-state file, besides the kinds' own sections."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, create_model

from reconciler.kinds.base import Duration, PolicyFields, Strict
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
    """The largest part of the fleet that one pass may change. A pass that would change more changes one node."""
    batch_size: Annotated[str, AfterValidator(_share)] = Field("50%", examples=["25%", "10"])
    """After the first node, how many nodes get the same change at once."""
    max_corrections: int = Field(5, ge=1, le=1000, examples=[5])
    """How often a resource may be put right within the window before it is left alone, with an alert."""
    corrections_window: Duration = Field("1h", examples=["1h"])
    """The window in which corrections are counted."""
    quarantine: Duration = Field("1d", examples=["1d"])
    """How long a resource is left alone that something else keeps changing back."""
    unknown_alert_after: Duration = Field("15m", examples=["15m"])
    """How long a node may be silent, or a resource unknown, before somebody is told."""


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


def _classes_model() -> type[Strict]:
    """Named classes of entries, by section, for the kinds that have them."""
    per_section: dict[str, Any] = {
        model.SECTION: (
            dict[str, model.CLASSES] | None,  # type: ignore[name-defined]
            Field(
                None, description=f"Classes of {model.SECTION}: what is said here replaces what is built in."
            ),
        )
        for model in kinds().values()
        if model.CLASSES
    }
    found = create_model("Classes", __base__=Strict, **per_section)
    found.__doc__ = "What entries that name a class have in common."
    return found


Classes = _classes_model()


class Header(Strict):
    """The settings of a fleet; each may stand in one of the files only."""

    defaults: Defaults | None = None  # type: ignore[valid-type]
    """How drift is treated where a resource does not say."""
    classes: Classes | None = None  # type: ignore[valid-type]
    """What entries that name a class have in common, where it differs from what is built in."""
    limits: Limits | None = None
    """Guards over a whole pass."""
    protected: list[str] | None = Field(None, examples=[["~/.ssh/authorized_keys", "projects.json"]])
    """Paths, glob patterns or bare file names that are never written to, on any node."""
    backup_retention_days: int | None = Field(None, ge=1, le=3650, examples=[7])
    """How long copies that were made before a change stay on the node (7 where nothing is said)."""
