"""``reconcile report``: what a day brought, as text, as a mail, as a message in a chat."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from reconciler.alerts import Alerts
from reconciler.episodes import PERIOD, Episode, episodes_since, repair_json, repairs, took
from reconciler.model import ExitCode, ResourceId
from reconciler.render import change_text
from reconciler.status import status_document
from reconciler.store import Store, now_text

RECURRING = 3
"""So many episodes of one resource in 30 days are no accident."""
_ENDS = {
    ExitCode.AS_DESIRED: "as desired",
    ExitCode.DRIFT: "left drift alone",
    ExitCode.NOT_FIXED: "could not fix something",
    ExitCode.UNKNOWN: "left something unknown",
}
KEPT_PASSES = 1000
_CHAT_LINES = 6
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it. Never empty: a section that has nothing to say says so."""

    title: str
    lines: tuple[str, ...]


def summary_document(store: Store, since: datetime) -> dict[str, Any]:
    """Passes, repairs, what is wrong now, alerts, suspensions and what keeps coming back, since then."""
    now, moment = datetime.now(UTC), now_text(since)
    status = status_document(store)
    lately = episodes_since(store, min(since, now - PERIOD))
    ended = [e for e in lately if e.ended and e.ended >= since]
    alerts = Alerts(store, None).listed(resolved=True, since=moment, limit=500)
    return {
        "since": moment,
        "until": now_text(now),
        "score": status["score"],
        "passes": _passes(store, moment),
        "repaired": [repair_json(row) for row in repairs(ended)],
        "not_as_desired": _not_as_desired(status),
        "unknown_nodes": [_unknown(name, status) for name in status["unknown_nodes"]],
        "alerts": {
            "open": status["open_alerts"],
            "opened": [_alert(row) for row in alerts if row["opened"] >= moment],
            "resolved": [_alert(row) for row in alerts if row["resolved"] and row["resolved"] >= moment],
        },
        "suspensions": status["suspensions"],
        "recurring": _recurring([e for e in lately if e.began >= now - PERIOD], since),
    }  # fmt: skip


def _passes(store: Store, moment: str) -> dict[str, Any]:
    rows = list(store.db.query("SELECT exit_code, seconds FROM passes WHERE started >= ?", [moment]))
    (oldest,) = store.db.execute("SELECT min(started) FROM passes").fetchone()
    ends = Counter(row["exit_code"] for row in rows)
    return {
        "count": len(rows),
        # The oldest are dropped: where the oldest that is left is of this time, there may have been more.
        "is_all": oldest is None or oldest < moment or len(rows) < KEPT_PASSES,
        "ends": {text: ends[code] for code, text in _ENDS.items() if ends[code]},
        "longest_seconds": max((row["seconds"] for row in rows), default=None),
    }


def _not_as_desired(status: Document) -> list[dict[str, Any]]:
    """Resources that are not, or of which nothing is known though their node answers."""
    shown = ("issue_key", "status", "since", "message", "changes", "suspended")
    answering = [node for name, node in status["nodes"].items() if name not in status["unknown_nodes"]]
    rows = [row for node in answering for row in node["resources"] if row["status"] != "True"]
    return [{key: row[key] for key in shown} for row in rows]


def _unknown(name: str, status: Document) -> dict[str, Any]:
    rows = status["nodes"][name]["resources"]
    return {"node": name, "since": max(row["since"] for row in rows), "reason": rows[0]["message"]}


def _alert(row: Document) -> dict[str, Any]:
    return {key: row[key] for key in ("level", "key", "reason", "detail", "status")}


def _recurring(lately: list[Episode], since: datetime) -> list[dict[str, Any]]:
    """What came back in this time, not for the first or second time."""
    times = Counter(episode.id for episode in lately)
    recent = {episode.id for episode in lately if episode.began >= since}
    found: list[ResourceId] = [
        rid for rid, count in times.most_common() if count >= RECURRING and rid in recent
    ]
    return [{"resource": str(rid), "episodes": times[rid]} for rid in found]


# --- words ------------------------------------------------------------------------------------------


def headline(document: Document) -> str:
    """How it stands, in one line."""
    if document["score"] is None:
        return "Nothing has been looked at yet"
    parts = [f"{document['score']} % as desired"]
    wrong, silent = len(document["not_as_desired"]), len(document["unknown_nodes"])
    opened = sum(document["alerts"]["open"].values())
    if wrong:
        parts.append("1 resource is not" if wrong == 1 else f"{wrong} resources are not")
    if silent:
        parts.append(_count(silent, "node is unknown", "nodes are unknown"))
    if opened:
        parts.append(_count(opened, "alert is open", "alerts are open"))
    return ", ".join(parts)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def sections(document: Document) -> list[Section]:
    """The report in words, the most urgent first; only what is the case."""
    found = [
        Section("Not as desired now", _wrong_lines(document)),
        Section("Repaired", _repair_lines(document)),
        Section("Passes", (_pass_line(document["passes"]),)),
        Section("Alerts", _alert_lines(document["alerts"])),
        Section("Suspended", tuple(map(_suspension_line, document["suspensions"]))),
        Section(
            "Keeps coming back",
            tuple(
                f"{row['resource']}: {row['episodes']} episodes in 30 days" for row in document["recurring"]
            ),
        ),
    ]
    nothing = {
        "Not as desired now": "nothing",
        "Repaired": "nothing had to be",
        "Alerts": "none opened or resolved",
    }
    return [Section(s.title, s.lines or (nothing[s.title],)) for s in found if s.lines or s.title in nothing]


