"""What the admin API reads and writes in the database."""

import json
import sqlite3
from datetime import UTC, datetime, timedelta
from typing import Any

from sidecar.access import Client


def read_config(db: sqlite3.Connection) -> dict[str, Any]:
    """All stored settings."""
    return {
        row["key"]: json.loads(row["value"]) for row in db.execute("SELECT key, value FROM system_config")
    }


def write_config(db: sqlite3.Connection, key: str, value: Any) -> None:
    """Store one setting."""
    db.execute(
        "INSERT OR REPLACE INTO system_config VALUES (?, ?, (julianday('now') - 2440587.5) * 86400.0)",
        (key, json.dumps(value)),
    )


def delete_config(db: sqlite3.Connection, key: str | None = None) -> None:
    """Back to the default: one setting, or all."""
    if key is None:
        db.execute("DELETE FROM system_config")
    else:
        db.execute("DELETE FROM system_config WHERE key = ?", (key,))


def write_client(db: sqlite3.Connection, client: Client) -> None:
    """Store one client key (its hash)."""
    db.execute(
        "INSERT INTO clients VALUES (?, ?, ?, ?, ?, (julianday('now') - 2440587.5) * 86400.0)",
        (client.id, client.name, client.key_hash, client.budget, "\n".join(client.models)),
    )


def delete_client(db: sqlite3.Connection, client_id: str) -> None:
    """Remove one client key; what it spent stays in the books."""
    db.execute("DELETE FROM clients WHERE id = ?", (client_id,))


def total(db: sqlite3.Connection) -> dict[str, Any]:
    """Everything ever."""
    row = db.execute(
        """SELECT coalesce(sum(request_count), 0) AS total_requests, coalesce(sum(error_count), 0) AS total_errors,
        coalesce(sum(prompt_tokens + completion_tokens), 0) AS total_tokens,
        coalesce(sum(prompt_tokens), 0) AS total_prompt_tokens,
        coalesce(sum(completion_tokens), 0) AS total_completion_tokens, coalesce(sum(cost), 0.0) AS total_cost
        FROM daily_stats"""
    ).fetchone()
    return dict(row)


def hourly(db: sqlite3.Connection, now: float, hours: int, backend_id: str | None) -> list[dict[str, Any]]:
    """Rows of the last hours, newest first."""
    rows = db.execute(
        """SELECT hour_bucket, backend_id, model, client_id, request_count, error_count, prompt_tokens,
        completion_tokens, cached_tokens, prompt_tokens + completion_tokens AS total_tokens, cost, estimated_count,
        round(latency_ms_sum / max(1, request_count), 3) AS avg_latency_ms,
        CASE WHEN ttft_count THEN round(ttft_ms_sum / ttft_count, 3) END AS ttft_ms
        FROM backend_usage_logs WHERE hour_bucket > ? AND (? IS NULL OR backend_id = ?)
        ORDER BY hour_bucket DESC, backend_id, model, client_id LIMIT 10000""",
        (int(now) - hours * 3600, backend_id, backend_id),
    )
    return [dict(row) for row in rows]


def daily(db: sqlite3.Connection, now: float, days: int) -> list[dict[str, Any]]:
    """Rows of the last days by pool, newest first."""
    edge = (datetime.fromtimestamp(now, UTC) - timedelta(days=days)).date().isoformat()
    rows = db.execute(
        """SELECT date, pool, request_count AS total_requests, error_count AS total_errors,
        prompt_tokens + completion_tokens AS total_tokens, prompt_tokens AS total_prompt_tokens,
        completion_tokens AS total_completion_tokens, cost AS total_cost
        FROM daily_stats WHERE date > ? ORDER BY date DESC, pool""",
        (edge,),
    )
    return [dict(row) for row in rows]


def cooldowns(db: sqlite3.Connection, backend_id: str | None, limit: int) -> list[dict[str, Any]]:
    """The newest cooldown events."""
    rows = db.execute(
        """SELECT id, backend_id, kind, level, at, until, detail FROM cooldown_events
        WHERE ? IS NULL OR backend_id = ? ORDER BY id DESC LIMIT ?""",
        (backend_id, backend_id, limit),
    )
    return [dict(row) for row in rows]


def series(db: sqlite3.Connection, now: float, hours: int = 24) -> list[dict[str, Any]]:
    """Cost and tokens by hour, oldest first, for the dashboard's chart."""
    rows = db.execute(
        """SELECT hour_bucket, sum(prompt_tokens + completion_tokens) AS tokens, sum(cost) AS cost,
        sum(request_count) AS requests FROM backend_usage_logs WHERE hour_bucket > ?
        GROUP BY hour_bucket ORDER BY hour_bucket""",
        (int(now) - hours * 3600,),
    )
    return [dict(row) for row in rows]
