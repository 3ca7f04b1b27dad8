"""One pass, whole: desired -> observed -> drift -> plan -> outcome -> events.

Level-triggered: it starts from what the nodes say now, never from what the last pass believed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from reconciler.converge import Converger
from reconciler.desired.load import Desired
from reconciler.diff import diff
from reconciler.model import Drift, Mode, Outcome, Plan, Report, ResourceId, Run, Skip, Status
from reconciler.observe import Observer
from reconciler.plan import plan, ready
from reconciler.record import Recorder

# Each round only acts on what earlier rounds made ready; a dependency chain longer than this is a mistake.
MAX_ROUNDS = 20


@dataclass
class Pass:
    """One pass over ``desired``. ``runs`` is filled by whoever starts playbooks."""

    desired: Desired
    observer: Observer
    converger: Converger
    recorder: Recorder
    run_id: str
    revision: str = ""
    check: bool = False
    runs: list[Run] = field(default_factory=list)

    def run(self) -> Report:
        """Look; where something drifted, act and look again; record. Raises RunError when Ansible cannot run."""
        started, clock = datetime.now(UTC), time.monotonic()
        resources = {rid: r for rid, r in self.desired.resources.items() if r.policy.mode is not Mode.IGNORE}
        observed = self.observer.observe(resources.values())
        seen: dict[ResourceId, Drift] = {}
        outcomes: list[Outcome] = []
        foretold: Plan | None = None
        for _ in range(MAX_ROUNDS):
            attempted = {outcome.id for outcome in outcomes}
            drifts = diff(resources, observed.observations)
            planned = plan(resources, observed.observations, drifts, started, attempted)
            foretold = foretold or planned
            seen |= {rid: drift for rid, drift in drifts.items() if rid not in seen}
            now_ready = ready(planned, attempted)
            if self.check or not now_ready:
                break
            self.recorder.fixing(now_ready, seen)
            done, newer = self.converger.repair(now_ready, resources, observed, self.run_id)
            observed = observed.merged(newer)
            self.recorder.ended(done, seen)
            outcomes += done
        remaining = diff(resources, observed.observations)
        final = Plan(foretold.actions if foretold else (), self._left(planned, outcomes, remaining))
        report = Report(
            run_id=self.run_id, revision=self.revision, check=self.check, started=started,
            seconds=time.monotonic() - clock, observed=observed, drifts=seen, plan=final,
            outcomes=tuple(outcomes), runs=tuple(self.runs), resources=resources,
        )  # fmt: skip
        if not self.check:
            self.recorder.finish(report, remaining)
        return report

    def _left(
        self, planned: Plan, outcomes: list[Outcome], remaining: Mapping[ResourceId, Drift]
    ) -> tuple[Skip, ...]:
        """What is not as desired at the end and has no outcome that says so: a pass never keeps that to itself."""
        ended = {outcome.id: outcome.status for outcome in outcomes}
        skips = [skip for skip in planned.skips if skip.id not in ended]
        told = {skip.id for skip in skips}
        for rid, drift in () if self.check else remaining.items():
            if ended.get(rid) is Status.FIXED:
                skips.append(
                    Skip(
                        rid, "it was fixed and drifted again within the pass", drift.changes, is_failure=True
                    )
                )
            elif rid not in ended and rid not in told:
                skips.append(Skip(rid, "its turn comes in the next pass", drift.changes, is_failure=True))
        return tuple(skips)