def _wrong_lines(document: Document) -> tuple[str, ...]:
    lines = [
        f"{row['node']}: unknown since {row['since']}: {row['reason']}" for row in document["unknown_nodes"]
    ]
    for row in document["not_as_desired"]:
        why = f"suspended: {row['suspended']}" if row["suspended"] else row["message"]
        what = "; ".join(map(change_text, row["changes"] or []))
        said = "; ".join(part for part in (why, what) if part)
        lines.append(f"{row['issue_key']}: since {row['since']}" + (f": {said}" if said else ""))
    return tuple(lines)


def _repair_lines(document: Document) -> tuple[str, ...]:
    return tuple(
        f"{row['kind']}: {row['count']}, mean {took(row['mean_seconds'])}, longest {took(row['longest_seconds'])}"
        for row in document["repaired"]
    )


def _pass_line(passes: Document) -> str:
    ends = ", ".join(f"{count} {text}" for text, count in passes["ends"].items())
    longest = f"; the longest took {took(passes['longest_seconds'])}" if passes["count"] else ""
    return (
        f"{'' if passes['is_all'] else 'at least '}{passes['count']}"
        + (f" ({ends})" if ends else "")
        + longest
    )


def _alert_lines(alerts: Document) -> tuple[str, ...]:
    opened = [
        f"{row['level']} opened: {row['key']} {row['reason']}: {row['detail']}" for row in alerts["opened"]
    ]
    return (
        *opened,
        *(f"{row['level']} resolved: {row['key']} {row['reason']}" for row in alerts["resolved"]),
    )


def _suspension_line(row: Document) -> str:
    end = f"until {row['until']}" if row["until"] else "until resumed"
    return f"{row['target']} {end}" + (f" by {row['owner']}" if row["owner"] else "") + f": {row['reason']}"


# --- forms ------------------------------------------------------------------------------------------


def as_text(document: Document) -> str:
    """For a terminal or a plain mail."""
    found = [f"{headline(document)}  ({document['since']} to {document['until']})"]
    for section in sections(document):
        found += ["", section.title, *(f"  {_plain(line)}" for line in section.lines)]
    return "\n".join(found) + "\n"


def as_chat(document: Document) -> str:
    """Short Markdown: what does not fit stands on the page and in ``reconcile report``."""
    found = [f"**{headline(document)}**"]
    for section in sections(document):
        found += [
            "",
            f"**{section.title}**",
            *(f"- {_markdown(line)}" for line in section.lines[:_CHAT_LINES]),
        ]
        if len(section.lines) > _CHAT_LINES:
            found.append(f"- … and {len(section.lines) - _CHAT_LINES} more")
    return "\n".join(found) + "\n"


def as_html(document: Document) -> str:
    """A whole mail body; styles stand in it, as mail programs want them."""
    is_good = not document["not_as_desired"] and not document["unknown_nodes"]
    colour = "#136c43" if is_good else "#b3201f"
    body = [
        f'<h1 style="font-size:20px;margin:0 0 4px;color:{colour}">{html.escape(headline(document))}</h1>',
        f'<p style="margin:0;color:#57606a">{document["since"]} to {document["until"]}</p>',
    ]
    for section in sections(document):
        body.append(f'<h2 style="font-size:15px;margin:20px 0 4px">{html.escape(section.title)}</h2>')
        items = "".join(
            f'<li style="margin:2px 0">{html.escape(_plain(line))}</li>' for line in section.lines
        )
        body.append(f'<ul style="margin:0;padding-left:20px">{items}</ul>')
    style = "margin:0;padding:24px;background:#ffffff;color:#1b1f24;font:15px/1.5 system-ui,sans-serif"
    title = html.escape(headline(document))
    head = f'<head><meta charset="utf-8"><title>{title}</title></head>'
    return (
        f'<!doctype html>\n<html lang="en">{head}<body style="{style}">\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _plain(line: str) -> str:
    """One line, whatever a node said in it."""
    return " ".join("".join(c if c.isprintable() else " " for c in line).split())


def _markdown(line: str) -> str:
    """Text that no chat takes for markup, a mention or a link."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>~|#@" else c for c in _plain(line))
