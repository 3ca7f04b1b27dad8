"""What a pass leaves in the store: events of episodes, the condition of every resource, the pass itself."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from reconciler.attempts import after_failure
from reconciler.desired.load import Desired
from reconciler.failpoints import reached
from reconciler.kinds.registry import kinds
from reconciler.model import (
    SECRET,
    Action,
    Alert,
    Change,
    Drift,
    Event,
    Mode,
    Observation,
    OpenAttempt,
    Outcome,
    Repairs,
    Report,
    Resource,
    ResourceId,
    Skip,
    Status,
)
from reconciler.plan import suspension
from reconciler.rollout import Hold
from reconciler.store import Store, now_text

MASS_CHANGE = "mass-change"
# Reasons of conditions: constants, so that people and programs can rely on them.
AS_DESIRED, DRIFTED, UNKNOWN = "AsDesired", "Drifted", "Unknown"


class Bell(Protocol):
    """Where people are told of something, once per episode; called inside the store's transaction."""

    def raise_(self, alert: Alert, context: Mapping[str, Any], now: datetime) -> None:
        """Open an alert, or refresh the open one of the same key and reason."""

    def resolve(self, key: str, now: datetime, reason: str = "", only: str | None = None) -> None:
        """End the open alerts of this key."""

    def open_keys(self) -> set[str]:
        """What open alerts are about."""


class Silence:
    """Nobody is told."""

    def raise_(self, alert: Alert, context: Mapping[str, Any], now: datetime) -> None:
        """Not told."""

    def resolve(self, key: str, now: datetime, reason: str = "", only: str | None = None) -> None:
        """Nothing was told."""

    def open_keys(self) -> set[str]:
        """Nothing is open."""
        return set()


@dataclass(frozen=True)
class Context:
    """Of which pass the records are. ``epoch`` is that of its lease; ``next_in`` as in Scope.

    ``on_event`` hears of every event, for logs; it is on record only when its transaction ends well.
    """

    run_id: str
    revision: str
    epoch: int | None = None
    next_in: float | None = None
    on_event: Callable[[Event], None] = lambda _event: None


@dataclass(frozen=True)
class Judgement:
    """What an analyzer said of an issue: ``details`` for the record, ``advice`` for a person."""

    severity: int
    details: Mapping[str, Any]
    advice: str


Issues = dict[ResourceId, tuple[tuple[Change, ...], str]]


