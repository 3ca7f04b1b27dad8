"""Every kind's model, found by looking: adding a kind edits no list."""

from __future__ import annotations

import importlib
from functools import cache

from reconciler.kinds import names
from reconciler.kinds.base import Declaration


@cache
def kinds() -> dict[str, type[Declaration]]:
    """Kind name to model, in the order in which kinds are put right on a node."""
    found: dict[str, type[Declaration]] = {}
    for name in names():
        module = importlib.import_module(f"reconciler.kinds.{name}")
        found[name] = module.DECLARATION
    return dict(sorted(found.items(), key=lambda item: item[1].ORDER))


@cache
def sections() -> dict[str, type[Declaration]]:
    """Section of the desired state (``wrappers:``) to model."""
    return {model.SECTION: model for model in kinds().values()}
