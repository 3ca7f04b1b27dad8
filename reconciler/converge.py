"""Carry out actions: apply, look again, believe only what was seen, undo what did not hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from reconciler import requests, runner, systemd
from reconciler.analyze.redact import without_secrets
from reconciler.desired.load import Desired
from reconciler.diff import diff
from reconciler.failpoints import reached
from reconciler.kinds.registry import kinds
from reconciler.model import (
    Action,
    Drift,
    Observation,
    Observed,
    OpenAttempt,
    Outcome,
    Resource,
    ResourceId,
    RunError,
    Status,
)
from reconciler.observe import Observer

UNDO_SECONDS = 5.0
UNSHOWN = "the step failed; what it said is not shown, since this resource refers to secrets"


class Journal(Protocol):
    """Where every step is put on record before it is taken. Its methods raise LeaseLostError."""

    @property
    def epoch(self) -> int:
        """That of the lease: nodes refuse the steps of whoever has a lower one than they have seen."""

    def check(self) -> None:
        """Whether this process may still change anything."""

    def undoing(self, ids: Iterable[ResourceId]) -> None:
        """These attempts are going to be undone."""

    def begun(self) -> list[str]:
        """Attempts without an end: what they saved on nodes is kept, however old."""


@dataclass
class _Ran:
    """What running a task file of the roles left behind: errors, and copies made on the nodes."""

    wanted: Mapping[ResourceId, Resource]
    errors: dict[ResourceId, str] = field(default_factory=dict)
    backup: dict[ResourceId, list[str]] = field(default_factory=dict)
    said: dict[ResourceId, str] = field(default_factory=dict)

    def on_result(self, result: runner.Result) -> None:
        """One task's result."""
        message = result.data.get("msg")
        if isinstance(message, dict) and "failed" in message:
            rid = ResourceId.parse(message["failed"])
            self.errors[rid] = UNSHOWN if self.wanted[rid].secret else str(message["reason"])
        elif result.status == "unreachable":
            for rid in self.wanted:
                if rid.node == result.node:
                    self.errors.setdefault(rid, f"the node became unreachable: {message}")
        elif result.data.get("name"):
            rid = ResourceId(result.node, str(result.data["role"]), str(result.data["name"]))
            self.backup[rid] = result.data.get("saved") or self.backup.get(rid, [])
            if self.wanted[rid].proposed and not self.wanted[rid].secret and result.data.get("detail"):
                # Programs print what they like: keys, too.
                self.said[rid] = f"proposed commands ran: {without_secrets(str(result.data['detail']))}"


