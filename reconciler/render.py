"""What a person sees at the terminal: a table, diffs, progress. Colours only where there is a terminal."""

from __future__ import annotations

import re
import sqlite3
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from reconciler.desired.load import DesiredError
from reconciler.kinds.base import seconds
from reconciler.model import Change, ConfigurationError, NodeState, Report, Status
from reconciler.report import counts
from reconciler.store import now_text

STYLES = {
    "as desired": "green", "fixed": "green", "drifted": "yellow", "would fix": "yellow", "skipped": "cyan",
    "rolled back": "red", "failed": "bold red", "unknown": "magenta", "detected": "yellow", "fixing": "blue",
    "True": "green", "False": "red", "Unknown": "magenta",
}  # fmt: skip
_DIGEST = re.compile(r"^[0-9a-f]{64}$")


def console(*, stderr: bool = False) -> Console:
    """A console that never breaks lines when nobody's terminal decides the width."""
    found = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not found.is_terminal:
        found = Console(stderr=stderr, highlight=False, width=200)
    return found


def short(value: Any) -> str:
    """A value in a table: digests by their first digits, control characters visible."""
    text = str(value)
    if _DIGEST.match(text):
        return text[:12]
    text = text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text
    return text if len(text) <= 160 else text[:157] + "…"  # noqa: PLR2004


def change_text(change: Change | Mapping[str, Any]) -> str:
    """``field observed → desired`` and the reason where it is only reported."""
    if isinstance(change, Change):
        change = {
            "field": change.field,
            "desired": change.desired,
            "observed": change.observed,
            "note": change.note,
        }
    note = f" ({change['note']})" if change.get("note") else ""
    return f"{change['field']}: {short(change['observed'])} → {short(change['desired'])}{note}"


def problems(error: ConfigurationError, out: Console) -> None:
    """Every problem with its line, a caret under the place, and the way out."""
    for problem in error.problems:
        place = f"{problem.mark}: " if problem.mark else ""
        out.print(Text.assemble((place, "bold"), ("error: ", "bold red"), problem.message), soft_wrap=True)
        line = error.source_line(problem.mark) if problem.mark and isinstance(error, DesiredError) else ""
        if problem.mark and line:
            # Long lines are shown around the place that is meant.
            start = max(0, problem.mark.column - 60)
            shown = line[start : start + 110].replace("\t", " ")
            length = max(1, min(problem.mark.length, 110 - (problem.mark.column - 1 - start)))
            gutter = f"{problem.mark.line:>5} | "
            out.print(Text(gutter + shown), soft_wrap=True)
            out.print(
                Text(" " * (len(gutter) + problem.mark.column - 1 - start) + "^" * length, "bold red"),
                soft_wrap=True,
            )
        if problem.hint:
            out.print(Text.assemble(("  hint: ", "cyan"), problem.hint), soft_wrap=True)
    out.print(Text(f"{len(error.problems)} problem(s); nothing was touched.", "bold"), soft_wrap=True)


