"""Desired against observed: which declared fields differ. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from reconciler.kinds.registry import kinds
from reconciler.model import SECRET, Change, Drift, Mode, Observation, Resource, ResourceId


def diff(
    resources: Mapping[ResourceId, Resource], observations: Mapping[ResourceId, Observation]
) -> dict[ResourceId, Drift]:
    """Drift per resource, in the order of ``resources``. What is unknown or ignored has none."""
    found = {}
    for rid, resource in resources.items():
        observation = observations.get(rid)
        if observation is None or observation.facts is None or resource.policy.mode is Mode.IGNORE:
            continue
        changes = kinds()[rid.kind].changes(resource, observation.facts)
        if changes:
            found[rid] = Drift(rid, tuple(_shown(resource, change) for change in changes))
    return found


def _shown(resource: Resource, change: Change) -> Change:
    """Values of a resource that refers to secrets never leave this function."""
    if resource.proposed:
        change = replace(change, fixable=True)
    if not resource.secret:
        return change
    return Change(change.field, SECRET, SECRET, change.fixable, change.note)
