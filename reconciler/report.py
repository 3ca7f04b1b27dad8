"""A pass as one JSON document. The shape is part of the product: fields are added, never renamed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from reconciler.model import ConfigurationError, Outcome, Report, ResourceId, Status
from reconciler.record import change_details
from reconciler.store import now_text


def as_json(report: Report) -> dict[str, Any]:
    """Everything the pass has to say."""
    return {
        "run_id": report.run_id,
        "revision": report.revision,
        "check": report.check,
        "started": now_text(report.started),
        "exit_code": int(report.exit_code),
        "nodes": {
            state.node: {
                "reachable": state.reachable,
                "reason": state.reason or None,
                "transport": state.transport or None,
                "seconds": state.seconds,
            }
            for state in report.observed.nodes.values()
        },
        "drifts": [
            {**_identity(report, rid), "changes": [change_details(change) for change in drift.changes]}
            for rid, drift in report.drifts.items()
        ],
        "planned": [
            {
                **_identity(report, action.id),
                "changes": [change_details(change) for change in action.changes],
                "after": sorted(str(rid) for rid in action.after),
                "because": action.because or None,
            }
            for action in report.plan.actions
        ],
        "skipped": [
            {**_identity(report, skip.id), "reason": skip.reason, "code": skip.code}
            for skip in report.plan.skips
        ],
        "outcomes": [_outcome(report, outcome) for outcome in report.outcomes],
        "unknown": [{**_identity(report, o.id), "reason": o.unknown} for o in report.unknown],
        "counts": counts(report),
        "durations": {
            "total": round(report.seconds, 3),
            "runs": [
                {"playbook": run.playbook, "nodes": run.nodes, "seconds": round(run.seconds, 3)}
                for run in report.runs
            ],
        },
    }


def counts(report: Report) -> dict[str, int]:
    """How many resources ended how."""
    ended = Counter(outcome.status for outcome in report.outcomes)
    acted = {outcome.id for outcome in report.outcomes}
    waiting = {*report.drifts, *(action.id for action in report.plan.actions)} - acted
    return {
        "nodes": len(report.observed.nodes),
        "nodes_unreachable": sum(not state.reachable for state in report.observed.nodes.values()),
        "resources": len(report.observed.observations),
        "as_desired": len(report.observed.observations) - len(report.unknown) - len(acted | waiting),
        "drifted": len(report.drifts),
        "fixed": ended[Status.FIXED],
        "failed": ended[Status.FAILED],
        "rolled_back": ended[Status.ROLLED_BACK],
        "skipped": len(report.plan.skips),
        "unknown": len(report.unknown),
    }


def problems_as_json(error: ConfigurationError) -> dict[str, Any]:
    """Problems of configuration as the same one document."""
    return {
        "exit_code": 1,
        "problems": [
            {
                "message": problem.message,
                "hint": problem.hint or None,
                "file": problem.mark.file if problem.mark else None,
                "line": problem.mark.line if problem.mark else None,
                "column": problem.mark.column if problem.mark else None,
            }
            for problem in error.problems
        ],
    }


def _identity(report: Report, rid: ResourceId) -> dict[str, str]:
    return {
        "id": str(rid),
        "node": rid.node,
        "kind": rid.kind,
        "name": rid.name,
        "check_type": report.resources[rid].check_type,
    }


def _outcome(report: Report, outcome: Outcome) -> dict[str, Any]:
    return {
        **_identity(report, outcome.id),
        "status": outcome.status.value,
        "detail": outcome.detail or None,
        "changes": [change_details(change) for change in outcome.changes],
        "severity": outcome.severity,
        "attempt": outcome.number,
        "backup": list(outcome.backup),
    }