class Watch:
    """Progress on standard error while nodes answer; silent where there is no terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self.console = console(stderr=True)
        self.progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console, transient=True, disable=quiet or not sys.stderr.isatty(),
        )  # fmt: skip
        self.task: Any = None
        self.answered: set[str] = set()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.progress.stop()

    def on_run(self, name: str, nodes: int) -> None:
        """A playbook starts."""
        self.answered = set()
        if self.task is not None:
            self.progress.remove_task(self.task)
        label = {"observe.yml": "looking", "converge.yml": "repairing"}.get(name, name)
        self.task = self.progress.add_task(label, total=nodes)

    def on_node(self, state: NodeState) -> None:
        """A node answered."""
        if self.task is not None and state.node not in self.answered:
            self.answered.add(state.node)
            self.progress.advance(self.task)


def report(found: Report, out: Console) -> None:
    """What drifted and what became of it, diffs, unknown nodes, and one line that sums up."""
    _diffs(found, out)
    rows = list(_rows(found))
    if rows:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("NODE", "RESOURCE", "STATE"):
            table.add_column(column, no_wrap=True)
        table.add_column("WHAT AND WHY", overflow="fold")
        for node, resource, state, detail in rows:
            table.add_row(escape(node), escape(resource), Text(state, STYLES.get(state, "")), Text(detail))
        out.print(table)
        out.print()
    out.print(_summary(found), soft_wrap=True)


def _diffs(found: Report, out: Console) -> None:
    styles = {"+": "green", "-": "red", "@": "cyan"}
    # The same replacement on many nodes is shown once.
    shown: dict[str, list[str]] = {}
    for rid, drift in found.drifts.items():
        for change in drift.changes:
            if change.diff:
                shown.setdefault(change.diff, []).append(f"{rid.node}/{rid.kind}/{rid.name}")
    for text, owners in shown.items():
        more = f" and {len(owners) - 1} more" if len(owners) > 1 else ""
        out.print(Text(f"{owners[0]}{more}", "bold"))
        lines = text.splitlines()
        for line in lines[:60]:
            out.print(Text(f"  {line}", styles.get(line[:1], "")), soft_wrap=True)
        if len(lines) > 60:  # noqa: PLR2004
            out.print(Text(f"  … {len(lines) - 60} more lines", "dim"))
        out.print()


def _rows(found: Report) -> Iterable[tuple[str, str, str, str]]:
    for action in found.plan.actions if found.check else ():
        why = f" (because {action.because} will be replaced)" if action.because else ""
        what = "; ".join(map(change_text, action.changes))
        yield action.id.node, f"{action.id.kind}/{action.id.name}", "would fix", what + why
    for outcome in found.outcomes:
        state = outcome.status.value.replace("_", " ")
        what = "; ".join(map(change_text, outcome.changes))
        detail = what if outcome.status is Status.FIXED else f"{outcome.detail} [{what}]"
        yield outcome.id.node, f"{outcome.id.kind}/{outcome.id.name}", state, detail
    for skip in found.plan.skips:
        what = "; ".join(map(change_text, skip.changes))
        yield skip.id.node, f"{skip.id.kind}/{skip.id.name}", "skipped", f"{skip.reason} [{what}]"
    yield from _unknown_rows(found)


def _unknown_rows(found: Report) -> Iterable[tuple[str, str, str, str]]:
    """A node that is silent is one row, not one per resource."""
    for state in found.observed.nodes.values():
        if not state.reachable:
            count = sum(o.id.node == state.node for o in found.unknown)
            yield state.node, f"all {count} resources", "unknown", state.reason
    for observation in found.unknown:
        if found.observed.nodes[observation.id.node].reachable:
            rid = observation.id
            yield rid.node, f"{rid.kind}/{rid.name}", "unknown", observation.unknown


def _summary(found: Report) -> Text:
    count = counts(found)
    parts = [
        (count["as_desired"], "as desired", "green"),
        (len(found.plan.actions) if found.check else 0, "to fix", "yellow"),
        (count["fixed"], "fixed", "green"),
        (count["rolled_back"], "rolled back", "red"),
        (count["failed"], "failed", "bold red"),
        (count["skipped"], "skipped", "cyan"),
        (count["unknown"], "unknown", "magenta"),
    ]
    text = Text(f"{count['nodes']} nodes, {count['resources']} resources: ", "bold")
    shown = [Text(f"{number} {label}", style) for number, label, style in parts if number]
    text.append_text(Text(", ").join(shown))
    text.append(f"  ({found.seconds:.1f} s, exit {int(found.exit_code)})", "dim")
    return text


def events_between(
    store: Any, *, since: str | None, status: str | None, **filters: Any
) -> list[dict[str, Any]]:
    """Events by the filters of the command line. Raises ConfigurationError for one that makes no sense."""
    if status is not None and status not in [value.value for value in Status]:
        raise ConfigurationError(
            f"--status is one of {', '.join(value.value for value in Status)}, not {status!r}"
        )
    moment = moment_since(since) if since is not None else None
    try:
        return list(reversed(store.events(since=moment, status=status, **filters)))
    except sqlite3.OperationalError as error:
        raise ConfigurationError(f"the search {filters['search']!r} is not understood: {error}") from None


def moment_since(text: str) -> str:
    """A duration before now, or an ISO date, as the store writes it. Raises ConfigurationError for anything else."""
    try:
        return now_text(datetime.now(UTC) - timedelta(seconds=seconds(text)))
    except (ValueError, OverflowError):
        pass
    try:
        return now_text(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        raise ConfigurationError(
            f"--since: {text!r} is neither a duration (2h, 3d) nor an ISO date"
        ) from None


def events(rows: Iterable[Mapping[str, Any]], out: Console) -> None:
    """Events as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("WHEN (UTC)", "TYPE", "RESOURCE", "STATUS"):
        table.add_column(column, no_wrap=True)
    table.add_column("DETAILS", overflow="fold")
    for row in rows:
        details = row["details"]
        what = "; ".join(map(change_text, details.get("changes", [])))
        said = f"{details['reason']} [{what}]" if details.get("reason") else what
        state = row["status"].replace("_", " ")
        when = row["timestamp"][:19].replace("T", " ")
        table.add_row(
            when, row["check_type"], escape(row["issue_key"]), Text(state, STYLES.get(state, "")), Text(said)
        )
    out.print(table)


