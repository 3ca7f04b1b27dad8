"""The documents of the API, read from the store. Shapes are part of the product: fields are added, never renamed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from reconciler.alerts import Alerts
from reconciler.api.state import DaemonState
from reconciler.episodes import PERIOD, as_json, episodes_since
from reconciler.model import Limits, ResourceId
from reconciler.status import status_document
from reconciler.store import Store, now_text

TIMELINE = 60
_LATE = 3
"""A last pass that is older than so many intervals is no answer about now."""


def fleet(store: Store, state: DaemonState, interval: float) -> dict[str, Any]:
    """Everything the page shows: nodes and resources, what differs, episodes, alerts, what comes next."""
    now = datetime.now(UTC)
    found = status_document(store)
    reasons = unready(found["last_pass"], state, interval, now)
    newest = sorted(episodes_since(store, now - PERIOD), key=lambda e: e.ended or e.began, reverse=True)
    still = [episode for episode in newest if episode.is_open]
    over = [episode for episode in newest if not episode.is_open]
    return {
        **found,
        "ready": not reasons,
        "reasons": reasons,
        "daemon": daemon(state),
        "episodes": [as_json(episode) for episode in [*still, *over][:TIMELINE]],
        "alerts": [_alert(row) for row in Alerts(store, None).open()],
    }


def daemon(state: DaemonState) -> dict[str, Any]:
    """What only the daemon knows."""
    return {
        "running_since": now_text(state.running_since) if state.running_since else None,
        "next_pass": now_text(state.next_pass) if state.next_pass else None,
        "queue": state.queue,
        "revision": state.revision,
        "problems": list(state.problems),
        "stopping": state.stopping,
    }


def unready(
    last: Mapping[str, Any] | None, state: DaemonState, interval: float, now: datetime
) -> list[dict[str, str]]:
    """Why what the store says is not to be relied on; nothing where it is. ``code`` is a constant."""
    reasons = []
    if last is None:
        reasons.append({"code": "NoPass", "message": "no pass has ended yet"})
    else:
        ended = datetime.fromisoformat(last["started"]) + timedelta(seconds=last["seconds"])
        patience = timedelta(seconds=_LATE * interval)
        # One that is under way, or that resources with longer intervals put off, is awaited as long.
        awaited = max(filter(None, (ended, state.running_since, state.next_pass)))
        if now - awaited > patience:
            message = f"the last pass ended {now_text(ended)}: more than {_LATE} intervals ago"
            reasons.append({"code": "TooOld", "message": message})
    reasons += [{"code": "Problem", "message": problem} for problem in state.problems]
    if state.stopping:
        reasons.append({"code": "Stopping", "message": "the daemon is stopping"})
    return reasons


def node(store: Store, name: str) -> dict[str, Any] | None:
    """One node in full: what is known of every resource there, and what happened lately; None where nothing is."""
    shown = status_document(store, name)["nodes"].get(name)
    if shown is None:
        return None
    now = datetime.now(UTC)
    history = store.history(Limits(), now)
    conditions = store.conditions()
    for row in shown["resources"]:
        details = conditions[row["issue_key"]]["details"]
        tried = history.get(ResourceId.parse(row["issue_key"]))
        row["observed"] = details.get("observed")
        row["advice"] = details.get("advice") or ""
        row["cause"] = details.get("cause") or ""
        row["attempts"] = tried.attempts if tried else 0
        row["next_attempt"] = now_text(tried.next_attempt) if tried and tried.next_attempt else None
        quarantined = tried.quarantined_until if tried else None
        row["quarantined_until"] = now_text(quarantined) if quarantined and quarantined > now else None
    lately = [as_json(e) for e in reversed(episodes_since(store, now - PERIOD)) if e.id.node == name]
    return {
        "node": name,
        **shown,
        "episodes": lately[:TIMELINE],
        "alerts": [_alert(row) for row in Alerts(store, None).open() if row["node"] == name],
        "events": store.events(node=name, limit=50),
    }


def _alert(row: Mapping[str, Any]) -> dict[str, Any]:
    shown = ("id", "key", "node", "level", "severity", "reason", "opened", "detail", "advice", "occurrences")
    return {key: row[key] for key in shown}
