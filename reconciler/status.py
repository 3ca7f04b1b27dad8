"""What the store knows, put together for people: ``status`` and ``explain``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reconciler.desired.load import Desired
from reconciler.desired.places import suggestion
from reconciler.episodes import PERIOD, episodes_since, repair_json, repairs, took
from reconciler.model import SECRET, ConfigurationError, Problem, Repairs, ResourceId
from reconciler.plan import suspended_by, suspension
from reconciler.render import STYLES, change_text
from reconciler.store import Store, now_text
from reconciler.wording import LEVELS, level_of

_SHOWN = ("issue_key", "kind", "name", "status", "reason", "message", "since", "seen")
MARKS = {"True": "✓", "False": "✗", "Unknown": "?"}


def status_document(store: Store, limit: str | None = None) -> dict[str, Any]:
    """Conditions per node, passes, suspensions, times to repair; a score is the percentage that is as desired."""
    conditions = [row for row in store.conditions().values() if limit in (None, row["node"])]
    suspensions, now = store.suspensions(), datetime.now(UTC)
    for row in conditions:  # also what was said since the last pass
        said = suspended_by(ResourceId.parse(row["issue_key"]), suspensions, now)
        row["details"]["suspended"] = said.reason if said else row["details"].get("suspended")
    nodes: dict[str, list[dict[str, Any]]] = {}
    for row in conditions:
        nodes.setdefault(row["node"], []).append(row)
    last = store.last_pass()
    found = [e for e in episodes_since(store, now - PERIOD) if limit in (None, e.id.node)]
    return {
        "last_pass": last,
        "next_pass": last["next"] if last else None,
        "score": _score(conditions),
        "counts": dict(Counter(row["status"] for row in conditions)),
        "unknown_nodes": [n for n, rows in nodes.items() if all(r["status"] == "Unknown" for r in rows)],
        "suspensions": [
            {
                "target": target,
                "reason": said.reason,
                "owner": said.owner,
                "until": now_text(said.until) if said.until else None,
            }
            for target, said in suspensions.items()
            if said.holds(now)
        ],
        "open_alerts": _open_alerts(store),
        "repairs": [repair_json(row) for row in repairs(found)],
        "nodes": {
            node: {
                "score": _score(rows),
                "resources": [
                    {key: row[key] for key in _SHOWN}
                    | {key: row["details"].get(key) for key in ("changes", "suspended")}
                    for row in rows
                ],
            }
            for node, rows in nodes.items()
        },
    }


def _open_alerts(store: Store) -> dict[str, int]:
    """How many alerts are open, by level."""
    rows = store.db.query(
        "SELECT severity, count(*) AS times FROM alerts WHERE status = 'open' GROUP BY severity"
    )
    found = dict.fromkeys(LEVELS, 0)
    for row in rows:
        found[level_of(row["severity"])] += row["times"]
    return found


def _score(rows: list[dict[str, Any]]) -> int | None:
    if not rows:
        return None
    return round(100 * Counter(row["status"] for row in rows)["True"] / len(rows))


def status_table(document: dict[str, Any], out: Console) -> None:
    """Nodes down, resources across; then what is wrong, in words, and what else there is to know."""
    out.print(_matrix(document))
    for name, node in document["nodes"].items():
        if name in document["unknown_nodes"]:
            _told_unknown(name, node["resources"], out)
            continue
        for row in node["resources"]:
            _told(row, out)
    _suspended(document, out)
    _repaired(document, out)
    alerts = [f"{count} {level}" for level, count in document["open_alerts"].items() if count]
    if alerts:
        out.print(f"open alerts: {', '.join(alerts)}; see: reconcile alerts", soft_wrap=True)
    last = document["last_pass"]
    if last:
        coming = f"; next pass {document['next_pass']}" if document["next_pass"] else ""
        said = f"last pass {last['started']} ({last['scope']}, {last['seconds']} s, exit {last['exit_code']}){coming}"
        out.print(said, soft_wrap=True)


def _matrix(document: dict[str, Any]) -> Table:
    kinds = list(dict.fromkeys(r["kind"] for node in document["nodes"].values() for r in node["resources"]))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("NODE", no_wrap=True)
    for kind in kinds:
        table.add_column(kind)
    table.add_column("SCORE", justify="right")
    for name, node in document["nodes"].items():
        cells = []
        for kind in kinds:
            marks = Text()
            for row in node["resources"]:
                if row["kind"] == kind:
                    marks.append(MARKS[row["status"]], STYLES[row["status"]])
            cells.append(marks)
        table.add_row(name, *cells, f"{node['score']} %")
    return table


def _told_unknown(name: str, rows: list[dict[str, Any]], out: Console) -> None:
    """A node that is silent is one line, not one per resource."""
    since = max(row["since"] for row in rows)
    line = Text.assemble((f"{name} ", "bold"), ("Unknown ", STYLES["Unknown"]))
    out.print(line + Text(f"since {since}: {rows[0]['message']}"), soft_wrap=True)


def _told(row: dict[str, Any], out: Console) -> None:
    """One resource that is suspended or not as desired, in words."""
    name = (f"{row['issue_key']} ", "bold")
    if row["suspended"]:
        out.print(Text.assemble(name, "suspended: ", row["suspended"]), soft_wrap=True)
    if row["status"] != "True":
        what = row["message"] or "; ".join(map(change_text, row["changes"] or []))
        line = Text.assemble(name, (f"{row['reason']} ", STYLES[row["status"]]))
        out.print(line + Text(f"since {row['since']}: {what}"), soft_wrap=True)


def _suspended(document: dict[str, Any], out: Console) -> None:
    """What people said, also where it covers nothing any more."""
    for row in document["suspensions"]:
        end = f"until {row['until']}" if row["until"] else f"until: reconcile resume {row['target']}"
        by = f" by {row['owner']}" if row["owner"] else ""
        said = f"suspended {row['target']}{by} {end}: {row['reason']}"
        out.print(said, markup=False, soft_wrap=True)


def _repaired(document: dict[str, Any], out: Console) -> None:
    """Times to repair, per kind."""
    if not document["repairs"]:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("TIME TO REPAIR (30 d)", "EPISODES", "MEAN", "MEDIAN", "95 %", "LONGEST", "OPEN"):
        table.add_column(column, justify="left" if column.startswith("TIME") else "right", no_wrap=True)
    for row in document["repairs"]:
        times = (took(row[f"{name}_seconds"]) for name in ("mean", "median", "p95", "longest"))
        table.add_row(row["kind"], str(row["count"]), *times, str(row["open"]))
    out.print(table)


def explain_lines(text: str, desired: Desired, store: Store) -> dict[str, Any]:
    """Everything known about one resource. Raises ConfigurationError where there is no such resource."""
    known = [str(rid) for rid in desired.resources]
    try:
        rid = ResourceId.parse(text)
    except ValueError:
        raise ConfigurationError(
            [Problem(f"{text!r} is not NODE/KIND/NAME", hint=suggestion(text, known))]
        ) from None
    resource = desired.resources.get(rid)
    if resource is None:
        raise ConfigurationError([Problem(f"{text} is not declared", hint=suggestion(text, known))])
    policy, now = resource.policy, datetime.now(UTC)
    repairs = store.history(desired.limits, now).get(rid, Repairs())
    suspended = suspension(resource, store.suspensions(), now)
    shown = _without_bodies(resource.args)
    return {
        "id": str(rid),
        "declared_at": str(resource.declared_at),
        "desired": SECRET if resource.secret else {**shown, **resource.fields},
        "policy": {
            "mode": policy.mode.value,
            "interval_seconds": policy.interval,
            "max_attempts": policy.max_attempts,
            "ignore": sorted(policy.ignore),
            "allow_become": policy.allow_become,
            "window": f"{policy.window.cron} ({policy.window.timezone})" if policy.window else None,
            "suspended": suspended.reason if suspended else None,
        },
        "depends_on": [
            {
                "id": str(dependency),
                "status": (store.condition(str(dependency)) or {}).get("status", "never looked at"),
            }
            for dependency in resource.depends_on
        ],
        "condition": store.condition(str(rid)),
        "attempts_in_episode": repairs.attempts,
        "next_attempt": now_text(repairs.next_attempt) if repairs.next_attempt else None,
        "quarantined_until": now_text(repairs.quarantined_until) if repairs.quarantined_until else None,
        "interrupted_attempt": repairs.open.attempt if repairs.open else None,
        "events": store.events(issue_key=str(rid), limit=10),
    }


def _without_bodies(value: Any) -> Any:
    """Arguments without the contents of files."""
    if isinstance(value, Mapping):
        return {key: _without_bodies(item) for key, item in value.items() if key != "body"}
    return value
