"""The database's shape, one step at a time; a step that has shipped never changes."""

import sqlite3
from collections.abc import Callable

Step = Callable[[sqlite3.Connection], None]


def _first(db: sqlite3.Connection) -> None:
    for statement in (
        """CREATE TABLE backends (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, label TEXT NOT NULL, api_base_url TEXT NOT NULL,
            api_key BLOB, api TEXT NOT NULL, timeout_seconds REAL NOT NULL, rpm_limit INTEGER NOT NULL,
            tpm_limit INTEGER, pool TEXT NOT NULL, priority INTEGER NOT NULL, enabled INTEGER NOT NULL,
            include_usage INTEGER NOT NULL, model_mappings TEXT NOT NULL, source TEXT NOT NULL,
            metadata TEXT NOT NULL, created_at REAL NOT NULL, updated_at REAL NOT NULL)""",
        """CREATE TABLE backend_usage_logs (
            hour_bucket INTEGER NOT NULL, backend_id TEXT NOT NULL, model TEXT NOT NULL, client_id TEXT NOT NULL,
            pool TEXT NOT NULL, request_count INTEGER NOT NULL, error_count INTEGER NOT NULL,
            prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
            estimated_count INTEGER NOT NULL, cost REAL NOT NULL, latency_ms_sum REAL NOT NULL,
            ttft_ms_sum REAL NOT NULL, ttft_count INTEGER NOT NULL,
            PRIMARY KEY (hour_bucket, backend_id, model, client_id, pool)) WITHOUT ROWID""",
        """CREATE TABLE daily_stats (
            date TEXT NOT NULL, pool TEXT NOT NULL, request_count INTEGER NOT NULL, error_count INTEGER NOT NULL,
            prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost REAL NOT NULL,
            PRIMARY KEY (date, pool)) WITHOUT ROWID""",
        """CREATE TABLE cooldown_events (
            id INTEGER PRIMARY KEY, backend_id TEXT NOT NULL, kind TEXT NOT NULL, level INTEGER NOT NULL,
            at REAL NOT NULL, until REAL NOT NULL, detail TEXT NOT NULL)""",
        "CREATE INDEX cooldown_events_backend ON cooldown_events (backend_id, id)",
        """CREATE TABLE backend_health (
            backend_id TEXT PRIMARY KEY, status TEXT NOT NULL, cooldown_level INTEGER NOT NULL,
            cooldown_until REAL NOT NULL, cooldown_reason TEXT NOT NULL, recovered_at REAL,
            quarantine TEXT NOT NULL, key_digest TEXT NOT NULL, ejections INTEGER NOT NULL,
            ejected_until REAL NOT NULL, starts TEXT NOT NULL, updated_at REAL NOT NULL)""",
        "CREATE TABLE system_config (key TEXT PRIMARY KEY, value TEXT NOT NULL, updated_at REAL NOT NULL)",
        """CREATE TABLE clients (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, key_hash TEXT NOT NULL, budget REAL,
            models TEXT NOT NULL, created_at REAL NOT NULL)""",
        """CREATE TABLE client_spend (
            client_id TEXT NOT NULL, month TEXT NOT NULL, dollars REAL NOT NULL,
            PRIMARY KEY (client_id, month)) WITHOUT ROWID""",
    ):
        db.execute(statement)


STEPS: tuple[Step, ...] = (_first,)


def migrate(db: sqlite3.Connection) -> int:
    """Bring a database up to date; each step is applied once, in its own transaction.

    Returns the version reached. Raises RuntimeError for a database of a newer program.
    """
    db.execute("CREATE TABLE IF NOT EXISTS schema_migrations (version INTEGER PRIMARY KEY, applied_at REAL)")
    done = db.execute("SELECT coalesce(max(version), 0) FROM schema_migrations").fetchone()[0]
    if done > len(STEPS):
        raise RuntimeError(
            f"the database has schema {done}, this program knows {len(STEPS)}: run the newer sidecar, "
            "or restore a backup made before the upgrade"
        )
    for version, step in enumerate(STEPS[done:], start=done + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            step(db)
            db.execute(
                "INSERT INTO schema_migrations VALUES (?, (julianday('now') - 2440587.5) * 86400.0)",
                (version,),
            )
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")
    return len(STEPS)