def explanation(document: Mapping[str, Any], out: Console) -> None:
    """One resource in full."""
    out.print(Text(document["id"], "bold"))
    _condition(document["condition"], out)
    out.print(Text.assemble(("declared   ", "dim"), document["declared_at"]), soft_wrap=True)
    if isinstance(document["desired"], str):
        out.print(Text.assemble(("desired    ", "dim"), document["desired"]))
    else:
        for key, value in document["desired"].items():
            out.print(Text.assemble((f"  {key:<14}", "dim"), short(value)), soft_wrap=True)
    for dependency in document["depends_on"]:
        out.print(
            Text.assemble(("depends on ", "dim"), f"{dependency['id']} ({dependency['status']})"),
            soft_wrap=True,
        )
    policy = document["policy"]
    out.print(
        Text.assemble(("policy     ", "dim"), ", ".join(f"{k} {v}" for k, v in policy.items() if v)),
        soft_wrap=True,
    )
    out.print(
        Text.assemble(
            ("attempts   ", "dim"), f"{document['attempts_in_episode']} failed since it was last as desired"
        )
    )
    for key, label in (
        ("next_attempt", "next try   "),
        ("quarantined_until", "quarantine "),
        ("interrupted_attempt", "to finish  "),
    ):
        if document[key]:
            out.print(Text.assemble((label, "dim"), document[key]))
    if document["events"]:
        out.print()
        events(reversed(document["events"]), out)


def _condition(condition: Mapping[str, Any] | None, out: Console) -> None:
    """How it stands, since when, and what the node said."""
    if condition is None:
        out.print("never looked at: run a pass")
        return
    text = Text.assemble(("condition  ", "dim"), (condition["reason"], STYLES[condition["status"]]))
    out.print(text + Text(f" since {condition['since']}, last seen {condition['seen']}"), soft_wrap=True)
    if condition["message"]:
        out.print(Text(f"           {condition['message']}"), soft_wrap=True)
    for change in condition["details"].get("changes", []):
        out.print(Text(f"           {change_text(change)}"), soft_wrap=True)
    if condition["details"].get("advice"):
        out.print(Text(f"           → {condition['details']['advice']}"), soft_wrap=True)
    observed = condition["details"].get("observed")
    for key, value in observed.items() if isinstance(observed, dict) else ():
        out.print(Text.assemble((f"  {key:<14}", "dim"), short(value)), soft_wrap=True)
