"""Alerts after somebody raised one: episodes, their files, and who has been told of what.

The pass only raises and resolves, in its own transactions. Everything that leaves the store is derived by
:meth:`Alerts.settle` from what stands in it: what is not written yet is written, what is not told yet is told.
So it may end anywhere and be called again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from reconciler.model import Alert, Change
from reconciler.settings import Route
from reconciler.store import Store, now_text
from reconciler.wording import (
    Background,
    Message,
    Subject,
    causes,
    level_of,
    opening,
    resolution,
    summary,
)

# A cause is told once in this time on a route, unless it gets worse.
QUIET = timedelta(hours=24)
# Files of resolved alerts and notifications that are over are kept so long; the alerts themselves a year.
KEEP_FILES, KEEP_ROWS = timedelta(days=30), timedelta(days=365)
# When everything breaks at once, so many causes get a notification each; one more sums up the rest.
MAX_MESSAGES = 10

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_LEVEL_SEVERITIES = {"P0": (5, 5), "P1": (3, 4), "P2": (1, 2)}

Row = dict[str, Any]


class Alerts:
    """The alerts of one store. ``directory`` receives a file per episode; ``routes`` are who is told."""

    def __init__(self, store: Store, directory: Path | None, routes: Sequence[Route] = ()) -> None:
        self.store, self.directory, self.routes = store, directory, tuple(routes)

    # --- what the pass says ---

    def raise_(self, alert: Alert, context: Mapping[str, Any], now: datetime) -> None:
        """Open the alert of this key and reason, or refresh the one that is open; nobody is told yet.

        Joins the caller's transaction where there is one. ``context`` is the ``run`` and ``revision`` that
        found it. The severity of an episode is the worst it ever had.
        """
        said = {
            "severity": alert.severity,
            "detail": alert.detail,
            "advice": alert.advice,
            "changes": _dumped([_change(change) for change in alert.changes]),
        }
        with self.store.db.atomic():
            before = self._rows("status = 'open' AND key = ? AND reason = ?", [alert.key, alert.reason])
            if before:
                self._refresh(before[0], said, now)
            else:
                self._begin(alert, said, context, now)

    def _begin(
        self, alert: Alert, said: Mapping[str, Any], context: Mapping[str, Any], now: datetime
    ) -> None:
        subject = Subject.of(alert)
        known = self.store.db.execute("SELECT DISTINCT node FROM conditions").fetchall()
        cause, family = causes(alert, {node for (node,) in known})
        moment = now_text(now)
        self._insert(
            "alerts",
            {
                "key": alert.key, "reason": alert.reason,
                "node": subject.node, "kind": subject.kind, "name": subject.name,
                "status": "open", "opened": moment, "seen": moment,
                "cause": cause, "family": family,
                "run": str(context.get("run", "")), "revision": str(context.get("revision", "")),
                **said,
            },
        )  # fmt: skip

    def _refresh(self, before: Row, said: Mapping[str, Any], now: datetime) -> None:
        said = {**said, "severity": max(before["severity"], said["severity"])}
        # That it was seen once more is no reason to write a file in every pass.
        shown = {**said, "changes": json.loads(said["changes"])}
        file = before["file"] if all(before[name] == value for name, value in shown.items()) else "stale"
        self.store.db.execute(
            "UPDATE alerts SET severity = :severity, detail = :detail, advice = :advice, changes = :changes, "
            "seen = :seen, occurrences = occurrences + 1, file = :file WHERE id = :id",
            {**said, "seen": now_text(now), "file": file, "id": before["id"]},
        )

    def resolve(self, key: str, now: datetime, reason: str = "", only: str | None = None) -> None:
        """End every open alert of this key, or ``only`` the one with that reason; ``reason`` says why it is over."""
        with self.store.db.atomic():
            self.store.db.execute(
                "UPDATE alerts SET status = 'resolved', resolved = :now, resolution = :why, file = 'stale' "
                "WHERE key = :key AND status = 'open' AND (:only IS NULL OR reason = :only)",
                {"key": key, "now": now_text(now), "why": reason, "only": only},
            )

    # --- what people and programs ask ---

    def open(self) -> list[Row]:
        """Every open alert, worst first, as its file has it."""
        return [self._shown(row) for row in self._rows("status = 'open' ORDER BY severity DESC, id")]

    def listed(
        self,
        *,
        search: str | None = None,
        resolved: bool = False,
        node: str | None = None,
        kind: str | None = None,
        levels: Sequence[str] | None = None,
        since: str | None = None,
        limit: int = 50,
    ) -> list[Row]:
        """Alerts that match every filter: open ones, worst first; then, if wanted, ``resolved`` ones, newest first.

        Every word of ``search`` has to stand somewhere in the key, reason, detail or advice. ``since`` is a
        time as the store writes it: opened, or resolved, not before it.
        """
        where, values = ["1"], []
        for clause, value in (("node = ?", node), ("kind = ?", kind)):
            if value is not None:
                where.append(clause)
                values.append(value)
        if since is not None:
            where.append("coalesce(resolved, opened) >= ?")
            values.append(since)
        if not resolved:
            where.append("status = 'open'")
        if levels is not None:
            spans = [_LEVEL_SEVERITIES[level] for level in levels]
            where.append("(" + " OR ".join("severity BETWEEN ? AND ?" for _ in spans) + ")")
            values += [str(bound) for span in spans for bound in span]
        for word in (search or "").split():
            where.append("instr(lower(key || ' ' || reason || ' ' || detail || ' ' || advice), lower(?))")
            values.append(word)
        order = "status = 'open' DESC, CASE status WHEN 'open' THEN severity END DESC, id DESC"
        rows = self._rows(f"{' AND '.join(where)} ORDER BY {order} LIMIT ?", [*values, str(limit)])
        return [self._shown(row) for row in rows]

    def undelivered(self) -> list[Row]:
        """Notifications that wait or were given up, oldest first, with how often they were tried and why not sent."""
        return list(
            self.store.db.query(
                "SELECT id, route, what, level, title, created, status, attempts, next_try, error "
                "FROM deliveries WHERE status != 'sent' ORDER BY id"
            )
        )

    def _shown(self, row: Row) -> Row:
        where = self.directory / file_name(row) if self.directory and row["file"] == "written" else None
        return {
            **document(row),
            "seen": row["seen"],
            "file": str(where) if where else None,
            "file_error": row["file_error"],
        }

    # --- what follows from it ---

    def settle(self, now: datetime) -> None:
        """Bring notifications and files up to what is known: after the pass, or after the one that was killed.

        Never fails for the directory's sake: what could not be written says so in its row and is tried again.
        """
        with self.store.db.atomic():
            for route in self.routes:
                self._tell_openings(route, now)
                self._tell_resolutions(route, now)
        self._forget(now)
        if self.directory is not None:
            self._prune_files(self.directory, now)
            self._write_files(self.directory)

    def _tell_openings(self, route: Route, now: datetime) -> None:
        """Group what this route was not told; the worst first, and a summary where they are too many."""
        alerts = self._rows("status = 'open' ORDER BY id")
        families: dict[str, list[Row]] = {}
        for row in self._untold(route, alerts, now):
            families.setdefault(row["family"], []).append(row)
        groups = sorted(families.values(), key=lambda rows: -max(row["severity"] for row in rows))
        single = len(groups) if len(groups) <= MAX_MESSAGES + 1 else MAX_MESSAGES
        for rows in groups[:single]:
            known = self._background(route, rows, alerts)
            what = "worse" if known.worse_than else "opened"
            self._tell(route, what, opening(rows, known), rows, now)
        if rest := [row for rows in groups[single:] for row in rows]:
            self._tell(route, "opened", summary(rest), rest, now)

    def _untold(self, route: Route, alerts: Iterable[Row], now: datetime) -> list[Row]:
        """Open alerts to tell on this route now: a level it was not told of, of a cause that is not quiet."""
        told = dict(
            self.store.db.execute(
                "SELECT alert, min(level) FROM tellings WHERE route = ? GROUP BY alert", [route.name]
            ).fetchall()
        )
        quiet = dict(
            self.store.db.execute(
                "SELECT a.cause, min(t.level) FROM tellings t JOIN alerts a ON a.id = t.alert "
                "JOIN deliveries d ON d.id = t.delivery WHERE t.route = ? AND d.created > ? GROUP BY a.cause",
                [route.name, now_text(now - QUIET)],
            ).fetchall()
        )
        found: dict[str, list[Row]] = {}
        for row in alerts:
            level = level_of(row["severity"])
            if level in route.levels and level < told.get(row["id"], "P9"):
                found.setdefault(row["cause"], []).append(row)
        return [
            row
            for cause, rows in found.items()
            if level_of(max(row["severity"] for row in rows)) < quiet.get(cause, "P9")
            for row in rows
        ]

    def _background(self, route: Route, rows: Sequence[Row], alerts: Iterable[Row]) -> Background:
        ids = {row["id"] for row in rows}
        also = [r["node"] for r in alerts if r["family"] == rows[0]["family"] and r["id"] not in ids]
        recurred, told, before = 0, "", "P9"
        for cause in {row["cause"] for row in rows}:
            last, moment, level = self.store.db.execute(
                "SELECT coalesce(max(t.alert), 0), max(d.created), min(t.level) FROM tellings t "
                "JOIN alerts a ON a.id = t.alert LEFT JOIN deliveries d ON d.id = t.delivery "
                "WHERE t.route = ? AND a.cause = ?",
                [route.name, cause],
            ).fetchone()
            told, before = max(told, moment or ""), min(before, level or "P9")
            recurred += self.store.db.execute(
                "SELECT count(*) FROM alerts a WHERE cause = ? AND id > ? AND EXISTS "
                "(SELECT 1 FROM alerts b WHERE b.key = a.key AND b.cause = a.cause AND b.id < a.id)",
                [cause, last],
            ).fetchone()[0]
        worst = max(rows, key=lambda row: row["severity"])
        return Background(
            recurred=recurred if told else 0,
            told=told,
            worse_than=before if level_of(worst["severity"]) < before != "P9" else "",
            also=tuple(dict.fromkeys(node for node in also if node)),
            attempts=self._repairs(worst["key"]),
        )

    def _repairs(self, key: str) -> int:
        """How many repairs of this resource began since it was last as desired."""
        row = self.store.db.execute(
            "SELECT count(*) FROM guardian_events WHERE issue_key = :key AND status = 'fixing' AND id > "
            "coalesce((SELECT max(id) FROM guardian_events WHERE issue_key = :key AND status = 'fixed'), 0)",
            {"key": key},
        ).fetchone()
        return int(row[0])

    def _tell_resolutions(self, route: Route, now: datetime) -> None:
        """One message per cause that is over everywhere.

        What was over long ago is no news any more: nobody was here to say so, or the route comes back after a while.
        """
        rows = self._rows(
            "status = 'resolved' AND id IN (SELECT alert FROM tellings WHERE route = ? AND resolution IS NULL) "
            "AND NOT EXISTS (SELECT 1 FROM alerts o WHERE o.cause = alerts.cause AND o.status = 'open') ORDER BY id",
            [route.name],
        )
        families: dict[str, list[Row]] = {}
        for row in rows:
            families.setdefault(row["family"], []).append(row)
        for group in families.values():
            fresh = any(row["resolved"] > now_text(now - QUIET) for row in group)
            number = (
                self._deliver(route, "resolved", resolution(group), now) if route.resolved and fresh else 0
            )
            for row in group:
                self.store.db.execute(
                    "UPDATE tellings SET resolution = ? WHERE alert = ? AND route = ? AND resolution IS NULL",
                    [number, row["id"], route.name],
                )

    def _tell(self, route: Route, what: str, message: Message, rows: Iterable[Row], now: datetime) -> None:
        number = self._deliver(route, what, message, now)
        for row in rows:
            self._insert(
                "tellings",
                {
                    "alert": row["id"],
                    "route": route.name,
                    "level": level_of(row["severity"]),
                    "delivery": number,
                },
            )

    def _deliver(self, route: Route, what: str, message: Message, now: datetime) -> int:
        moment = now_text(now)
        return self._insert(
            "deliveries",
            {
                "route": route.name, "what": what, "level": message.level,
                "title": message.title, "body": message.body, "created": moment, "next_try": moment,
            },
        )  # fmt: skip

    def _forget(self, now: datetime) -> None:
        """Drop what nothing refers to any more."""
        files, rows = now_text(now - KEEP_FILES), now_text(now - KEEP_ROWS)
        with self.store.db.atomic():
            self.store.db.execute("DELETE FROM deliveries WHERE status != 'due' AND ended < ?", [files])
            old = "SELECT id FROM alerts WHERE status = 'resolved' AND file = 'pruned' AND resolved < ?"
            self.store.db.execute(f"DELETE FROM tellings WHERE alert IN ({old})", [rows])  # noqa: S608 - a constant
            self.store.db.execute(f"DELETE FROM alerts WHERE id IN ({old})", [rows])  # noqa: S608 - the same

    # --- files ---

    def _prune_files(self, directory: Path, now: datetime) -> None:
        limit = now_text(now - KEEP_FILES)
        for row in self._rows("status = 'resolved' AND file != 'pruned' AND resolved < ?", [limit]):
            try:
                for path in (directory / file_name(row), _beside(directory, file_name(row))):
                    path.unlink(missing_ok=True)
            except OSError as error:
                self._filed(row, row["file"], _why(error))
            else:
                self._filed(row, "pruned")

    def _write_files(self, directory: Path) -> None:
        """Write what is new, what changed, and what somebody removed while it is open."""
        try:
            present = {entry.name for entry in os.scandir(directory)}
        except OSError:
            present = set()  # it is made below, or cannot be, which every row then says
        due = [
            row
            for row in self._rows("file = 'stale' OR status = 'open' ORDER BY id")
            if row["file"] == "stale" or file_name(row) not in present
        ]
        for row in due:
            try:
                write_file(directory, file_name(row), document(row))
            except OSError as error:
                self._filed(row, "stale", _why(error))
            else:
                self._filed(row, "written")

    def _filed(self, row: Row, state: str, error: str = "") -> None:
        if (row["file"], row["file_error"]) != (state, error):
            with self.store.db.atomic():
                self.store.db.execute(
                    "UPDATE alerts SET file = ?, file_error = ? WHERE id = ?", [state, error, row["id"]]
                )

    # --- the tables ---

    def _rows(self, where: str, values: Sequence[str] = ()) -> list[Row]:
        rows = self.store.db.query(f"SELECT * FROM alerts WHERE {where}", list(values))  # noqa: S608 - only the clauses above
        return [{**row, "changes": json.loads(row["changes"])} for row in rows]

    def _insert(self, table: str, row: Mapping[str, Any]) -> int:
        names = ", ".join(row)
        marks = ", ".join(f":{name}" for name in row)
        cursor = self.store.db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", dict(row))  # noqa: S608 - only the names above
        return int(cursor.lastrowid or 0)


def document(row: Mapping[str, Any]) -> Row:
    """An alert as its file has it: the form that ``alert.schema.json`` describes."""
    level = level_of(row["severity"])
    names = (
        "id", "key", "node", "kind", "name", "reason", "severity", "status", "opened", "resolved",
        "resolution", "detail", "advice", "changes", "occurrences", "run", "revision", "cause",
    )  # fmt: skip
    return {**{name: row[name] for name in names}, "level": level}


def file_name(row: Mapping[str, Any]) -> str:
    """A name that sorts by time, is distinct, and is safe whatever the key holds."""
    opened = datetime.fromisoformat(row["opened"])
    return f"{opened:%Y%m%dT%H%M%SZ}-{row['id']:06d}-{_UNSAFE.sub('_', row['key'])[:100]}.json"


def write_file(directory: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write beside, make it durable, rename: a reader sees the old file or the new one. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = _beside(directory, name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(beside, flags, 0o600), "w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(directory / name)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(directory: Path, name: str) -> Path:
    """The same name each time: what a killed process left is overwritten, not collected."""
    return directory / f".{name}.tmp"


def _why(error: OSError) -> str:
    return f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)


def _change(change: Change) -> Row:
    found = {"field": change.field, "desired": change.desired, "observed": change.observed}
    return {**found, "fixable": change.fixable, "note": change.note}


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
