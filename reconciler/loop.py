"""One pass, whole: desired -> observed -> drift -> plan -> outcome -> events.

Level-triggered: it starts from what the nodes say now, never from what the last pass believed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime

from reconciler.converge import Converger
from reconciler.desired.load import Desired
from reconciler.diff import diff
from reconciler.failpoints import reached
from reconciler.kinds.registry import kinds
from reconciler.model import (
    Drift,
    Mode,
    Observed,
    OpenAttempt,
    Outcome,
    Plan,
    Report,
    Resource,
    ResourceId,
    Run,
    Skip,
    Status,
)
from reconciler.observe import Observer
from reconciler.plan import Situation, plan
from reconciler.record import Issues, Recorder
from reconciler.rollout import Hold, mass_change, next_wave
from reconciler.telling import Judgement


@dataclass(frozen=True)
class Wishes:
    """What was asked of a pass on the command line."""

    check: bool = False
    retry: bool = False
    allow_mass_change: bool = False
    limited: bool = False
    fleet: int = 0
    """Nodes that anything is declared for, whatever the pass is limited to."""


@dataclass
class Pass:
    """One pass over ``desired``. ``runs`` is filled by whoever starts playbooks."""

    desired: Desired
    observer: Observer
    converger: Converger
    recorder: Recorder
    wishes: Wishes = field(default_factory=Wishes)
    runs: list[Run] = field(default_factory=list)
    judge: Callable[[Issues], Mapping[ResourceId, Judgement]] = field(default=lambda _issues: {})

    def run(self) -> Report:
        """Look; where something drifted, act and look again; record. Raises RunError, LeaseLostError."""
        started, clock = datetime.now(UTC), time.monotonic()
        resources = {rid: r for rid, r in self.desired.resources.items() if r.policy.mode is not Mode.IGNORE}
        observed = self.observer.observe(resources.values())
        reached("observed")
        self.recorder.looked(observed, whole=not self.wishes.limited)
        seen = diff(resources, observed.observations)
        outcomes, observed = self._carry_on(resources, observed, seen)
        hold = self._guard(resources, observed, started)
        tried: set[ResourceId] = set()
        foretold: Plan | None = None
        while True:
            drifts = diff(resources, observed.observations)
            seen |= {rid: drift for rid, drift in drifts.items() if rid not in seen}
            situation = self._situation(started, outcomes, tried, hold)
            planned = plan(resources, observed.observations, drifts, situation)
            foretold = foretold or planned
            wave = next_wave(planned, outcomes, self.recorder.history, self.desired.limits)
            if self.wishes.check or not wave:
                break
            self.recorder.begin(wave, seen)
            tried |= {action.id for action in wave}
            done, newer = self.converger.repair(wave, resources, observed)
            observed = observed.merged(newer)
            self.recorder.ended(done)
            outcomes += done
        remaining = diff(resources, observed.observations)
        final = Plan(foretold.actions, self._left(planned, outcomes, remaining))
        report = Report(
            run_id=self.recorder.context.run_id, revision=self.recorder.context.revision, check=self.wishes.check,
            started=started, seconds=time.monotonic() - clock, observed=observed, drifts=seen, plan=final,
            outcomes=tuple(outcomes), runs=tuple(self.runs), resources=resources, limited=self.wishes.limited,
        )  # fmt: skip
        if not self.wishes.check:
            self.recorder.finish(report, remaining, self.judge(self.recorder.issues(report)))
        return report

    def _carry_on(
        self, resources: Mapping[ResourceId, Resource], observed: Observed, drifts: Mapping[ResourceId, Drift]
    ) -> tuple[list[Outcome], Observed]:
        """Settle what a pass that died had begun. An attempt that only needs another try is left to the plan."""
        finished: list[OpenAttempt] = []
        undoing: list[OpenAttempt] = []
        for begun in () if self.wishes.check else self.recorder.store.open_attempts():
            over = _is_over(begun, self.recorder.resources.get(begun.id))
            if over:
                self.recorder.abandon(begun, over)
            elif begun.id not in resources or not observed.observations[begun.id].is_known:
                continue  # outside this pass, or silent
            elif begun.is_undoing and (begun.id in drifts or kinds()[begun.id.kind].UNSTEADY):
                undoing.append(begun)
            elif begun.id not in drifts:
                finished.append(begun)
        done, observed = self._finished(finished, resources, observed)
        if not undoing:
            return done, observed
        undone, newer = self.converger.resume_undo(undoing, resources, observed)
        self.recorder.ended(undone)
        return [*done, *undone], observed.merged(newer)

    def _finished(
        self, begun: Sequence[OpenAttempt], resources: Mapping[ResourceId, Resource], observed: Observed
    ) -> tuple[list[Outcome], Observed]:
        """End attempts whose change was made; what its node is about to undo by itself has to be confirmed first."""
        risky = [attempt for attempt in begun if resources[attempt.id].confirm_within]
        if risky:
            observed = observed.merged(self.converger.resume_confirm(risky, resources))
        drifts = diff(resources, observed.observations)
        detail = "done by an attempt that was interrupted"
        done = [
            Outcome(attempt.id, Status.FIXED, detail, attempt.before, 2, attempt.number)
            for attempt in begun
            if observed.observations[attempt.id].is_known and attempt.id not in drifts
        ]
        self.recorder.ended(done)
        return done, observed

    def _situation(
        self,
        started: datetime,
        outcomes: Sequence[Outcome],
        tried: AbstractSet[ResourceId],
        hold: Hold | None,
    ) -> Situation:
        return Situation(
            now=datetime.now(UTC), started=started, attempt=self.recorder.context.run_id,
            history=self.recorder.history, outcomes=tuple(outcomes), tried=frozenset(tried),
            suspensions=self.recorder.suspensions, limits=self.desired.limits, hold=hold, retry=self.wishes.retry,
        )  # fmt: skip

    def _guard(
        self, resources: Mapping[ResourceId, Resource], observed: Observed, started: datetime
    ) -> Hold | None:
        """The hold of a pass that would change too much of the fleet at once; on record before anything is changed."""
        before = self.recorder.held()
        found = None
        if not self.wishes.allow_mass_change:
            situation = self._situation(started, (), frozenset(), None)
            planned = plan(
                resources, observed.observations, diff(resources, observed.observations), situation
            )
            found = mass_change(planned, resources, self.desired.limits, self.wishes.fleet, before)
        if not self.wishes.check and found != before and not (found is None and self.wishes.limited):
            self.recorder.hold(found)
        return found

    def _left(
        self, planned: Plan, outcomes: Sequence[Outcome], remaining: Mapping[ResourceId, Drift]
    ) -> tuple[Skip, ...]:
        """What is not as desired at the end and has no outcome that says so: a pass never keeps that to itself."""
        ended = {outcome.id: outcome.status for outcome in outcomes}
        skips = [skip for skip in planned.skips if skip.id not in ended]
        told = {skip.id for skip in skips}
        for rid, drift in () if self.wishes.check else remaining.items():
            if ended.get(rid) is Status.FIXED:
                reason = "it was fixed and drifted again within the pass"
                skips.append(Skip(rid, reason, drift.changes, is_failure=True, code="DriftedAgain"))
            elif rid not in ended and rid not in told:
                reason = "its turn comes in the next pass"
                skips.append(Skip(rid, reason, drift.changes, is_failure=True, code="NextPass"))
        return tuple(skips)


def _is_over(begun: OpenAttempt, declared: Resource | None) -> str:
    """Why nobody carries on with an attempt, or nothing."""
    if declared is None or declared.policy.mode is Mode.IGNORE:
        return "interrupted, and not declared any more: left as it is; what was saved stays on the node"
    if declared.digest != begun.digest:
        return "interrupted, and its declaration has changed since: the new one is carried out instead"
    return ""