class Recorder:
    """Writes as the pass goes: a pass that dies has told what it had begun, and the next one carries on from there.

    Everything is written under the lease. Whatever is lost of it raises LeaseLostError, and nothing is written.
    """

    def __init__(self, store: Store, desired: Desired, context: Context, bell: Bell | None = None) -> None:
        """``desired`` is everything declared, also what this pass does not look at."""
        self.store, self.resources, self.limits = store, desired.resources, desired.limits
        self.context, self.bell = context, bell or Silence()
        self.said = {"run": context.run_id, "revision": context.revision}
        self.conditions = store.conditions()
        self.suspensions = store.suspensions()
        self.history = store.history(self.limits, datetime.now(UTC))
        self.detected: dict[ResourceId, str] = {}
        self.judged: Mapping[ResourceId, Judgement] = {}

    # --- attempts ---

    @property
    def epoch(self) -> int:
        """That of the lease under which everything is written."""
        return self.context.epoch or 0

    def check(self) -> None:
        """Raise LeaseLostError where another controller has taken over."""
        with self._transaction():
            pass

    def begun(self) -> list[str]:
        """Attempts without an end on record."""
        return [attempt.attempt for attempt in self.store.open_attempts()]

    def begin(self, actions: Iterable[Action], drifts: Mapping[ResourceId, Drift]) -> None:
        """Attempts begin: ``detected`` where the episode is new, then ``fixing``. One that is resumed is on record."""
        with self._transaction():
            fresh = []
            for action in (action for action in actions if not action.resumed):
                changes = drifts[action.id].changes if action.id in drifts else action.changes
                self.detect(action.id, changes, is_consequence=bool(action.because))
                self._event(
                    action.id, Status.FIXING, 2, self._details(action.id, action.changes), action.number
                )
                digest = self.resources[action.id].digest
                fresh.append(
                    OpenAttempt(
                        action.id, action.attempt, action.number, digest, before=tuple(map(_plain, changes))
                    )
                )
            self.store.begin_attempts(fresh)
        reached("begun")

    def undoing(self, ids: Iterable[ResourceId]) -> None:
        """These attempts are going to be undone."""
        with self._transaction():
            self.store.undo_begins(ids)

    def ended(self, outcomes: Sequence[Outcome]) -> None:
        """Attempts ended: exactly one terminal event each, when the next one is due, and whether somebody is told."""
        if not outcomes:
            return
        now = datetime.now(UTC)
        with self._transaction():
            for outcome in outcomes:
                details = self._details(outcome.id, outcome.changes, outcome.detail)
                if outcome.backup:
                    details["backup"] = list(outcome.backup)
                self._event(outcome.id, outcome.status, outcome.severity, details, outcome.number)
                self._count(outcome, now)
            self.store.end_attempts(outcome.id for outcome in outcomes)
        self.history = self.store.history(self.limits, now)
        reached("ended")

    def abandon(self, attempt: OpenAttempt, reason: str) -> None:
        """End an attempt that nobody will carry on with: what it was about is declared otherwise now, or not at all."""
        with self._transaction():
            changes = [change_details(change) for change in attempt.before]
            details = {**self.said, "reason": reason, "changes": changes}
            resource = self.resources.get(attempt.id)
            check_type = resource.check_type if resource else kinds()[attempt.id.kind].CHECK_TYPE
            event = Event(attempt.id, check_type, Status.FAILED, 3, details, attempt.number)
            self.store.record([event])
            self.context.on_event(event)
            self.store.end_attempts([attempt.id])
        self.history = self.store.history(self.limits, datetime.now(UTC))

    def _count(self, outcome: Outcome, now: datetime) -> None:
        rid = outcome.id
        if outcome.status is Status.FIXED:
            self.store.close_episode(rid)
            self.store.forget_repairs(rid)
            self.bell.resolve(str(rid), now)
            return
        before = self.history.get(rid, Repairs())
        after = after_failure(before, self.resources[rid], now, random.random())  # noqa: S311 - spreads load only
        self.store.set_repairs(rid, after)
        when = f"{after.next_attempt:%Y-%m-%d %H:%M %Z}" if after.next_attempt else "once"
        if outcome.severity >= 5:  # noqa: PLR2004 - an undo that failed
            advice = f"see to {rid.node}: it is neither as before nor as declared; copies: {', '.join(outcome.backup)}"
            self._alert(rid, "UndoFailed", 5, outcome.detail, advice, outcome.changes)
        elif after.exhausted:
            advice = f"tried again at {when}, or at once after: reconcile resume {rid}"
            detail = f"{after.attempts} attempts failed: {outcome.detail}"
            self._alert(rid, "RepairFailed", 4, detail, advice, outcome.changes)

    # --- episodes ---

    def detect(
        self, rid: ResourceId, changes: Iterable[Change], reason: str = "", *, is_consequence: bool = False
    ) -> None:
        """One ``detected`` per episode: not again while the last condition says that it is known."""
        before = self.conditions.get(str(rid))
        if rid in self.detected or is_open(before):
            return
        # What was never looked at in this form is there because git says so; anything else moved by itself.
        # A consequence of our own repairs is no sign that something else changes it back.
        intended = is_consequence or before is None or before["digest"] != self.resources[rid].digest
        self.detected[rid] = "intended" if intended else "corrective"
        details = self._details(rid, changes, reason)
        self._event(rid, Status.DETECTED, 2, details, 0)
        # Together with its event: a pass that dies has not opened an episode that the next one opens again.
        opened = {"changes": details["changes"], "open": True, "cause": self.detected[rid]}
        row = self._row(rid, ("False", DRIFTED, reason), opened)
        self.store.set_conditions([row])

    def _cause(self, rid: ResourceId) -> str:
        before = self.conditions.get(str(rid))
        known = str(before["details"].get("cause", "")) if before else ""
        return self.detected.get(rid) or known or "corrective"

    def _details(self, rid: ResourceId, changes: Iterable[Change], reason: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {**self.said, "cause": self._cause(rid)}
        found["changes"] = [change_details(change) for change in changes]
        return {**found, **({"reason": reason} if reason else {})}

    # --- the end of a pass ---

    def hold(self, hold: Hold | None) -> None:
        """A pass that would change too much is held, before anything is changed."""
        with self._transaction():
            details = {**asdict(hold), "digests": sorted(hold.digests)} if hold else None
            self.store.set_hold(MASS_CHANGE, details)

    def held(self) -> Hold | None:
        """The hold of the pass before."""
        found = self.store.hold(MASS_CHANGE)
        return Hold(**{**found, "digests": frozenset(found["digests"])}) if found else None

    def issues(self, report: Report) -> Issues:
        """What is new in this pass, for whoever judges it: what differed, and why nothing was done if nothing was."""
        found: Issues = {
            rid: (report.drifts[rid].changes, "") for rid in self.detected if rid in report.drifts
        }
        for skip in report.plan.skips:
            if skip.id in found or not is_open(self.conditions.get(str(skip.id))):
                found[skip.id] = (skip.changes, skip.reason)
        for outcome in report.outcomes:
            if outcome.id in found:
                found[outcome.id] = (found[outcome.id][0], outcome.detail)
        return found

    def finish(
        self,
        report: Report,
        remaining: Mapping[ResourceId, Drift],
        judged: Mapping[ResourceId, Judgement] | None = None,
    ) -> None:
        """Events for what is only told, then the condition of everything looked at, alerts, and the pass."""
        self.judged = judged or {}
        with self._transaction():
            self._skipped(report, remaining)
            self._annotate()
            reasons = {skip.id: skip.reason for skip in report.plan.skips}
            reasons |= {outcome.id: outcome.detail for outcome in report.outcomes if outcome.detail}
            rows = [self._condition(rid, report, remaining, reasons) for rid in report.observed.observations]
            self._recovered(rows, report)
            declared = {str(rid) for rid, r in self.resources.items() if r.policy.mode is not Mode.IGNORE}
            gone = [key for key in self.conditions if key not in declared]
            self.store.set_conditions(rows, forget=gone)
            self._tell(report, rows, gone)
            self.store.set_pass(self._pass(report, rows))
        reached("finished")

    def _skipped(self, report: Report, remaining: Mapping[ResourceId, Drift]) -> None:
        acted = {outcome.id for outcome in report.outcomes}
        for skip in report.plan.skips:
            if skip.id not in remaining or skip.id in acted:
                continue
            known = is_open(self.conditions.get(str(skip.id)))
            self.detect(skip.id, skip.changes, skip.reason)
            if skip.code == "NeedsPerson" and not known:
                details = self._details(skip.id, skip.changes, skip.reason)
                self._event(skip.id, Status.FAILED, 3, details, 0)

    def _annotate(self) -> None:
        for rid, judgement in self.judged.items():
            self.store.annotate(rid, judgement.severity, judgement.details)
            may_run = judgement.details.get("may_run")
            if may_run:
                backend = str(judgement.details.get("backend", ""))
                self.store.propose(rid, self.resources[rid].digest, backend, may_run)

    def _pass(self, report: Report, rows: list[dict[str, Any]]) -> dict[str, Any]:
        following = self.context.next_in
        return {
            "run_id": report.run_id,
            "started": now_text(report.started),
            "seconds": round(report.seconds, 3),
            "revision": report.revision,
            "exit_code": int(report.exit_code),
            "scope": f"{len(report.observed.nodes)} nodes, {len(rows)} resources",
            "counts": dict(Counter(row["status"] for row in rows)),
            "next": now_text(report.started + timedelta(seconds=following)) if following else None,
        }

    def _recovered(self, rows: Iterable[Mapping[str, Any]], report: Report) -> None:
        """An open episode that ended without us gets its terminal event too."""
        ours = {str(outcome.id) for outcome in report.outcomes}
        for row in rows:
            before = self.conditions.get(row["issue_key"])
            if is_open(before) and row["status"] == "True" and row["issue_key"] not in ours:
                rid = ResourceId.parse(row["issue_key"])
                reason = "it is as desired again, without our doing"
                self._event(rid, Status.FIXED, 1, self._details(rid, (), reason), 0)
                self.store.forget_repairs(rid)

    def _tell(self, report: Report, rows: Iterable[Mapping[str, Any]], gone: Iterable[str]) -> None:
        """Alerts for what stays wrong for a reason of its own; the end of those whose reason is over."""
        for skip in report.plan.skips:
            self._tell_skip(skip, report.started)
        known = self.bell.open_keys()
        for row in rows:
            if row["status"] in ("True", "False") and row["issue_key"] in known:
                only = None if row["status"] == "True" else "Unknown"
                self.bell.resolve(row["issue_key"], report.started, only=only)
            elif row["status"] == "Unknown" and self._is_for_somebody(row, report):
                rid = ResourceId.parse(row["issue_key"])
                advice = f"the node answers, but cannot say: reconcile explain {rid}"
                self._alert(rid, "Unknown", 3, row["message"], advice)
        for key in known & set(gone):
            self.bell.resolve(key, report.started, "it is not declared any more")
        self._tell_nodes(report, rows, known)
        self._tell_hold(report)

    def _tell_skip(self, skip: Skip, now: datetime) -> None:
        rid = skip.id
        if skip.code == "NeedsPerson":
            said = self._advice(rid) or f"reconcile explain {rid}"
            self._alert(rid, skip.code, 3, skip.reason, said, skip.changes)
        elif skip.code == "OnlyWarned":
            detail = "not as declared, and its mode is warn"
            self._alert(rid, skip.code, 2, detail, f"reconcile explain {rid}", skip.changes)
        elif skip.code == "Flapping":
            before = self.history.get(rid, Repairs())
            if before.quarantined_until is None or before.quarantined_until <= now:
                until = now + timedelta(seconds=self.limits.quarantine)
                self.store.set_repairs(rid, replace(before, quarantined_until=until))
            advice = f"find what changes it, then: reconcile resume {rid}"
            self._alert(rid, skip.code, 4, skip.reason, advice, skip.changes)

    def _advice(self, rid: ResourceId) -> str:
        """What an analyzer said of this episode, in this pass or when it began."""
        before = self.conditions.get(str(rid))
        known = str(before["details"].get("advice", "")) if before and is_open(before) else ""
        return self.judged[rid].advice if rid in self.judged else known

    def _tell_nodes(self, report: Report, rows: Iterable[Mapping[str, Any]], known: AbstractSet[str]) -> None:
        """A node that is silent for long enough is told of once, and once when it is back."""
        since: dict[str, str] = {}
        for row in rows:  # the last of its resources to become unknown did so when the node fell silent
            since[row["node"]] = max(since.get(row["node"], ""), row["since"])
        for state in report.observed.nodes.values():
            if state.reachable and state.node in known:
                self.bell.resolve(state.node, report.started, only="NodeUnknown")
            elif not state.reachable and self._lasted(since[state.node]):
                detail = f"no answer since {since[state.node]}: {state.reason}"
                advice = "nothing is done there until it answers; is it up, and does ssh to it work?"
                alert = Alert(state.node, "NodeUnknown", 4, detail, advice, state.node)
                self.bell.raise_(alert, self.said, report.started)

    def _tell_hold(self, report: Report) -> None:
        held = next((skip for skip in report.plan.skips if skip.code == "MassChange"), None)
        if held is None:
            if not report.limited:
                self.bell.resolve("fleet", report.started, only="MassChange")
            return
        advice = "look at the canary, then: reconcile --once --allow-mass-change"
        self.bell.raise_(Alert("fleet", "MassChange", 4, held.reason, advice), self.said, report.started)

    def _is_for_somebody(self, row: Mapping[str, Any], report: Report) -> bool:
        """Whether the node answers, and yet this could not be learnt for long enough."""
        return report.observed.nodes[row["node"]].reachable and self._lasted(row["since"])

    def _lasted(self, since: str) -> bool:
        # By now, not by the start of the pass: that was before this was noticed.
        lasted = datetime.now(UTC) - datetime.fromisoformat(since)
        return lasted >= timedelta(seconds=self.limits.unknown_alert_after)

    def _alert(  # noqa: PLR0917 - what an alert is made of
        self,
        rid: ResourceId,
        reason: str,
        severity: int,
        detail: str,
        advice: str,
        changes: Iterable[Change] = (),
    ) -> None:
        plain = tuple(map(_plain, changes))
        alert = Alert(str(rid), reason, severity, detail, advice, rid.node, plain)
        self.bell.raise_(alert, self.said, datetime.now(UTC))

    def _transaction(self) -> AbstractContextManager[None]:
        return self.store.transaction(self.context.epoch)

    def _condition(
        self,
        rid: ResourceId,
        report: Report,
        remaining: Mapping[ResourceId, Drift],
        reasons: Mapping[ResourceId, str],
    ) -> dict[str, Any]:
        observation = report.observed.observations[rid]
        before = self.conditions.get(str(rid))
        drift = remaining.get(rid)
        if not observation.is_known:
            status, reason, message = "Unknown", UNKNOWN, observation.unknown
        elif drift is not None:
            status, reason, message = "False", DRIFTED, reasons.get(rid, "")
        else:
            status, reason, message = "True", AS_DESIRED, ""
        details = {
            "changes": [change_details(change) for change in drift.changes] if drift else [],
            # An episode that was open when the node fell silent is still open when it answers again.
            "open": drift is not None or (status == "Unknown" and (is_open(before) or rid in self.detected)),
            "observed": _facts(self.resources[rid], observation),
            "suspended": self._suspension(rid, report.started),
            "cause": self._cause(rid) if drift or is_open(before) else "",
            "advice": self._advice(rid) if drift or status == "Unknown" else "",
        }
        return self._row(rid, (status, reason, message), details)

    def _row(
        self, rid: ResourceId, condition: tuple[str, str, str], details: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A condition as the store keeps it; ``since`` stays while the status does."""
        status, reason, message = condition
        before, now = self.conditions.get(str(rid)), now_text(datetime.now(UTC))
        unchanged = before is not None and before["status"] == status
        return {
            "issue_key": str(rid), "node": rid.node, "kind": rid.kind, "name": rid.name,
            "status": status, "reason": reason, "message": message,
            "since": before["since"] if before and unchanged else now, "seen": now,
            "digest": self.resources[rid].digest, "details": details,
        }  # fmt: skip

    def _suspension(self, rid: ResourceId, now: datetime) -> str | None:
        found = suspension(self.resources[rid], self.suspensions, now)
        return found.reason if found else None

    def _event(
        self, rid: ResourceId, status: Status, severity: int, details: Mapping[str, Any], attempts: int
    ) -> None:
        event = Event(rid, self.resources[rid].check_type, status, severity, details, attempts)
        self.store.record([event])
        self.context.on_event(event)


def _facts(resource: Resource, observation: Observation) -> Any:
    """What the node said, less file contents and secrets."""
    if observation.facts is None:
        return None
    if resource.secret:
        return SECRET
    file = {key: value for key, value in observation.facts.get("file", {}).items() if key != "text"}
    found = {key: value for key, value in observation.facts.items() if key not in ("text", "file")}
    return {**found, **({"file": file} if file else {})}


def is_open(condition: Mapping[str, Any] | None) -> bool:
    """Whether an episode of drift was known and not over when this condition was written."""
    return condition is not None and bool(condition["details"].get("open"))


def _plain(change: Change) -> Change:
    """A change without its text diff, which can be as long as the file."""
    return replace(change, diff="")


def change_details(change: Change) -> dict[str, Any]:
    """A change as JSON, without its text diff: that can be as long as the file."""
    found = {"field": change.field, "desired": change.desired, "observed": change.observed}
    return {
        **found,
        **({} if change.fixable else {"fixable": False}),
        **({"note": change.note} if change.note else {}),
    }
