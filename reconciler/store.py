"""The durable record: events, passes and conditions in one SQLite file. The only importer of sqlite-utils."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlite_utils
from sqlite_utils.db import NotFoundError

from reconciler.model import ConfigurationError, Event, Problem, Status

BUSY_SECONDS = 10.0


class BusyError(Exception):
    """Another pass holds the store; the message says which."""


# Any failure of the database below; named here so that nobody else has to know what is underneath.
StoreError = sqlite3.Error


def _m001_initial(db: sqlite_utils.Database) -> None:
    statuses = ", ".join(f"'{status.value}'" for status in Status)
    db.conn.executescript(f"""
        CREATE TABLE IF NOT EXISTS guardian_events (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            timestamp TEXT NOT NULL,
            check_type TEXT NOT NULL,
            issue_key TEXT NOT NULL,
            severity INTEGER NOT NULL CHECK (severity BETWEEN 1 AND 5),
            status TEXT NOT NULL CHECK (status IN ({statuses})),
            fix_attempts INTEGER NOT NULL DEFAULT 0,
            details TEXT NOT NULL,
            node TEXT NOT NULL
        );
        CREATE INDEX IF NOT EXISTS guardian_events_by_issue ON guardian_events (issue_key, id);
        CREATE INDEX IF NOT EXISTS guardian_events_by_time ON guardian_events (timestamp);
        CREATE TABLE IF NOT EXISTS passes (
            run_id TEXT PRIMARY KEY, started TEXT NOT NULL, seconds REAL NOT NULL, revision TEXT NOT NULL,
            exit_code INTEGER NOT NULL, scope TEXT NOT NULL, counts TEXT NOT NULL, next TEXT
        );
        CREATE TABLE IF NOT EXISTS conditions (
            issue_key TEXT PRIMARY KEY, node TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
            status TEXT NOT NULL, reason TEXT NOT NULL, message TEXT NOT NULL, since TEXT NOT NULL,
            seen TEXT NOT NULL, digest TEXT NOT NULL, details TEXT NOT NULL
        );
    """)


def _m002_search(db: sqlite_utils.Database) -> None:
    events = db.table("guardian_events")
    events.enable_fts(["issue_key", "details"], create_triggers=True, tokenize="unicode61", replace=True)


def _m003_alerts(db: sqlite_utils.Database) -> None:
    db.conn.executescript("""
        CREATE TABLE IF NOT EXISTS alerts (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            key TEXT NOT NULL, reason TEXT NOT NULL, node TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
            severity INTEGER NOT NULL CHECK (severity BETWEEN 1 AND 5),
            status TEXT NOT NULL CHECK (status IN ('open', 'resolved')),
            opened TEXT NOT NULL, seen TEXT NOT NULL, occurrences INTEGER NOT NULL DEFAULT 1,
            resolved TEXT, resolution TEXT NOT NULL DEFAULT '',
            detail TEXT NOT NULL, advice TEXT NOT NULL, changes TEXT NOT NULL,
            cause TEXT NOT NULL, family TEXT NOT NULL, run TEXT NOT NULL, revision TEXT NOT NULL,
            file TEXT NOT NULL DEFAULT 'stale' CHECK (file IN ('stale', 'written', 'pruned')),
            file_error TEXT NOT NULL DEFAULT ''
        );
        CREATE UNIQUE INDEX IF NOT EXISTS alerts_open ON alerts (key, reason) WHERE status = 'open';
        CREATE INDEX IF NOT EXISTS alerts_by_cause ON alerts (cause, id);
        CREATE INDEX IF NOT EXISTS alerts_by_file ON alerts (file, resolved);
        CREATE TABLE IF NOT EXISTS deliveries (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            route TEXT NOT NULL, what TEXT NOT NULL CHECK (what IN ('opened', 'worse', 'resolved')),
            level TEXT NOT NULL, title TEXT NOT NULL, body TEXT NOT NULL, created TEXT NOT NULL,
            status TEXT NOT NULL DEFAULT 'due' CHECK (status IN ('due', 'sent', 'given_up')),
            attempts INTEGER NOT NULL DEFAULT 0, next_try TEXT NOT NULL, error TEXT NOT NULL DEFAULT '', ended TEXT
        );
        CREATE INDEX IF NOT EXISTS deliveries_due ON deliveries (status, next_try);
        CREATE TABLE IF NOT EXISTS tellings (
            alert INTEGER NOT NULL, route TEXT NOT NULL, level TEXT NOT NULL, delivery INTEGER NOT NULL,
            resolution INTEGER, PRIMARY KEY (alert, route, level)
        );
        CREATE INDEX IF NOT EXISTS tellings_by_resolution ON tellings (resolution, route);
    """)


# Each may run again over its own half-done work: a process can end in the middle of one.
MIGRATIONS: tuple[Callable[[sqlite_utils.Database], None], ...] = (_m001_initial, _m002_search, _m003_alerts)


class Store:
    """Events and conditions. One writer at a time: :meth:`exclusive` is held for a whole pass."""

    def __init__(self, path: Path | None) -> None:
        """Open, creating what is missing. ``None`` keeps everything in memory (for tests)."""
        self.path = path
        connection = None
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            connection = sqlite3.connect(str(path) if path else ":memory:", timeout=BUSY_SECONDS)
            self.db = sqlite_utils.Database(connection)
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
    def exclusive(self, run_id: str) -> Iterator[None]:
        """Keep every other pass over this store out. Raises BusyError at once where one is under way.

        A lock on a file beside the database, which the system drops with its holder: a killed pass
        leaves nothing behind that somebody has to clear.
        """
        if self.path is None:
            yield
            return
        lock = self.path.with_name(self.path.name + ".lock")
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.read(handle, 200).decode(errors="replace").strip() or "unknown"
                raise BusyError(f"another pass is under way ({holder})") from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{run_id}, process {os.getpid()}".encode(), 0)
            yield
            os.ftruncate(handle, 0)
        finally:
            os.close(handle)

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

    def attempts(self, issue_key: str) -> int:
        """How many repairs of this resource began since it was last as desired."""
        row = self.db.execute(
            "SELECT count(*) FROM guardian_events WHERE issue_key = ? AND status = 'fixing' AND id > "
            "coalesce((SELECT max(id) FROM guardian_events WHERE issue_key = ? AND status = 'fixed'), 0)",
            [issue_key, issue_key],
        ).fetchone()
        return int(row[0])

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
        with self.db.conn:
            prepared = [
                {**row, "details": json.dumps(row["details"], ensure_ascii=False, default=str)}
                for row in rows
            ]
            self.db.table("conditions").upsert_all(prepared, pk="issue_key")
            for issue_key in forget:
                self.db.execute("DELETE FROM conditions WHERE issue_key = ?", [issue_key])

    def set_pass(self, row: Mapping[str, Any]) -> None:
        """Record a pass; the last 1,000 are kept."""
        with self.db.conn:
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


def _quoted_words(text: str) -> str:
    """Words as full-text search terms: slashes and hyphens of issue keys are not operators."""
    if '"' in text:
        return text
    return " ".join(f'"{word}"' if not word.replace("*", "").isalnum() else word for word in text.split())
