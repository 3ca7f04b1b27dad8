"""Alerts and their notifications as people and programs ask for them: ``reconcile alerts``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from reconciler.alerts import Alerts
from reconciler.model import ConfigurationError, Problem
from reconciler.render import change_text, moment_since
from reconciler.settings import FILE, Route
from reconciler.wording import LEVELS

STYLES = {"P0": "bold red", "P1": "red", "P2": "yellow"}
SHOWN = 20
NO_ROUTE = Problem("no route is configured", hint=f"add a [[notify]] table to {FILE}; see docs/alerts.md")


def alerts_document(
    alerts: Alerts, *, since: str | None, level: str | None, **filters: Any
) -> dict[str, Any]:
    """Alerts by the filters of the command line, and what waits to be told. Raises ConfigurationError."""
    levels = (
        [word.strip().upper() for word in level.split(",") if word.strip()] if level is not None else None
    )
    if levels is not None and (not levels or not set(levels) <= set(LEVELS)):
        raise ConfigurationError(f"--level is one or more of {', '.join(LEVELS)}, not {level!r}")
    moment = moment_since(since) if since is not None else None
    return {
        "alerts": alerts.listed(since=moment, levels=levels, **filters),
        "undelivered": alerts.undelivered(),
    }


def alerts_table(document: Mapping[str, Any], out: Console) -> None:
    """What is wrong, the worst first, what to do about it; then what could not be told or written."""
    rows = document["alerts"]
    if rows:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("LEVEL", "SINCE (UTC)", "ABOUT", "REASON"):
            table.add_column(column, no_wrap=True)
        table.add_column("WHAT, AND WHAT TO DO", overflow="fold")
        for row in rows:
            when = row["opened"][:16].replace("T", " ")
            style = STYLES[row["level"]] if row["status"] == "open" else "dim"
            table.add_row(
                Text(row["level"], style), when, escape(row["key"]), escape(row["reason"]), _what(row)
            )
        out.print(table)
    else:
        out.print("No alert matches.")
    for line in _troubles(document):
        out.print(Text(line, "yellow"), soft_wrap=True)


def tried_document(routes: Iterable[Route], errors: Mapping[str, str]) -> list[dict[str, str]]:
    """Routes that a test message was sent on, and why it did not arrive."""
    return [{"route": route.name, "url": route.url, "error": errors[route.name]} for route in routes]


def tried_table(document: Iterable[Mapping[str, str]], out: Console) -> None:
    """Which routes took the test message. Where the address stands is no secret, what stands there is."""
    for row in document:
        said = f"failed: {row['error']}" if row["error"] else "sent"
        out.print(f"{row['route']} ({row['url']}): {said}", markup=False, soft_wrap=True)


def _what(row: Mapping[str, Any]) -> Text:
    """In words; control characters of a node's answer do not reach the terminal."""
    lines = [row["detail"], *map(change_text, row["changes"])]
    if row["advice"]:
        lines.append(f"→ {row['advice']}")
    if row["to"]:
        lines.append(f"for {', '.join(row['to'])}")
    if row["status"] == "resolved":
        lines.append(f"resolved {row['resolved'][:16].replace('T', ' ')}" + _colon(row["resolution"]))
    elif row["occurrences"] > 1:
        lines.append(f"raised {row['occurrences']} times, last {row['seen'][:16].replace('T', ' ')}")
    return Text("\n".join(" ".join("".join(c if c.isprintable() else " " for c in x).split()) for x in lines))


def _troubles(document: Mapping[str, Any]) -> Iterable[str]:
    for error in dict.fromkeys(row["file_error"] for row in document["alerts"] if row["file_error"]):
        yield f"alert files cannot be written: {error}"
    waiting = document["undelivered"]
    for row in waiting[:SHOWN]:
        tried = {0: "not tried yet", 1: "tried once"}.get(row["attempts"], f"tried {row['attempts']} times")
        then = (
            "given up"
            if row["status"] == "given_up"
            else f"next try {row['next_try'][:16].replace('T', ' ')}"
        )
        yield f"not delivered on {row['route']}{_colon(row['error'])} ({tried}, {then}): {row['title']}"
    if len(waiting) > SHOWN:
        yield f"… and {len(waiting) - SHOWN} more notifications that are not delivered"


def _colon(text: str) -> str:
    return f": {text}" if text else ""
