"""What a pass leaves in the store: events of episodes, the condition of every resource, the pass itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from reconciler.model import (
    SECRET,
    Action,
    Change,
    Drift,
    Event,
    Observation,
    Outcome,
    Report,
    Resource,
    ResourceId,
    Status,
)
from reconciler.store import Store, now_text

# Reasons of conditions: constants, so that people and programs can rely on them.
AS_DESIRED, DRIFTED, UNKNOWN = "AsDesired", "Drifted", "Unknown"


class Recorder:
    """Writes as the pass goes, so that a pass that dies has told what it had begun."""

    def __init__(
        self,
        store: Store,
        resources: Mapping[ResourceId, Resource],
        run_id: str,
        revision: str,
        next_in: float | None = None,
    ) -> None:
        """``resources`` is everything declared, also what this pass does not look at; ``next_in`` as in Scope."""
        self.next_in = next_in
        self.store, self.resources = store, resources
        self.context = {"run": run_id, "revision": revision}
        self.conditions = store.conditions()
        self.detected: set[ResourceId] = set()

    def fixing(self, actions: Iterable[Action], drifts: Mapping[ResourceId, Drift]) -> None:
        """An attempt begins: ``detected`` where the episode is new, then ``fixing``."""
        for action in actions:
            self.detect(action.id, drifts[action.id].changes if action.id in drifts else action.changes)
            attempts = self.store.attempts(str(action.id)) + 1
            details = {**self.context, "changes": [change_details(change) for change in action.changes]}
            self._event(action.id, Status.FIXING, 2, details, attempts)

    def ended(self, outcomes: Iterable[Outcome], _drifts: Mapping[ResourceId, Drift]) -> None:
        """An attempt ended: exactly one terminal event."""
        for outcome in outcomes:
            details: dict[str, Any] = {
                **self.context,
                "changes": [change_details(c) for c in outcome.changes],
            }
            if outcome.detail:
                details["reason"] = outcome.detail
            attempts = self.store.attempts(str(outcome.id))
            self._event(outcome.id, outcome.status, outcome.severity, details, attempts)

    def detect(self, rid: ResourceId, changes: Iterable[Change], reason: str = "") -> None:
        """One ``detected`` per episode: not again while the last condition says that it is known."""
        before = self.conditions.get(str(rid))
        if rid in self.detected or is_open(before):
            return
        self.detected.add(rid)
        intended = before is not None and before["digest"] != self.resources[rid].digest
        details = {
            **self.context,
            "changes": [change_details(change) for change in changes],
            "cause": "intended" if intended else "corrective",
        }
        self._event(rid, Status.DETECTED, 2, {**details, **({"reason": reason} if reason else {})}, 0)

    def finish(self, report: Report, remaining: Mapping[ResourceId, Drift]) -> None:
        """Events for what is only told, then the condition of everything looked at, then the pass."""
        reasons = {skip.id: skip.reason for skip in report.plan.skips}
        for skip in report.plan.skips:
            if skip.id in remaining and skip.id not in {outcome.id for outcome in report.outcomes}:
                known = is_open(self.conditions.get(str(skip.id)))
                self.detect(skip.id, skip.changes, skip.reason)
                if skip.is_failure and not known:
                    changes = [change_details(change) for change in skip.changes]
                    details = {**self.context, "reason": skip.reason, "changes": changes}
                    self._event(skip.id, Status.FAILED, 3, details, 0)
        reasons |= {outcome.id: outcome.detail for outcome in report.outcomes if outcome.detail}
        rows = [self._condition(rid, report, remaining, reasons) for rid in report.observed.observations]
        self._recovered(rows, report)
        declared = {str(rid) for rid in self.resources}
        self.store.set_conditions(rows, forget=[key for key in self.conditions if key not in declared])
        self.store.set_pass(
            {
                "run_id": report.run_id,
                "started": now_text(report.started),
                "seconds": round(report.seconds, 3),
                "revision": report.revision,
                "exit_code": int(report.exit_code),
                "scope": f"{len(report.observed.nodes)} nodes, {len(rows)} resources",
                "counts": dict(Counter(row["status"] for row in rows)),
                "next": now_text(report.started + timedelta(seconds=self.next_in)) if self.next_in else None,
            }
        )

    def _recovered(self, rows: Iterable[Mapping[str, Any]], report: Report) -> None:
        """An open episode that ended without us gets its terminal event too."""
        ours = {str(outcome.id) for outcome in report.outcomes}
        for row in rows:
            before = self.conditions.get(row["issue_key"])
            if is_open(before) and row["status"] == "True" and row["issue_key"] not in ours:
                details = {
                    **self.context,
                    "reason": "it is as desired again, without our doing",
                    "changes": [],
                }
                self._event(ResourceId.parse(row["issue_key"]), Status.FIXED, 1, details, 0)

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
        now = now_text(datetime.now(UTC))
        unchanged = before is not None and before["status"] == status
        return {
            "issue_key": str(rid), "node": rid.node, "kind": rid.kind, "name": rid.name,
            "status": status, "reason": reason, "message": message,
            "since": before["since"] if before and unchanged else now, "seen": now,
            "digest": self.resources[rid].digest,
            "details": {
                "changes": [change_details(change) for change in drift.changes] if drift else [],
                # An episode that was open when the node fell silent is still open when it answers again.
                "open": drift is not None or (status == "Unknown" and is_open(before)),
                "observed": _facts(self.resources[rid], observation),
                "suspended": _suspension(self.resources[rid], report.started),
            },
        }  # fmt: skip

    def _event(
        self, rid: ResourceId, status: Status, severity: int, details: Mapping[str, Any], attempts: int
    ) -> None:
        self.store.record([Event(rid, self.resources[rid].check_type, status, severity, details, attempts)])


def _facts(resource: Resource, observation: Observation) -> Any:
    """What the node said, less file contents and secrets."""
    if observation.facts is None:
        return None
    if resource.secret:
        return SECRET
    file = {key: value for key, value in observation.facts.get("file", {}).items() if key != "text"}
    found = {key: value for key, value in observation.facts.items() if key not in ("text", "file")}
    return {**found, **({"file": file} if file else {})}


def _suspension(resource: Resource, now: datetime) -> str | None:
    suspend = resource.policy.suspend
    return suspend.reason if suspend and suspend.holds(now) else None


def is_open(condition: Mapping[str, Any] | None) -> bool:
    """Whether an episode of drift was known and not over when this condition was written."""
    return condition is not None and bool(condition["details"].get("open"))


def change_details(change: Change) -> dict[str, Any]:
    """A change as JSON, without its text diff: that can be as long as the file."""
    found = {"field": change.field, "desired": change.desired, "observed": change.observed}
    return {
        **found,
        **({} if change.fixable else {"fixable": False}),
        **({"note": change.note} if change.note else {}),
    }
