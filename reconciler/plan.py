"""Drift to actions: what will be done, in which order, and what will not and why. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import datetime
from graphlib import TopologicalSorter

from reconciler.kinds.registry import kinds
from reconciler.model import Action, Change, Drift, Mode, Observation, Plan, Resource, ResourceId, Skip


def plan(
    resources: Mapping[ResourceId, Resource],
    observations: Mapping[ResourceId, Observation],
    drifts: Mapping[ResourceId, Drift],
    now: datetime,
    attempted: AbstractSet[ResourceId] = frozenset(),
) -> Plan:
    """Everything that this pass will do, consequences included, so that ``--check`` can foretell it.

    A consequence is a repair that another one makes necessary: a service that reads a file which is about
    to be replaced has to be restarted. ``attempted`` had their turn in this pass and get no second one.
    """
    planner = _Planner(resources, observations, drifts, now, attempted)
    for rid in dependencies_first(resources):
        planner.consider(rid)
    return planner.result()


def ready(plan: Plan, attempted: AbstractSet[ResourceId]) -> tuple[Action, ...]:
    """The actions that wait for nothing any more."""
    pending = {action.id for action in plan.actions} - attempted
    return tuple(a for a in plan.actions if a.id not in attempted and not a.after & pending)


def dependencies_first(resources: Mapping[ResourceId, Resource]) -> list[ResourceId]:
    """The given order (kinds that write files come before those that read them), dependencies first."""
    graph = TopologicalSorter(
        {rid: [d for d in r.depends_on if d in resources] for rid, r in resources.items()}
    )
    order = list(graph.static_order())
    position = {rid: index for index, rid in enumerate(resources)}
    depth: dict[ResourceId, int] = {}
    for rid in order:
        depth[rid] = max((depth[d] + 1 for d in resources[rid].depends_on if d in resources), default=0)
    return sorted(order, key=lambda rid: (depth[rid], position[rid]))


@dataclass
class _Planner:
    resources: Mapping[ResourceId, Resource]
    observations: Mapping[ResourceId, Observation]
    drifts: Mapping[ResourceId, Drift]
    now: datetime
    attempted: AbstractSet[ResourceId]
    actions: dict[ResourceId, Action] = field(default_factory=dict)
    skips: dict[ResourceId, Skip] = field(default_factory=dict)

    def result(self) -> Plan:
        position = {rid: index for index, rid in enumerate(self.resources)}
        return Plan(
            tuple(sorted(self.actions.values(), key=lambda action: position[action.id])),
            tuple(sorted(self.skips.values(), key=lambda skip: position[skip.id])),
        )

    def consider(self, rid: ResourceId) -> None:
        resource, drift = self.resources[rid], self.drifts.get(rid)
        changes = drift.changes if drift else ()
        writers = self._acting_writers(resource)
        consequence = self._consequence(resource, changes, writers)
        if not changes and consequence is None:
            return
        if consequence is not None:
            changes = (*changes, consequence)
        skip = self._reason_to_skip(resource, changes)
        if skip is not None:
            self.skips[rid] = skip
            return
        after = {d for d in resource.depends_on if d in self.actions} | writers
        because = str(next(iter(sorted(writers)))) if consequence and drift is None else ""
        fixable = tuple(change for change in changes if change.fixable)
        self.actions[rid] = Action(rid, fixable, frozenset(after), because)

    def _acting_writers(self, resource: Resource) -> set[ResourceId]:
        """Planned actions of this node that will replace a file which the resource reads."""
        return {
            rid
            for rid in self.actions
            if rid.node == resource.id.node and self.resources[rid].paths_written & resource.paths_read
        }

    def _consequence(
        self, resource: Resource, changes: tuple[Change, ...], writers: set[ResourceId]
    ) -> Change | None:
        observation = self.observations.get(resource.id)
        if not writers or changes or observation is None or observation.facts is None:
            return None
        if resource.policy.mode is Mode.IGNORE:
            return None
        paths = sorted(
            path for rid in writers for path in self.resources[rid].paths_written & resource.paths_read
        )
        return kinds()[resource.id.kind].consequence(resource, observation.facts, paths[0])

    def _reason_to_skip(self, resource: Resource, changes: tuple[Change, ...]) -> Skip | None:
        rid, policy = resource.id, resource.policy
        if rid in self.attempted:
            return Skip(rid, "had its attempt in this pass", changes)
        if policy.suspend and policy.suspend.holds(self.now):
            until = f" until {policy.suspend.until:%Y-%m-%d %H:%M %Z}" if policy.suspend.until else ""
            return Skip(rid, f"suspended{until}: {policy.suspend.reason}", changes)
        if policy.mode is Mode.WARN:
            return Skip(rid, "mode is warn", changes)
        if not any(change.fixable for change in changes):
            notes = "; ".join(dict.fromkeys(change.note for change in changes if change.note))
            return Skip(rid, f"cannot be fixed by a role: {notes}", changes, is_failure=True)
        return self._blocked(resource, changes)

    def _blocked(self, resource: Resource, changes: tuple[Change, ...]) -> Skip | None:
        for dependency in resource.depends_on:
            if dependency in self.skips:
                return Skip(
                    resource.id, f"waits for {dependency}, which is not as desired", changes, is_failure=True
                )
            observation = self.observations.get(dependency)
            if observation is not None and not observation.is_known:
                return Skip(
                    resource.id, f"waits for {dependency}, whose state is unknown", changes, is_failure=True
                )
        return None
