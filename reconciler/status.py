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
from reconciler.model import SECRET, ConfigurationError, Problem, Repairs, ResourceId
from reconciler.plan import suspended_by, suspension
from reconciler.render import STYLES, change_text
from reconciler.store import Store, now_text

MARKS = {"True": "✓", "False": "✗", "Unknown": "?"}


def status_document(store: Store, limit: str | None = None) -> dict[str, Any]:
    """Conditions per node, the last pass, and a score: the share of resources that are as desired, in percent."""
    conditions = [row for row in store.conditions().values() if limit in (None, row["node"])]
    suspensions, now = store.suspensions(), datetime.now(UTC)
    for row in conditions:  # also what was said since the last pass
        said = suspended_by(ResourceId.parse(row["issue_key"]), suspensions, now)
        row["details"]["suspended"] = said.reason if said else row["details"].get("suspended")
    nodes: dict[str, list[dict[str, Any]]] = {}
    for row in conditions:
        nodes.setdefault(row["node"], []).append(row)
    return {
        "last_pass": store.last_pass(),
        "score": _score(conditions),
        "nodes": {
            node: {
                "score": _score(rows),
                "resources": [
                    {
                        key: row[key]
                        for key in (
                            "issue_key",
                            "kind",
                            "name",
                            "status",
                            "reason",
                            "message",
                            "since",
                            "seen",
                        )
                    }
                    | {key: row["details"].get(key) for key in ("changes", "suspended")}
                    for row in rows
                ],
            }
            for node, rows in nodes.items()
        },
    }


def _score(rows: list[dict[str, Any]]) -> int | None:
    if not rows:
        return None
    return round(100 * Counter(row["status"] for row in rows)["True"] / len(rows))


def status_table(document: dict[str, Any], out: Console) -> None:
    """Nodes down, resources across; then what is wrong, in words."""
    columns = list(
        dict.fromkeys(
            f"{r['kind']}/{r['name']}" for node in document["nodes"].values() for r in node["resources"]
        )
    )
    kinds = list(dict.fromkeys(column.split("/")[0] for column in columns))
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
    out.print(table)
    for node in document["nodes"].values():
        for row in node["resources"]:
            _told(row, out)
    last = document["last_pass"]
    if last:
        coming = f"; next pass {last['next']}" if last["next"] else ""
        said = f"last pass {last['started']} ({last['scope']}, {last['seconds']} s, exit {last['exit_code']}){coming}"
        out.print(said, soft_wrap=True)


def _told(row: dict[str, Any], out: Console) -> None:
    """One resource that is suspended or not as desired, in words."""
    name = (f"{row['issue_key']} ", "bold")
    if row["suspended"]:
        out.print(Text.assemble(name, "suspended: ", row["suspended"]), soft_wrap=True)
    if row["status"] != "True":
        what = row["message"] or "; ".join(map(change_text, row["changes"] or []))
        line = Text.assemble(name, (f"{row['reason']} ", STYLES[row["status"]]))
        out.print(line + Text(f"since {row['since']}: {what}"), soft_wrap=True)


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