class Converger:
    """Runs roles through Ansible and judges the result by observing again."""

    def __init__(
        self,
        settings: runner.Settings,
        observer: Observer,
        desired: Desired,
        journal: Journal,
        on_run: Callable[[str, int], None],
    ) -> None:
        self.settings, self.observer, self.journal, self.on_run = settings, observer, journal, on_run
        self.sleep: Callable[[float], None] = systemd.sleep
        self.protected, self.keep_days = list(desired.protected), desired.backup_retention_days

    def repair(
        self, actions: Sequence[Action], resources: Mapping[ResourceId, Resource], before: Observed
    ) -> tuple[list[Outcome], Observed]:
        """Apply ``actions``, verify them, undo the failures; returns outcomes and what was last seen.

        Everything declared on the nodes concerned is looked at again, since one repair can make another
        one due. What could not be looked at has no outcome: its attempt stays open, nothing is undone blindly,
        and a later pass settles it. Raises LeaseLostError.
        """
        wanted = [(_confirmed_with(action, resources), action.attempt) for action in actions]
        ran = self._run("main", wanted)
        reached("applied")
        seen = self._confirmed(wanted, resources, self._look_again(wanted, resources), ran)
        reached("verified")
        drifts = diff(resources, seen.observations)
        undone = [
            (resource, attempt)
            for resource, attempt in wanted
            if (
                _should_undo(resource, seen, drifts)
                or _cannot_be_believed(resource, seen, drifts, ran.errors)
            )
            and not kinds()[resource.id.kind].NO_ROLLBACK
        ]
        undo_errors, after = self._undo(undone, resources, seen)
        # What is there now is half the work of a pass that died: before means before that one.
        first = diff(resources, before.observations) | {
            action.id: Drift(action.id, action.before) for action in actions if action.before
        }
        last = diff(resources, after.observations)
        judge = _Judge(ran.errors, undo_errors, {r.id for r, _ in undone}, seen, drifts, first, last)
        return [
            judge.outcome(action, ran.backup.get(action.id, ()), ran.said.get(action.id, ""))
            for action in actions
            if seen.observations[action.id].is_known
        ], after

    def resume_undo(
        self, begun: Sequence[OpenAttempt], resources: Mapping[ResourceId, Resource], seen: Observed
    ) -> tuple[list[Outcome], Observed]:
        """Carry on with undos that a pass which died had begun."""
        undone = [(resources[attempt.id], attempt.attempt) for attempt in begun]
        undo_errors, after = self._undo(undone, resources, seen)
        drifts = diff(resources, seen.observations)
        first = {attempt.id: Drift(attempt.id, attempt.before) for attempt in begun if attempt.before}
        last = diff(resources, after.observations)
        why = dict.fromkeys((attempt.id for attempt in begun), "an interrupted attempt was undone")
        judge = _Judge(why, undo_errors, {attempt.id for attempt in begun}, seen, drifts, first, last)
        actions = [Action(a.id, a.before, attempt=a.attempt, number=a.number) for a in begun]
        return [judge.outcome(action, (), "") for action in actions], after

    def resume_confirm(
        self, begun: Sequence[OpenAttempt], resources: Mapping[ResourceId, Resource]
    ) -> Observed:
        """Confirm what a pass that died had applied, or let the nodes undo it; what is there then."""
        wanted = [(resources[attempt.id], attempt.attempt) for attempt in begun]
        ran = _Ran({resource.id: resource for resource, _ in wanted})
        return self._confirmed(wanted, resources, self._look_again(wanted, resources), ran)

    def _undo(
        self,
        undone: Sequence[tuple[Resource, str]],
        resources: Mapping[ResourceId, Resource],
        seen: Observed,
    ) -> tuple[dict[ResourceId, str], Observed]:
        if not undone:
            return {}, seen
        self.journal.undoing(resource.id for resource, _ in undone)
        reached("undoing")
        ran = self._run("rollback", undone)
        reached("undone")
        return ran.errors, seen.merged(self._look_again(undone, resources))

    def _confirmed(
        self,
        wanted: Sequence[tuple[Resource, str]],
        resources: Mapping[ResourceId, Resource],
        seen: Observed,
        ran: _Ran,
    ) -> Observed:
        """Confirm what could have locked us out and was seen as desired; what was not is undone by its node: wait."""
        risky = [(resource, attempt) for resource, attempt in wanted if resource.confirm_within]
        if not risky:
            return seen
        drifts = diff(resources, seen.observations)
        good = [pair for pair in risky if pair[0].id not in drifts and seen.observations[pair[0].id].is_known]
        confirmed = self._confirm(good)
        left = [
            (resource, attempt)
            for resource, attempt in risky
            if resource.id not in confirmed and (resource.id not in drifts)
        ]
        if not left:
            return seen
        for resource, _ in left:
            why = "it could not be confirmed over a new login, so the node undid it by itself"
            ran.errors[resource.id] = why
        self.sleep(max(resource.confirm_within for resource, _ in left) + UNDO_SECONDS)
        return seen.merged(self._look_again(left, resources))

    def _confirm(self, good: Sequence[tuple[Resource, str]]) -> set[ResourceId]:
        """Those that their node knows to be confirmed."""
        found: set[ResourceId] = set()
        by_node: dict[str, list[dict[str, Any]]] = {}
        for resource, attempt in good:
            by_node.setdefault(resource.id.node, []).append(requests.role_request(resource, attempt))

        def on_result(result: runner.Result) -> None:
            if result.status == "ok" and "kind" in result.data:
                found.add(ResourceId(result.node, str(result.data["kind"]), str(result.data["name"])))

        if not by_node:
            return found
        with runner.Workspace() as workspace:
            for name, actions in by_node.items():
                workspace.request(name, actions)
            self.on_run("confirm.yml", len(by_node))
            with contextlib.suppress(RunError):  # then nothing is confirmed, and the nodes undo it
                runner.run("confirm.yml", list(by_node), workspace, self.settings, on_result)
        return found

    def _look_again(
        self, touched: Iterable[tuple[Resource, str]], resources: Mapping[ResourceId, Resource]
    ) -> Observed:
        nodes = {resource.id.node for resource, _ in touched}
        fresh_nodes = {r.id.node for r, _ in touched if kinds()[r.id.kind].VERIFY_FRESH or r.confirm_within}
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

    def _run(self, tasks: str, wanted: Sequence[tuple[Resource, str]]) -> _Ran:
        """Run one task file of the roles. Raises LeaseLostError before anything is done."""
        self.journal.check()
        shared = {
            "tasks": tasks,
            "protected": self.protected,
            "controller": {
                "epoch": self.journal.epoch,
                "keep_days": self.keep_days,
                "keep": self.journal.begun(),
            },
        }
        by_node: dict[str, list[dict[str, Any]]] = {}
        for resource, attempt in wanted:
            by_node.setdefault(resource.id.node, []).append(
                {**requests.role_request(resource, attempt), **shared}
            )
        ran = _Ran({resource.id: resource for resource, _ in wanted})
        with runner.Workspace() as workspace:
            for name, actions in by_node.items():
                workspace.request(name, actions)
            self.observer.start_ahead()  # whatever comes of it will be looked at
            self.on_run("converge.yml", len(by_node))
            try:
                runner.run("converge.yml", list(by_node), workspace, self.settings, ran.on_result)
            except RunError as error:
                # Something may have been done: only looking again can tell.
                for rid in ran.wanted:
                    ran.errors.setdefault(rid, str(error))
        return ran


