"""Drift to actions: what will be done, in which order, and what will not and why. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from graphlib import TopologicalSorter

from reconciler import windows
from reconciler.attempts import is_due, is_flapping
from reconciler.kinds.registry import kinds
from reconciler.model import (
    Action,
    Change,
    Drift,
    Limits,
    Mode,
    Observation,
    Outcome,
    Plan,
    Repairs,
    Resource,
    ResourceId,
    Skip,
    Suspension,
)
from reconciler.rollout import Hold, stopped


@dataclass(frozen=True)
class Situation:
    """All that a plan depends on besides what is declared and what was seen.

    ``started`` is when the pass began; ``outcomes`` is what it has done so far, ``tried`` also what it could not
    verify; ``suspensions`` are those of the command line, by target; ``retry`` tries at once what would wait.
    """

    now: datetime
    started: datetime
    attempt: str = ""
    history: Mapping[ResourceId, Repairs] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    tried: frozenset[ResourceId] = frozenset()
    suspensions: Mapping[str, Suspension] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    hold: Hold | None = None
    retry: bool = False


def plan(
    resources: Mapping[ResourceId, Resource],
    observations: Mapping[ResourceId, Observation],
    drifts: Mapping[ResourceId, Drift],
    situation: Situation,
) -> Plan:
    """Everything that this pass will do, consequences included, so that ``--check`` can foretell it.

    A consequence is a repair that another one makes necessary: a service that reads a file which is about
    to be replaced has to be restarted. What had its turn in this pass gets no second one.
    """
    planner = _Planner(resources, observations, drifts, situation)
    for rid in dependencies_first(resources):
        planner.consider(rid)
    return planner.result()


def suspension(resource: Resource, suspensions: Mapping[str, Suspension], now: datetime) -> Suspension | None:
    """The suspension that holds for a resource at ``now``: its declaration's, or one from the command line."""
    declared = resource.policy.suspend
    if declared and declared.holds(now):
        return declared
    return suspended_by(resource.id, suspensions, now)


def suspended_by(rid: ResourceId, suspensions: Mapping[str, Suspension], now: datetime) -> Suspension | None:
    """The suspension from the command line that covers a resource at ``now``."""
    for target, found in suspensions.items():
        if found.holds(now) and covers(target, rid):
            return found
    return None


