"""What a pass leaves in the store: events of episodes, the condition of every resource, the pass itself."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from reconciler.attempts import after_failure
from reconciler.desired.load import Desired
from reconciler.failpoints import reached
from reconciler.kinds.registry import kinds
from reconciler.model import (
    SECRET,
    Action,
    Change,
    Drift,
    Event,
    Mode,
    Notice,
    Observation,
    Observed,
    OpenAttempt,
    Outcome,
    Repairs,
    Report,
    Resource,
    ResourceId,
    Status,
)
from reconciler.plan import suspension
from reconciler.rollout import Hold
from reconciler.store import Store, now_text
from reconciler.telling import Bell, Judgement, Silence, Teller, is_open, plain

MASS_CHANGE = "mass-change"
# Reasons of conditions: constants, so that people and programs can rely on them.
AS_DESIRED, DRIFTED, UNKNOWN = "AsDesired", "Drifted", "Unknown"


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


Issues = dict[ResourceId, tuple[tuple[Change, ...], str]]


class Recorder:
    """Writes as the pass goes: a pass that dies has told what it had begun, and the next one carries on from there.

    Everything is written under the lease. Whatever is lost of it raises LeaseLostError, and nothing is written.
    """

    def __init__(
        self,
        store: Store,
        desired: Desired,
        context: Context,
        bell: Bell | None = None,
        fleet: Mapping[str, Notice | None] | None = None,
    ) -> None:
        """``desired`` is everything declared, also what this pass does not look at; ``fleet`` is told as it is."""
        self.store, self.resources, self.limits = store, desired.resources, desired.limits
        self.context = context
        self.said = {"run": context.run_id, "revision": context.revision}
        self.conditions = store.conditions()
        self.suspensions = store.suspensions()
        self.history = store.history(self.limits, datetime.now(UTC))
        self.detected: dict[ResourceId, str] = {}
        self.teller = Teller(bell or Silence(), self.said, self.conditions, self.limits, fleet or {})

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
                        action.id, action.attempt, action.number, digest, before=tuple(map(plain, changes))
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
            self.teller.fixed(rid, now)
            return
        before = self.history.get(rid, Repairs())
        after = after_failure(before, self.resources[rid], now, random.random())  # noqa: S311 - spreads load only
        self.store.set_repairs(rid, after)
        self.teller.failed(outcome, after)

    # --- the first look ---

    def looked(self, observed: Observed, *, whole: bool) -> None:
        """What the first look of a pass brought; only a whole one can say what all resources of a kind have."""
        if whole:
            self.teller.looked(observed)

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
        changes = tuple(changes)
        recurring = kinds()[rid.kind].RECURRING
        expected = bool(changes) and all(change.field in recurring for change in changes)
        self.detected[rid] = "intended" if intended else "expected" if expected else "corrective"
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
        self.teller.judged = judged or {}
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
            self.teller.tell(report, rows, gone)
            self.store.set_pass(self._pass(report, rows))
        reached("finished")

    def _skipped(self, report: Report, remaining: Mapping[ResourceId, Drift]) -> None:
        acted = {outcome.id for outcome in report.outcomes}
        for skip in report.plan.skips:
            if skip.code == "Flapping":
                self._quarantine(skip.id, report.started)
            if skip.id not in remaining or skip.id in acted:
                continue
            known = is_open(self.conditions.get(str(skip.id)))
            self.detect(skip.id, skip.changes, skip.reason)
            if skip.code == "NeedsPerson" and not known:
                details = self._details(skip.id, skip.changes, skip.reason)
                self._event(skip.id, Status.FAILED, 3, details, 0)

    def _quarantine(self, rid: ResourceId, now: datetime) -> None:
        before = self.history.get(rid, Repairs())
        if before.quarantined_until is None or before.quarantined_until <= now:
            until = now + timedelta(seconds=self.limits.quarantine)
            self.store.set_repairs(rid, replace(before, quarantined_until=until))

    def _annotate(self) -> None:
        for rid, judgement in self.teller.judged.items():
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
            "advice": self.teller.advice(rid) if drift or status == "Unknown" else "",
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


def change_details(change: Change) -> dict[str, Any]:
    """A change as JSON, without its text diff: that can be as long as the file."""
    found = {"field": change.field, "desired": change.desired, "observed": change.observed}
    return {
        **found,
        **({} if change.fixable else {"fixable": False}),
        **({"note": change.note} if change.note else {}),
    }
