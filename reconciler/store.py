"""The durable record: events, attempts, conditions in one SQLite file. With its migrations the door to sqlite-utils."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlite_utils
from sqlite_utils.db import NotFoundError

from reconciler.migrations import MIGRATIONS
from reconciler.model import (
    Change,
    ConfigurationError,
    Event,
    LeaseLostError,
    Limits,
    OpenAttempt,
    Problem,
    Repairs,
    ResourceId,
    Suspension,
)

BUSY_SECONDS = 10.0


# Any failure of the database below; named here so that nobody else has to know what is underneath.
StoreError = sqlite3.Error


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """One process at a time turns to WAL and migrates: SQLite refuses a second one at once instead of waiting.

    The directory is locked, which leaves no file behind. A process that was stopped in there does not stop others
    for good: after a while they go on, and SQLite sees to what matters.
    """
    if path is None:
        yield
        return
    handle = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + BUSY_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break  # a file system without such locks
        yield
    finally:
        os.close(handle)


class Store:
    """Events, attempts and conditions. What a pass writes, it writes under its lease: see ``lease.py``."""

    def __init__(self, path: Path | None) -> None:
        """Open, creating what is missing. ``None`` keeps everything in memory (for tests)."""
        self.path = path
        connection = None
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            connection = sqlite3.connect(str(path) if path else ":memory:", timeout=BUSY_SECONDS)
            self.db = sqlite_utils.Database(connection)
            with _alone(path):
                if path is not None:
                    self.db.enable_wal()
                connection.execute("PRAGMA synchronous = NORMAL")
                self._migrate()
        except (sqlite3.Error, OSError) as error:
            if connection is not None:
                connection.close()
            hint = "name another file with --db, or move this one away"
            raise ConfigurationError(
                [Problem(f"the database {path} cannot be used: {error}", hint=hint)]
            ) from error

    def close(self) -> None:
        """Let go of the file."""
        self.db.conn.close()

    def _migrate(self) -> None:
        done = self.db.execute("PRAGMA user_version").fetchone()[0]
        if done > len(MIGRATIONS):
            raise sqlite3.DatabaseError(f"it was written by a newer version (schema {done})")
        for number, migration in enumerate(MIGRATIONS[done:], start=done + 1):
            migration(self.db)
            self.db.conn.execute(f"PRAGMA user_version = {number}")
            self.db.conn.commit()

    @contextmanager
    def transaction(self, epoch: int | None = None) -> Iterator[None]:
        """All of what is written inside, or nothing. With ``epoch``: only while that lease holds.

        Raises LeaseLostError where another controller has taken over. Writing first takes the write lock, so
        nobody can take the lease between the check and the end of the transaction.
        """
        with self.db.atomic():
            if epoch is not None:
                held = self.db.execute("UPDATE lease SET epoch = epoch WHERE id = 1 AND epoch = ?", [epoch])
                if held.rowcount != 1:
                    raise LeaseLostError(
                        "another controller has taken over; it carries on with what was begun"
                    )
            yield

    # --- events ---

    def record(self, events: Iterable[Event]) -> None:
        """Append events, in order, in one transaction."""
        rows = [
            {
                "timestamp": event.timestamp.astimezone(UTC).isoformat(timespec="milliseconds"),
                "check_type": event.check_type,
                "issue_key": str(event.id),
                "severity": event.severity,
                "status": event.status.value,
                "fix_attempts": event.fix_attempts,
                "details": json.dumps(event.details, ensure_ascii=False, default=str),
                "node": event.id.node,
            }
            for event in events
        ]
        if rows:
            with self.db.atomic():
                self.db.table("guardian_events").insert_all(rows)

    def events(
        self,
        *,
        node: str | None = None,
        kind: str | None = None,
        issue_key: str | None = None,
        status: str | None = None,
        since: str | None = None,
        search: str | None = None,
        limit: int = 50,
    ) -> list[dict[str, Any]]:
        """The newest events that match every filter, newest first; ``search`` is SQLite full-text syntax."""
        where, values = ["1"], {"limit": limit}
        arguments: dict[str, Any] = dict(values)
        filters = {
            "node": ("e.node = :node", node),
            "kind": ("e.issue_key LIKE '%/' || :kind || '/%'", kind),
            "issue_key": ("e.issue_key = :issue_key", issue_key),
            "status": ("e.status = :status", status),
            "since": ("e.timestamp >= :since", since),
            "search": (
                "e.id IN (SELECT rowid FROM guardian_events_fts WHERE guardian_events_fts MATCH :search)",
                search,
            ),
        }
        for name, (clause, value) in filters.items():
            if value is not None:
                where.append(clause)
                arguments[name] = _quoted_words(value) if name == "search" else value
        sql = f"SELECT e.* FROM guardian_events e WHERE {' AND '.join(where)} ORDER BY e.id DESC LIMIT :limit"  # noqa: S608 - only the clauses above
        rows = list(self.db.query(sql, arguments))
        return [{**row, "details": json.loads(row["details"])} for row in rows]

    # --- attempts and what came of them ---

    def history(self, limits: Limits, now: datetime) -> dict[ResourceId, Repairs]:
        """What was tried on every resource that is not simply as desired."""
        found: dict[ResourceId, Repairs] = {}
        counted = self._corrections(_exact(now - timedelta(seconds=limits.corrections_window)))
        rows = {row["issue_key"]: row for row in self.db.query("SELECT * FROM repairs")}
        begun = {str(attempt.id): attempt for attempt in self.open_attempts()}
        for key in {*rows, *begun, *counted}:
            row = rows.get(key, {})
            found[ResourceId.parse(key)] = Repairs(
                attempts=row.get("attempts", 0),
                digest=row.get("digest", ""),
                last_attempt=_moment(row.get("last_attempt")),
                next_attempt=_moment(row.get("next_attempt")),
                exhausted=bool(row.get("exhausted")),
                corrections=counted.get(key, 0),
                quarantined_until=_moment(row.get("quarantined_until")),
                open=begun.get(key),
            )
        return found

    def _corrections(self, since: str | None) -> dict[str, int]:
        """How often each resource was put right since then though nobody had changed its declaration."""
        rows = self.db.query(
            "SELECT e.issue_key, count(*) AS times FROM guardian_events e LEFT JOIN repairs r USING (issue_key)"
            " WHERE e.timestamp >= max(?, coalesce(r.counted_from, '')) AND e.status = 'fixed' AND e.fix_attempts > 0"
            " AND json_extract(e.details, '$.cause') = 'corrective' GROUP BY e.issue_key",
            [since],
        )
        return {row["issue_key"]: row["times"] for row in rows}

    def set_repairs(self, rid: ResourceId, repairs: Repairs) -> None:
        """Write what was tried on one resource; ``corrections`` and ``open`` are kept elsewhere."""
        row = {
            "attempts": repairs.attempts,
            "digest": repairs.digest,
            "last_attempt": _exact(repairs.last_attempt),
            "next_attempt": _exact(repairs.next_attempt),
            "exhausted": int(repairs.exhausted),
            "quarantined_until": _exact(repairs.quarantined_until),
        }
        with self.db.atomic():
            self.db.table("repairs").upsert({"issue_key": str(rid), **row}, pk="issue_key")

    def forget_repairs(self, rid: ResourceId, *, counted_from: datetime | None = None) -> None:
        """Begin anew: it is as desired, or somebody says that it may be tried; corrections count from then on."""
        with self.db.atomic():
            if counted_from is None:
                self.db.execute(
                    "UPDATE repairs SET attempts = 0, digest = '', last_attempt = NULL, next_attempt = NULL,"
                    " exhausted = 0 WHERE issue_key = ?",
                    [str(rid)],
                )
                return
            row = {"issue_key": str(rid), "attempts": 0, "digest": "", "counted_from": _exact(counted_from)}
            self.db.table("repairs").insert(row, replace=True)

    def begin_attempts(self, attempts: Iterable[OpenAttempt]) -> None:
        """Put attempts on record before anything is done."""
        with self.db.atomic():
            self.db.table("attempts").upsert_all(
                [
                    {
                        "issue_key": str(attempt.id),
                        "attempt": attempt.attempt,
                        "number": attempt.number,
                        "digest": attempt.digest,
                        "is_undoing": int(attempt.is_undoing),
                        "before": json.dumps([asdict(change) for change in attempt.before], default=str),
                        "started": now_text(datetime.now(UTC)),
                    }
                    for attempt in attempts
                ],
                pk="issue_key",
            )

    def undo_begins(self, ids: Iterable[ResourceId]) -> None:
        """From here on these attempts are only ever undone."""
        with self.db.atomic():
            for rid in ids:
                self.db.execute("UPDATE attempts SET is_undoing = 1 WHERE issue_key = ?", [str(rid)])

    def end_attempts(self, ids: Iterable[ResourceId]) -> None:
        """They have an end on record."""
        with self.db.atomic():
            for rid in ids:
                self.db.execute("DELETE FROM attempts WHERE issue_key = ?", [str(rid)])

    def open_attempts(self) -> list[OpenAttempt]:
        """Attempts that began and have no end on record."""
        return [
            OpenAttempt(
                ResourceId.parse(row["issue_key"]),
                row["attempt"],
                row["number"],
                row["digest"],
                bool(row["is_undoing"]),
                tuple(Change(**change) for change in json.loads(row["before"])),
            )
            for row in self.db.query("SELECT * FROM attempts ORDER BY started, issue_key")
        ]

    # --- what people said ---

    def suspensions(self) -> dict[str, Suspension]:
        """Suspensions from the command line, by target."""
        return {
            row["target"]: Suspension(row["reason"], row["owner"], _moment(row["until"]))
            for row in self.db.query("SELECT * FROM suspensions ORDER BY target")
        }

    def suspend(self, target: str, found: Suspension) -> None:
        """Leave what ``target`` covers alone; an earlier suspension of the same target is replaced."""
        row = {"target": target, "reason": found.reason, "owner": found.owner, "until": _exact(found.until)}
        with self.db.atomic():
            self.db.table("suspensions").upsert({**row, "created": now_text(datetime.now(UTC))}, pk="target")

    def resume(self, target: str) -> bool:
        """End the suspension of exactly this target; False where there is none."""
        with self.db.atomic():
            return self.db.execute("DELETE FROM suspensions WHERE target = ?", [target]).rowcount > 0

    # --- what analyzers said ---

    def episodes(self, rid: ResourceId) -> int:
        """How often an issue was detected."""
        sql = "SELECT count(*) FROM guardian_events WHERE issue_key = ? AND status = 'detected'"
        return int(self.db.execute(sql, [str(rid)]).fetchone()[0])

    def annotate(self, rid: ResourceId, severity: int, analysis: Mapping[str, Any]) -> None:
        """Add a judgement to the event that opened the present episode."""
        with self.db.atomic():
            self.db.execute(
                "UPDATE guardian_events SET severity = ?, details = json_set(details, '$.analysis', json(?)) WHERE id ="
                " (SELECT max(id) FROM guardian_events WHERE issue_key = ? AND status = 'detected')",
                [severity, json.dumps(analysis, ensure_ascii=False, default=str), str(rid)],
            )

    def propose(self, rid: ResourceId, digest: str, backend: str, what: Mapping[str, Any]) -> None:
        """Keep what was proposed and may run: ``install`` and ``commands``."""
        row = {key: json.dumps(what.get(key)) for key in ("install", "commands")}
        row |= {"digest": digest, "backend": backend, "created": now_text(datetime.now(UTC))}
        with self.db.atomic():
            self.db.table("proposals").upsert({"issue_key": str(rid), **row}, pk="issue_key")

    def proposals(self) -> dict[ResourceId, dict[str, Any]]:
        """What was proposed and may run, for the declaration ``digest``."""
        return {
            ResourceId.parse(row["issue_key"]): {
                "digest": row["digest"],
                "install": json.loads(row["install"]),
                "commands": json.loads(row["commands"]),
            }
            for row in self.db.query("SELECT * FROM proposals")
        }

    def hold(self, name: str) -> dict[str, Any] | None:
        """What is held under this name, or None."""
        for row in self.db.query("SELECT * FROM holds WHERE name = ?", [name]):
            found: dict[str, Any] = json.loads(row["details"])
            return found
        return None

    def set_hold(self, name: str, details: Mapping[str, Any] | None) -> None:
        """Hold, or let go (None)."""
        with self.db.atomic():
            if details is None:
                self.db.execute("DELETE FROM holds WHERE name = ?", [name])
            else:
                row = {"name": name, "details": json.dumps(details), "since": now_text(datetime.now(UTC))}
                self.db.table("holds").upsert(row, pk="name")

    # --- conditions and passes ---

    def conditions(self) -> dict[str, dict[str, Any]]:
        """The last known condition of every resource, by issue key."""
        rows = self.db.query("SELECT * FROM conditions ORDER BY node, kind, name")
        return {row["issue_key"]: {**row, "details": json.loads(row["details"])} for row in rows}

    def condition(self, issue_key: str) -> dict[str, Any] | None:
        """One resource's condition, or None."""
        with suppress(NotFoundError):
            row = dict(self.db.table("conditions").get(issue_key))
            return {**row, "details": json.loads(row["details"])}
        return None

    def set_conditions(self, rows: Iterable[Mapping[str, Any]], forget: Iterable[str] = ()) -> None:
        """Write conditions; ``forget`` names those whose declaration is gone."""
        with self.db.atomic():
            prepared = [
                {**row, "details": json.dumps(row["details"], ensure_ascii=False, default=str)}
                for row in rows
            ]
            self.db.table("conditions").upsert_all(prepared, pk="issue_key")
            for issue_key in forget:
                self.db.execute("DELETE FROM conditions WHERE issue_key = ?", [issue_key])

    def close_episode(self, rid: ResourceId) -> None:
        """Its terminal event is on record: the next drift is a new episode."""
        with self.db.atomic():
            self.db.execute(
                "UPDATE conditions SET details = json_set(details, '$.open', json('false')) WHERE issue_key = ?",
                [str(rid)],
            )

    def set_pass(self, row: Mapping[str, Any]) -> None:
        """Record a pass; the last 1,000 are kept."""
        with self.db.atomic():
            self.db.table("passes").insert({**row, "counts": json.dumps(row["counts"])}, replace=True)
            self.db.execute(
                "DELETE FROM passes WHERE run_id NOT IN (SELECT run_id FROM passes ORDER BY started DESC LIMIT 1000)"
            )

    def last_pass(self) -> dict[str, Any] | None:
        """The newest pass, or None before the first."""
        for row in self.db.query("SELECT * FROM passes ORDER BY started DESC LIMIT 1"):
            return {**row, "counts": json.loads(row["counts"])}
        return None


def now_text(moment: datetime) -> str:
    """A time as the store writes it: UTC, ISO 8601, seconds."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _exact(moment: datetime | None) -> str | None:
    """A time that decides something: to the millisecond, so that it compares as text with those of events."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds") if moment else None


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _quoted_words(text: str) -> str:
    """Words as full-text search terms: slashes and hyphens of issue keys are not operators."""
    if '"' in text:
        return text
    return " ".join(f'"{word}"' if not word.replace("*", "").isalnum() else word for word in text.split())
