"""Carry out actions: apply, look again, believe only what was seen, undo what did not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from reconciler import requests, runner
from reconciler.diff import diff
from reconciler.kinds.registry import kinds
from reconciler.model import (
    Action,
    Drift,
    Observation,
    Observed,
    Outcome,
    Resource,
    ResourceId,
    RunError,
    Status,
)
from reconciler.observe import Observer

UNSHOWN = "the step failed; what it said is not shown, since this resource refers to secrets"


class Converger:
    """Runs roles through Ansible and judges the result by observing again."""

    def __init__(
        self,
        settings: runner.Settings,
        observer: Observer,
        protected: Sequence[str],
        on_run: Callable[[str, int], None],
    ) -> None:
        self.settings, self.observer, self.protected, self.on_run = settings, observer, protected, on_run

    def repair(
        self,
        actions: Sequence[Action],
        resources: Mapping[ResourceId, Resource],
        before: Observed,
        attempt: str,
    ) -> tuple[list[Outcome], Observed]:
        """Apply ``actions``, verify them, undo the failures; returns outcomes and what was last seen.

        Everything declared on the nodes concerned is looked at again, since one repair can make another
        one due. Raises RunError when Ansible could not run.
        """
        wanted = [resources[action.id] for action in actions]
        errors = self._run("main", wanted, attempt)
        seen = self._look_again(wanted, resources)
        drifts = diff(resources, seen.observations)
        undone = [
            resource
            for resource in wanted
            if (_should_undo(resource, seen, drifts) or _cannot_be_believed(resource, seen, errors))
            and not kinds()[resource.id.kind].NO_ROLLBACK
        ]
        undo_errors: dict[ResourceId, str] = {}
        after = seen
        if undone:
            undo_errors = self._run("rollback", undone, attempt)
            after = seen.merged(self._look_again(undone, resources))
        first = diff(resources, before.observations)
        last = diff(resources, after.observations)
        judge = _Judge(errors, undo_errors, {r.id for r in undone}, seen, drifts, first, last)
        return [judge.outcome(action) for action in actions], after

    def _look_again(self, touched: Iterable[Resource], resources: Mapping[ResourceId, Resource]) -> Observed:
        nodes = {resource.id.node for resource in touched}
        fresh_nodes = {r.id.node for r in touched if kinds()[r.id.kind].VERIFY_FRESH}
        seen = Observed({}, {})
        for fresh, group in ((False, nodes - fresh_nodes), (True, fresh_nodes)):
            asked = [resource for rid, resource in resources.items() if rid.node in group]
            if asked:
                seen = seen.merged(self._observed(asked, fresh=fresh))
        return seen

    def _observed(self, asked: list[Resource], *, fresh: bool) -> Observed:
        """What is there now; where Ansible cannot even look any more, all of it is unknown."""
        try:
            return self.observer.observe(asked, fresh=fresh)
        except RunError as error:
            return Observed({}, {r.id: Observation(r.id, unknown=str(error)) for r in asked})

    def _run(self, tasks: str, wanted: Sequence[Resource], attempt: str) -> dict[ResourceId, str]:
        """Run one task file of the roles; returns why it failed for those for which it did."""
        by_node: dict[str, list[dict[str, Any]]] = {}
        for resource in wanted:
            request = requests.role_request(resource, attempt)
            by_node.setdefault(resource.id.node, []).append(
                {**request, "tasks": tasks, "protected": list(self.protected)}
            )
        errors: dict[ResourceId, str] = {}

        def on_result(result: runner.Result) -> None:
            message = result.data.get("msg")
            if isinstance(message, dict) and "failed" in message:
                rid = ResourceId.parse(message["failed"])
                secret = next(resource.secret for resource in wanted if resource.id == rid)
                errors[rid] = UNSHOWN if secret else str(message["reason"])
            elif result.status == "unreachable":
                for resource in wanted:
                    if resource.id.node == result.node:
                        errors.setdefault(resource.id, f"the node became unreachable: {message}")

        with runner.Workspace() as workspace:
            for name, actions in by_node.items():
                workspace.request(name, actions)
            self.on_run("converge.yml", len(by_node))
            try:
                runner.run("converge.yml", list(by_node), workspace, self.settings, on_result)
            except RunError as error:
                # Something may have been done: only looking again can tell.
                for resource in wanted:
                    errors.setdefault(resource.id, str(error))
        return errors


def _should_undo(resource: Resource, seen: Observed, drifts: Mapping[ResourceId, Drift]) -> bool:
    """Whether it was looked at and is not as desired. What could not be looked at is not touched again."""
    drift = drifts.get(resource.id)
    return seen.observations[resource.id].is_known and drift is not None and bool(drift.fixable)


class _Judge:
    """Turns what was seen before, after and after the undo into one outcome per action."""

    def __init__(  # noqa: PLR0917 - seven looks at the same resources
        self,
        errors: Mapping[ResourceId, str],
        undo_errors: Mapping[ResourceId, str],
        undone: set[ResourceId],
        seen: Observed,
        drifts: Mapping[ResourceId, Drift],
        first: Mapping[ResourceId, Drift],
        last: Mapping[ResourceId, Drift],
    ) -> None:
        self.errors, self.undo_errors, self.undone = errors, undo_errors, undone
        self.seen, self.drifts, self.first, self.last = seen, drifts, first, last

    def outcome(self, action: Action) -> Outcome:
        """fixed, failed or rolled_back, with the reason in the words of whoever failed."""
        rid, observation = action.id, self.seen.observations[action.id]
        error = self.errors.get(rid, "")
        if not observation.is_known:
            detail = "; ".join(
                part for part in (error, f"could not be verified: {observation.unknown}") if part
            )
            return Outcome(rid, Status.FAILED, detail, action.changes, 4)
        drift = self.drifts.get(rid)
        if drift is None and rid in self.undone:
            return self._undone(action, error)
        if drift is None:
            return Outcome(rid, Status.FIXED, "", action.changes, 2)
        if not drift.fixable:
            notes = "; ".join(f"{change.field}: {change.note}" for change in drift.reported)
            return Outcome(rid, Status.FAILED, f"the rest is for a person: {notes}", action.changes, 3)
        still = ", ".join(f"{change.field} is {change.observed}" for change in drift.fixable)
        reason = error or f"it ran without an error, yet {still}"
        if rid not in self.undone:
            return Outcome(rid, Status.FAILED, reason, action.changes, 4)
        return self._undone(action, reason)

    def _undone(self, action: Action, reason: str) -> Outcome:
        rid = action.id
        before, after = self.first.get(rid), self.last.get(rid)
        if rid in self.undo_errors or not _as_before(before, after):
            why = (
                self.undo_errors.get(rid)
                or f"afterwards it is neither as before nor as desired: {_seen(after)}"
            )
            return Outcome(rid, Status.FAILED, f"{reason}; the undo failed too: {why}", action.changes, 5)
        return Outcome(rid, Status.ROLLED_BACK, reason, action.changes, 3)


def _cannot_be_believed(resource: Resource, seen: Observed, errors: Mapping[ResourceId, str]) -> bool:
    """Whether its role failed and the look fell into a good moment: a service that keeps dying runs now and then."""
    unsteady = bool(kinds()[resource.id.kind].UNSTEADY)
    return unsteady and resource.id in errors and seen.observations[resource.id].is_known


def _as_before(before: Drift | None, after: Drift | None) -> bool:
    """Whether nothing differs now that did not differ in the same way before the attempt."""
    if after is None:
        return True
    known = {change.field: change.observed for change in before.changes} if before else {}
    unsteady = kinds()[after.id.kind].UNSTEADY
    return all(
        change.field in known and (change.field in unsteady or known[change.field] == change.observed)
        for change in after.changes
    )


def _seen(drift: Drift | None) -> str:
    return (
        ", ".join(f"{change.field} is {change.observed}" for change in drift.changes)
        if drift
        else "as desired"
    )
