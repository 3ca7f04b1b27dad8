"""Who hears of what a pass found: alerts that begin, go on and end. It decides nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from reconciler.kinds.registry import kinds
from reconciler.model import (
    Alert,
    Change,
    CommonCause,
    Limits,
    Notice,
    Observed,
    Outcome,
    Repairs,
    Report,
    ResourceId,
    Skip,
)

UNDO_FAILED = 5  # the severity of an undo that failed


class Bell(Protocol):
    """Where people are told of something, once per episode; called inside the store's transaction."""

    def raise_(self, alert: Alert, context: Mapping[str, Any], now: datetime) -> None:
        """Open an alert, or refresh the open one of the same key and reason."""

    def resolve(
        self,
        key: str,
        now: datetime,
        reason: str = "",
        only: str | None = None,
        keep: Collection[str] = (),
    ) -> None:
        """End the open alerts of this key."""

    def open_keys(self) -> set[str]:
        """What open alerts are about."""


class Silence:
    """Nobody is told."""

    def raise_(self, alert: Alert, context: Mapping[str, Any], now: datetime) -> None:
        """Not told."""

    def resolve(
        self,
        key: str,
        now: datetime,
        reason: str = "",
        only: str | None = None,
        keep: Collection[str] = (),
    ) -> None:
        """Nothing was told."""

    def open_keys(self) -> set[str]:
        """Nothing is open."""
        return set()


@dataclass(frozen=True)
class Judgement:
    """What an analyzer said of an issue: ``details`` for the record, ``advice`` for a person."""

    severity: int
    details: Mapping[str, Any]
    advice: str