def covers(target: str, rid: ResourceId) -> bool:
    """Whether ``NODE``, ``NODE/KIND`` or ``NODE/KIND/NAME``, each part possibly with ``*``, means a resource."""
    parts = target.split("/", 2)
    return all(
        fnmatchcase(have, wanted) for have, wanted in zip((rid.node, rid.kind, rid.name), parts, strict=False)
    )


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
    situation: Situation
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
        skip = self._reason_to_skip(resource, changes, is_consequence=consequence is not None)
        if skip is not None:
            self.skips[rid] = skip
            return
        after = {d for d in resource.depends_on if d in self.actions} | writers
        because = str(next(iter(sorted(writers)))) if consequence and drift is None else ""
        fixable = tuple(change for change in changes if change.fixable)
        repairs = self.situation.history.get(rid, Repairs())
        begun = repairs.open if repairs.open and repairs.open.digest == resource.digest else None
        number = repairs.attempts + 1 if repairs.digest == resource.digest else 1
        self.actions[rid] = Action(
            rid,
            fixable,
            frozenset(after),
            because,
            attempt=begun.attempt if begun else self.situation.attempt,
            number=begun.number if begun else number,
            resumed=begun is not None,
            is_risky=resource.confirm_within > 0,
            writers=frozenset(writers),
            before=begun.before if begun else (),
        )

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

    def _reason_to_skip(
        self, resource: Resource, changes: tuple[Change, ...], *, is_consequence: bool
    ) -> Skip | None:
        """The first reason that applies: people's wishes before rules, rules before the state of others."""
        return (
            self._had_its_turn(resource, changes)
            or self._unwanted(resource, changes)
            or self._not_now(resource, changes, is_consequence=is_consequence)
            or self._held(resource, changes)
            or self._blocked(resource, changes)
        )

    def _had_its_turn(self, resource: Resource, changes: tuple[Change, ...]) -> Skip | None:
        rid, situation = resource.id, self.situation
        if rid in situation.tried or any(outcome.id == rid for outcome in situation.outcomes):
            return Skip(resource.id, "had its attempt in this pass", changes, code="Attempted")
        return None

    def _unwanted(self, resource: Resource, changes: tuple[Change, ...]) -> Skip | None:
        """Somebody said that it is to be left alone, or only somebody can put it right."""
        found = suspension(resource, self.situation.suspensions, self.situation.now)
        if found:
            until = f" until {found.until:%Y-%m-%d %H:%M %Z}" if found.until else ""
            by = f" by {found.owner}" if found.owner else ""
            return Skip(resource.id, f"suspended{by}{until}: {found.reason}", changes, code="Suspended")
        if resource.policy.mode is Mode.WARN:
            return Skip(resource.id, "mode is warn", changes, code="OnlyWarned")
        if not any(change.fixable for change in changes):
            notes = "; ".join(dict.fromkeys(change.note for change in changes if change.note))
            reason = f"cannot be fixed by a role: {notes}"
            return Skip(resource.id, reason, changes, is_failure=True, code="NeedsPerson")
        return None

    def _not_now(
        self, resource: Resource, changes: tuple[Change, ...], *, is_consequence: bool
    ) -> Skip | None:
        """Another time: after the back-off, the quarantine, or inside the window.

        A consequence does not wait for its own back-off: it was the other one that failed and is tried again.
        """
        situation, policy = self.situation, resource.policy
        repairs = situation.history.get(resource.id, Repairs())
        if is_flapping(repairs, situation.limits, situation.now):
            times = max(repairs.corrections, situation.limits.max_corrections)
            reason = (
                f"put right {times} times lately and changed back each time: something else is changing it"
            )
            return Skip(resource.id, reason, changes, is_failure=True, code="Flapping")
        waits = not is_due(repairs, resource, situation.now)
        if waits and not situation.retry and not is_consequence:
            reason = f"{repairs.attempts} failed in a row; next attempt at {repairs.next_attempt:%Y-%m-%d %H:%M:%S %Z}"
            code = "AttemptsExhausted" if repairs.exhausted else "BackOff"
            return Skip(resource.id, reason, changes, is_failure=True, code=code)
        if policy.window:
            moment = situation.started if policy.window.finish else situation.now
            if not windows.is_open(policy.window, moment):
                opening = windows.next_opening(policy.window, situation.now)
                at = f"{opening:%Y-%m-%d %H:%M %Z}" if opening else "no time that ever comes"
                reason = f"outside its maintenance window, which opens at {at}"
                return Skip(resource.id, reason, changes, code="OutsideWindow")
        return None

    def _held(self, resource: Resource, changes: tuple[Change, ...]) -> Skip | None:
        """Something is wrong with the change itself: too many nodes at once, or it failed elsewhere."""
        rid, hold = resource.id, self.situation.hold
        if not kinds()[rid.kind].CHANGES_NODE:
            return None
        if hold and rid.node != hold.canary:
            return Skip(rid, hold.reason, changes, is_failure=True, code="MassChange")
        reason = stopped(rid, self.situation.outcomes)
        if reason:
            return Skip(rid, reason, changes, is_failure=True, code="RolloutStopped")
        return None

    def _blocked(self, resource: Resource, changes: tuple[Change, ...]) -> Skip | None:
        for dependency in resource.depends_on:
            if dependency in self.skips:
                reason = f"waits for {dependency}, which is not as desired"
                return Skip(resource.id, reason, changes, is_failure=True, code="DependencyNotReady")
            observation = self.observations.get(dependency)
            if observation is not None and not observation.is_known:
                reason = f"waits for {dependency}, whose state is unknown"
                return Skip(resource.id, reason, changes, is_failure=True, code="DependencyNotReady")
        return None