def _should_undo(resource: Resource, seen: Observed, drifts: Mapping[ResourceId, Drift]) -> bool:
    """Whether it was looked at and is not as desired. What could not be looked at is not touched again."""
    drift = drifts.get(resource.id)
    return seen.observations[resource.id].is_known and drift is not None and bool(drift.fixable)


def _confirmed_with(action: Action, resources: Mapping[ResourceId, Resource]) -> Resource:
    """The resource, confirmed no sooner than what made its repair necessary: both are undone, or none."""
    resource = resources[action.id]
    if kinds()[action.id.kind].NO_ROLLBACK:
        return resource
    longest = max((resources[rid].confirm_within for rid in action.writers), default=0.0)
    # A little later: what is restarted has to read the file that was put back.
    later = longest + 1 if longest else 0.0
    return replace(resource, confirm_within=max(resource.confirm_within, later))


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

    def outcome(self, action: Action, backup: Sequence[str], said: str) -> Outcome:
        """fixed, failed or rolled_back, with the reason in the words of whoever failed."""
        found = self._judged(action)
        detail = "; ".join(filter(None, [found.detail, said]))
        return replace(found, detail=detail, number=action.number, backup=tuple(backup))

    def _judged(self, action: Action) -> Outcome:
        rid = action.id
        error = self.errors.get(rid, "")
        drift = self.drifts.get(rid)
        if drift is None and rid in self.undone:
            return self._undone(action, error)
        if drift is None:
            failed = sorted(str(writer) for writer in action.writers & set(self.drifts))
            detail = f"nothing was to be done, since {failed[0]} is not as declared" if failed else ""
            return Outcome(rid, Status.FIXED, detail, action.changes, 2)
        if not drift.fixable:
            notes = ", ".join(
                f"{change.field} is {change.observed} ({change.note})" for change in drift.reported
            )
            rest = f"only a person can put this right: {notes}"
            return Outcome(rid, Status.FAILED, error or rest, action.changes, 3)
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


def _cannot_be_believed(
    resource: Resource, seen: Observed, drifts: Mapping[ResourceId, Drift], errors: Mapping[ResourceId, str]
) -> bool:
    """Whether its role failed and the look fell into a good moment: a service that keeps dying runs now and then.

    Where something is left that only a person can put right, the role fails for that, and what it did stays.
    """
    unsteady = bool(kinds()[resource.id.kind].UNSTEADY) and resource.id not in drifts
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