class Teller:
    """Raises and resolves alerts for one pass. ``said`` is its run and revision; ``conditions`` are those before it.

    ``fleet`` has, by reason, what is told of the fleet as a whole; None ends it.
    """

    def __init__(
        self,
        bell: Bell,
        said: Mapping[str, Any],
        conditions: Mapping[str, Mapping[str, Any]],
        limits: Limits,
        fleet: Mapping[str, Notice | None],
    ) -> None:
        self.bell, self.said, self.conditions, self.limits = bell, said, conditions, limits
        self.fleet = fleet
        self.judged: Mapping[ResourceId, Judgement] = {}
        self.common: Mapping[str, CommonCause | None] = {}

    # --- the first look ---

    def looked(self, observed: Observed) -> None:
        """What a whole look says of all resources of a kind, before anything is put right: it is told at the end."""
        self.common = {
            kind: model.common_cause(
                {o.id: o.facts for o in observed.observations.values() if o.id.kind == kind and o.facts}
            )
            for kind, model in kinds().items()
        }

    def _is_common(self, rid: ResourceId, changes: Iterable[Change]) -> bool:
        """Whether it differs in nothing but what the cause that all share explains."""
        cause = self.common.get(rid.kind)
        return cause is not None and {change.field for change in changes} <= cause.fields

    # --- attempts, as they end ---

    def fixed(self, rid: ResourceId, now: datetime) -> None:
        """Whatever was wrong with it is over; what people were to hear of besides is judged at the end."""
        self.bell.resolve(str(rid), now, keep=kinds()[rid.kind].NOTICES)

    def failed(self, outcome: Outcome, after: Repairs) -> None:
        """An attempt failed; ``after`` is when the next one is due. Told where it is the last, or left damage."""
        rid = outcome.id
        when = f"{after.next_attempt:%Y-%m-%d %H:%M %Z}" if after.next_attempt else "once"
        if outcome.severity >= UNDO_FAILED:
            advice = f"see to {rid.node}: it is neither as before nor as declared; copies: {', '.join(outcome.backup)}"
            self._alert(rid, "UndoFailed", UNDO_FAILED, outcome.detail, advice, outcome.changes)
        elif after.exhausted and not self._is_common(rid, outcome.changes):
            advice = f"tried again at {when}, or at once after: reconcile resume {rid}"
            detail = f"{after.attempts} attempts failed: {outcome.detail}"
            self._alert(rid, "RepairFailed", 4, detail, advice, outcome.changes)

    # --- the end of a pass ---

    def tell(self, report: Report, rows: Iterable[Mapping[str, Any]], gone: Iterable[str]) -> None:
        """Alerts for what stays wrong for a reason of its own; the end of those whose reason is over."""
        known = self.bell.open_keys()
        for skip in report.plan.skips:
            if not self._is_common(skip.id, skip.changes):
                self._tell_skip(skip, known)
        for row in rows:
            if row["status"] in ("True", "False") and row["issue_key"] in known:
                only, keep = None if row["status"] == "True" else "Unknown", kinds()[row["kind"]].NOTICES
                self.bell.resolve(row["issue_key"], report.started, only=only, keep=keep)
            elif row["status"] == "Unknown" and self._is_for_somebody(row, report):
                rid = ResourceId.parse(row["issue_key"])
                advice = f"the node answers, but cannot say: reconcile explain {rid}"
                self._alert(rid, "Unknown", 3, row["message"], advice)
        for key in known & set(gone):
            self.bell.resolve(key, report.started, "it is not declared any more")
        self._tell_notices(report, known)
        self._tell_fleet(report)
        self._tell_nodes(report, rows, known)
        self._tell_hold(report)

    def advice(self, rid: ResourceId) -> str:
        """What an analyzer said of this episode, in this pass or when it began."""
        before = self.conditions.get(str(rid))
        known = str(before["details"].get("advice", "")) if before and is_open(before) else ""
        return self.judged[rid].advice if rid in self.judged else known

    def _tell_notices(self, report: Report, known: AbstractSet[str]) -> None:
        """What the nodes say now; what a silent one said last is neither repeated nor over."""
        for rid, observation in report.observed.observations.items():
            model = kinds()[rid.kind]
            if observation.facts is None or not model.NOTICES:
                continue
            found = model.notices(report.resources[rid], observation.facts)
            for notice in found:
                advice = notice.advice or f"reconcile explain {rid}"
                alert = Alert(str(rid), notice.reason, notice.severity, notice.detail, advice, rid.node)
                self.bell.raise_(replace(alert, to=notice.to), self.said, report.started)
            for reason in set(model.NOTICES) - {notice.reason for notice in found}:
                if str(rid) in known:
                    self.bell.resolve(str(rid), report.started, only=reason)

    def _tell_fleet(self, report: Report) -> None:
        """What is wrong with the fleet as a whole: one alert per reason, however many resources feel it."""
        found = {**self.fleet}
        for kind, cause in self.common.items():
            found |= dict.fromkeys(kinds()[kind].COMMON_CAUSES)
            found |= {cause.notice.reason: cause.notice} if cause else {}
        for reason, notice in found.items():
            if notice is None:
                self.bell.resolve("fleet", report.started, only=reason)
                continue
            alert = Alert("fleet", reason, notice.severity, notice.detail, notice.advice, to=notice.to)
            self.bell.raise_(alert, self.said, report.started)

    def _tell_skip(self, skip: Skip, known: AbstractSet[str]) -> None:
        rid = skip.id
        if skip.code == "NeedsPerson":
            said = self.advice(rid) or f"reconcile explain {rid}"
            self._alert(rid, skip.code, 3, skip.reason, said, skip.changes)
        elif skip.code == "OnlyWarned":
            detail = "not as declared, and its mode is warn"
            self._alert(rid, skip.code, 2, detail, f"reconcile explain {rid}", skip.changes)
        elif skip.code == "AttemptsExhausted" and str(rid) not in known:
            # Its last attempt failed while a cause that all shared was told in its place, and that is over.
            self._alert(rid, "RepairFailed", 4, skip.reason, f"reconcile explain {rid}", skip.changes)
        elif skip.code == "Flapping":
            advice = f"find what changes it, then: reconcile resume {rid}"
            self._alert(rid, skip.code, 4, skip.reason, advice, skip.changes)

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
        shown = tuple(map(plain, changes))
        alert = Alert(str(rid), reason, severity, detail, advice, rid.node, shown)
        self.bell.raise_(alert, self.said, datetime.now(UTC))


def is_open(condition: Mapping[str, Any] | None) -> bool:
    """Whether an episode of drift was known and not over when this condition was written."""
    return condition is not None and bool(condition["details"].get("open"))


def plain(change: Change) -> Change:
    """A change without its text diff, which can be as long as the file."""
    return replace(change, diff="")
