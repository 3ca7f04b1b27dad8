"""The tables of the store, as small steps that are each taken once."""

from __future__ import annotations

from collections.abc import Callable

import sqlite_utils

from reconciler.model import Status


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


def _m004_safety(db: sqlite_utils.Database) -> None:
    db.conn.executescript("""
        CREATE TABLE IF NOT EXISTS lease (
            id INTEGER PRIMARY KEY CHECK (id = 1), epoch INTEGER NOT NULL, holder TEXT NOT NULL, boot TEXT NOT NULL,
            clock REAL NOT NULL, renewed TEXT NOT NULL, fence_due INTEGER NOT NULL DEFAULT 0
        );
        CREATE TABLE IF NOT EXISTS attempts (
            issue_key TEXT PRIMARY KEY, attempt TEXT NOT NULL, number INTEGER NOT NULL, digest TEXT NOT NULL,
            is_undoing INTEGER NOT NULL DEFAULT 0, before TEXT NOT NULL, started TEXT NOT NULL
        );
        CREATE TABLE IF NOT EXISTS repairs (
            issue_key TEXT PRIMARY KEY, attempts INTEGER NOT NULL, digest TEXT NOT NULL, last_attempt TEXT,
            next_attempt TEXT, exhausted INTEGER NOT NULL DEFAULT 0, counted_from TEXT, quarantined_until TEXT
        );
        CREATE TABLE IF NOT EXISTS suspensions (
            target TEXT PRIMARY KEY, reason TEXT NOT NULL, owner TEXT NOT NULL, until TEXT, created TEXT NOT NULL
        );
        CREATE TABLE IF NOT EXISTS proposals (
            issue_key TEXT PRIMARY KEY, digest TEXT NOT NULL, backend TEXT NOT NULL, install TEXT NOT NULL,
            commands TEXT NOT NULL, created TEXT NOT NULL
        );
        CREATE TABLE IF NOT EXISTS holds (name TEXT PRIMARY KEY, details TEXT NOT NULL, since TEXT NOT NULL);
    """)


def _m005_asks(db: sqlite_utils.Database) -> None:
    db.conn.executescript("""
        CREATE TABLE IF NOT EXISTS asks (
            id INTEGER PRIMARY KEY AUTOINCREMENT, target TEXT NOT NULL, by TEXT NOT NULL, asked TEXT NOT NULL,
            taken TEXT, run_id TEXT, exit_code INTEGER, done TEXT, problem TEXT NOT NULL DEFAULT ''
        );
    """)


# Upper bounds, in seconds, of the histograms below; what is longer counts as "+Inf".
PASS_BOUNDS = (1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
REPAIR_BOUNDS = (5, 10, 30, 60, 300, 900, 1800, 3600, 14400, 86400, 604800)


def _m006_totals(db: sqlite_utils.Database) -> None:
    """Sums that only ever grow, whoever writes and whatever is pruned: the database itself keeps them."""
    tables = {"passes": _PASS_SUMS, "guardian_events": _EVENT_SUMS}
    script = ["BEGIN IMMEDIATE", _TOTALS, "DELETE FROM totals"]
    for table, sums in tables.items():
        # What is there already, as if each row came in now; then whatever comes in.
        script.append(f"DROP TRIGGER IF EXISTS totals_of_{table}")
        script += [
            _adding((what.replace("NEW.", "row."), condition.replace("NEW.", "row.")), f"{table} AS row")
            for what, condition in sums
        ]
        body = ";\n".join(_adding(part, "(SELECT 1)") for part in sums)
        script.append(f"CREATE TRIGGER totals_of_{table} AFTER INSERT ON {table} BEGIN\n{body};\nEND")
    db.conn.executescript(";\n".join([*script, "COMMIT;"]))


_TOTALS = """CREATE TABLE IF NOT EXISTS totals (
    name TEXT NOT NULL, kind TEXT NOT NULL, label TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (name, kind, label)
) WITHOUT ROWID"""


def _bucket(value: str, bounds: tuple[float, ...]) -> str:
    cases = " ".join(f"WHEN {value} <= {bound} THEN '{float(bound)}'" for bound in bounds)
    return f"CASE {cases} ELSE '+Inf' END"


def _adding(what: tuple[str, str], rows: str) -> str:
    """Add (``name, kind, label, value``, condition) of rows; of ``last_success`` the newest counts."""
    columns, condition = what
    return (
        f"INSERT INTO totals SELECT {columns} FROM {rows} WHERE {condition} "  # noqa: S608 - constants below
        "ON CONFLICT (name, kind, label) DO UPDATE SET value = "
        "iif(name = 'last_success', max(value, excluded.value), value + excluded.value)"
    )


_REST = "substr(NEW.issue_key, instr(NEW.issue_key, '/') + 1)"
_KIND = f"substr({_REST}, 1, instr({_REST}, '/') - 1)"
# From the last detection to this end, unless another end lies between; in seconds, to the millisecond. A clock that
# was set back makes no sum smaller, and a time that is none is not counted: what is recorded never fails for this.
_REPAIR = (
    "max(0, round((julianday(NEW.timestamp) - julianday((SELECT d.timestamp FROM guardian_events d "
    "WHERE d.issue_key = NEW.issue_key AND d.id < NEW.id AND d.status IN ('detected', 'fixed') "
    "ORDER BY d.id DESC LIMIT 1))) * 86400, 3))"
)
_BEFORE = (
    "(SELECT d.status FROM guardian_events d WHERE d.issue_key = NEW.issue_key AND d.id < NEW.id "
    "AND d.status IN ('detected', 'fixed') ORDER BY d.id DESC LIMIT 1)"
)
_ENDS_AN_EPISODE = f"NEW.status = 'fixed' AND {_BEFORE} = 'detected' AND {_REPAIR} IS NOT NULL"
_PASS_SUMS = (
    ("'passes', '', CAST(NEW.exit_code AS TEXT), 1", "true"),
    ("'pass_seconds_sum', '', '', NEW.seconds", "true"),
    (f"'pass_seconds_bucket', '', {_bucket('NEW.seconds', PASS_BOUNDS)}, 1", "true"),
    # Drift that is left alone on purpose is no failure.
    (
        "'last_success', '', '', CAST(strftime('%s', NEW.started) AS REAL) + NEW.seconds",
        "NEW.exit_code IN (0, 2) AND strftime('%s', NEW.started) IS NOT NULL",
    ),
)
_EVENT_SUMS = (
    (
        f"'attempts', {_KIND}, NEW.status, 1",
        "NEW.fix_attempts > 0 AND NEW.status IN ('fixed', 'failed', 'rolled_back')",
    ),
    (f"'repair_seconds_sum', {_KIND}, '', {_REPAIR}", _ENDS_AN_EPISODE),
    (f"'repair_seconds_bucket', {_KIND}, {_bucket(_REPAIR, REPAIR_BOUNDS)}, 1", _ENDS_AN_EPISODE),
)


def _m007_audience(db: sqlite_utils.Database) -> None:
    if "audience" not in db.table("alerts").columns_dict:
        db.conn.execute("ALTER TABLE alerts ADD COLUMN audience TEXT NOT NULL DEFAULT '[]'")


# Each may run again over its own half-done work: a process can end in the middle of one.
MIGRATIONS: tuple[Callable[[sqlite_utils.Database], None], ...] = (
    _m001_initial,
    _m002_search,
    _m003_alerts,
    _m004_safety,
    _m005_asks,
    _m006_totals,
    _m007_audience,
)
