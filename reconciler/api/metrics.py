"""Prometheus metrics, read from the store when they are asked for, in controller-runtime's vocabulary.

Counters and histograms come from the table ``totals``: they survive restarts and pruning, and count passes of every
process. Labels are nodes, kinds and constants, never names of resources or words of a node.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from reconciler import __version__
from reconciler.api.state import DaemonState
from reconciler.kinds.registry import kinds
from reconciler.migrations import PASS_BOUNDS, REPAIR_BOUNDS
from reconciler.model import ExitCode
from reconciler.status import status_document
from reconciler.store import Store

RESULTS = {
    ExitCode.AS_DESIRED: "as_desired",
    ExitCode.DRIFT: "drift",
    ExitCode.NOT_FIXED: "not_fixed",
    ExitCode.UNKNOWN: "unknown",
}
_PREFIX = "reconciler_"
_log = logging.getLogger(__name__)
Totals = Mapping[str, Mapping[tuple[str, str], float]]
"""Name of a sum, then kind and label."""


def exposition(store: Store, state: DaemonState) -> bytes:
    """All metrics as text."""
    registry = CollectorRegistry()
    registry.register(_Fleet(store, state))
    return generate_latest(registry)


class _Fleet(Collector):
    """One moment of the fleet."""

    def __init__(self, store: Store, state: DaemonState) -> None:
        self.store, self.state = store, state

    def collect(self) -> Iterator[Metric]:
        """Every metric, from one reading."""
        totals: dict[str, dict[tuple[str, str], float]] = {}
        for row in self.store.db.query("SELECT * FROM totals"):
            totals.setdefault(row["name"], {})[row["kind"], row["label"]] = row["value"]
        document = status_document(self.store)
        yield from _passes(totals, self.state)
        yield from _moment(document, totals, self.state)
        yield from _repairs(totals)
        yield from _conditions(document)
        yield from _of_kinds(self.store.conditions())


def _passes(totals: Totals, state: DaemonState) -> Iterator[Metric]:
    found = CounterMetricFamily(_PREFIX + "reconcile", "Passes, by how they ended.", labels=["result"])
    recorded = totals.get("passes", {})
    for code, result in RESULTS.items():
        found.add_metric([result], recorded.get(("", str(int(code))), 0))
    for result, count in state.passes.items():
        if result not in RESULTS.values():
            found.add_metric([result], count)
    yield found
    errors = CounterMetricFamily(
        _PREFIX + "reconcile_errors",
        "Passes that could not run or ended with an error of their own, since this process began.",
    )
    errors.add_metric([], state.errors)
    yield errors
    times = HistogramMetricFamily(_PREFIX + "reconcile_time_seconds", "How long passes took.")
    times.add_metric([], *_histogram(totals, "pass_seconds", "", PASS_BOUNDS))
    yield times


def _moment(document: Mapping[str, Any], totals: Totals, state: DaemonState) -> Iterator[Metric]:
    yield _gauge("active_passes", "Passes under way in this process.", int(state.running_since is not None))
    yield _gauge("queue_depth", "Requests for a pass that wait.", state.queue)
    success = totals.get("last_success", {}).get(("", ""))
    if success is not None:
        text = "When the last pass ended that neither failed nor left anything unknown."
        yield _gauge("last_success_timestamp_seconds", text, success)
    last = document["last_pass"]
    if last:
        text = "When the last pass ended."
        ended = datetime.fromisoformat(last["started"]).timestamp() + last["seconds"]
        yield _gauge("last_pass_timestamp_seconds", text, ended)
    if state.next_pass:
        yield _gauge("next_pass_timestamp_seconds", "When the next pass is due.", state.next_pass.timestamp())
    yield _gauge("ready_problems", "What keeps the daemon from its work, in number.", len(state.problems))
    alerts = GaugeMetricFamily(_PREFIX + "alerts", "Open alerts.", labels=["level"])
    for level, count in document["open_alerts"].items():
        alerts.add_metric([level], count)
    yield alerts
    build = InfoMetricFamily(_PREFIX + "build", "Which version this is, of which desired state.")
    build.add_metric([], {"version": __version__, "revision": state.revision})
    yield build


def _repairs(totals: Totals) -> Iterator[Metric]:
    attempts = CounterMetricFamily(
        _PREFIX + "attempts", "Attempts at a repair, by how they ended.", labels=["kind", "status"]
    )
    for (kind, status), count in totals.get("attempts", {}).items():
        attempts.add_metric([kind, status], count)
    yield attempts
    times = HistogramMetricFamily(
        _PREFIX + "repair_seconds", "From the detection of drift until it was as desired.", labels=["kind"]
    )
    for kind, _label in totals.get("repair_seconds_sum", {}):
        times.add_metric([kind], *_histogram(totals, "repair_seconds", kind, REPAIR_BOUNDS))
    yield times


def _conditions(document: Mapping[str, Any]) -> Iterator[Metric]:
    resources = [
        (node, row["kind"], row) for node, shown in document["nodes"].items() for row in shown["resources"]
    ]
    text = "Resources, by what the last look at them said (True: as desired)."
    conditions = Counter((node, kind, row["status"]) for node, kind, row in resources)
    yield _counted("condition", text, ["node", "kind", "status"], conditions)
    drift = Counter({(kind, node): 0 for node, kind, _row in resources})
    drift.update((kind, node) for node, kind, row in resources if row["status"] == "False")
    yield _counted("drift", "Resources that are not as desired.", ["kind", "node"], drift)
    suspended = sum(bool(row["suspended"]) for _node, _kind, row in resources)
    yield _gauge("suspended", "Resources that are left alone because somebody said so.", suspended)
    yield _gauge("nodes", "Nodes that something is declared for.", len(document["nodes"]))
    yield _gauge("unknown_nodes", "Nodes of which nothing is known.", len(document["unknown_nodes"]))
    if document["score"] is not None:
        yield _gauge(
            "as_desired_ratio", "The share of resources that are as desired.", document["score"] / 100
        )


def _of_kinds(conditions: Mapping[str, Mapping[str, Any]]) -> Iterable[Metric]:
    """What kinds themselves read from the facts of their resources; the names and labels are theirs."""
    found: dict[str, Metric] = {}
    for row in conditions.values():
        observed, kind = row["details"].get("observed"), kinds().get(row["kind"])
        if kind is None or not isinstance(observed, Mapping):
            continue
        try:
            samples = list(kind.samples(row["name"], row["node"], observed))
        except Exception:  # noqa: BLE001 - facts of one node must not silence all others
            _log.exception("no samples of %s", row["issue_key"])
            continue
        for sample in samples:
            family = found.setdefault(sample.name, GaugeMetricFamily(sample.name, sample.help))
            family.add_sample(sample.name, dict(sample.labels), sample.value)
    return found.values()


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, text, value)


def _counted(name: str, text: str, labels: list[str], counts: Mapping[Any, int]) -> Metric:
    found = GaugeMetricFamily(_PREFIX + name, text, labels=labels)
    for values, count in counts.items():
        found.add_metric(values, count)
    return found


def _histogram(
    totals: Totals, name: str, kind: str, bounds: Iterable[float]
) -> tuple[list[tuple[str, float]], float]:
    """Buckets as Prometheus wants them, each with what is in the shorter ones, and the sum."""
    counts, reached = totals.get(f"{name}_bucket", {}), 0.0
    buckets = []
    for bound in [*(str(float(bound)) for bound in bounds), "+Inf"]:
        reached += counts.get((kind, bound), 0)
        buckets.append((bound, reached))
    return buckets, totals.get(f"{name}_sum", {}).get((kind, ""), 0.0)
