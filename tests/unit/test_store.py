"""The durable record on real files: migrations, filters, search, exclusivity, attempts."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlite_utils

from reconciler.model import ConfigurationError, Event, Status
from reconciler.store import MIGRATIONS, Store
from tests.unit.support import reconcile, rid

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def event(key: str, status: Status, minutes: int = 0, **details: Any) -> Event:
    """An event some minutes after the start."""
    kind = key.split("/")[1]
    check_type = {"wrapper": "C2", "tool": "C4"}[kind]
    return Event(rid(key), check_type, status, 2, details, timestamp=START + timedelta(minutes=minutes))


@pytest.fixture
def filled(store: Store) -> Store:
    """A few events on two nodes."""
    store.record(
        [
            event("node-1/wrapper/w", Status.DETECTED, 0, reason="the content differs"),
            event("node-1/wrapper/w", Status.FIXING, 1),
            event("node-1/wrapper/w", Status.FIXED, 2),
            event("node-2/tool/claude-code", Status.DETECTED, 3, reason="caf\u00e9 absent"),
            event("node-2/tool/claude-code", Status.FAILED, 4, reason="npm ended with 1"),
        ]
    )
    return store


def keys(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Node and status, in the given order."""
    return [(row["node"], row["status"]) for row in rows]


def test_table_has_the_promised_columns(store: Store) -> None:
    """Other programs read it with plain SQL."""
    rows = store.db.execute("PRAGMA table_info(guardian_events)").fetchall()
    assert [(row[1], row[2]) for row in rows] == [
        ("id", "INTEGER"),
        ("timestamp", "TEXT"),
        ("check_type", "TEXT"),
        ("issue_key", "TEXT"),
        ("severity", "INTEGER"),
        ("status", "TEXT"),
        ("fix_attempts", "INTEGER"),
        ("details", "TEXT"),
        ("node", "TEXT"),
    ]
    sql = store.db.execute("SELECT sql FROM sqlite_master WHERE name = 'guardian_events'").fetchone()[0]
    assert "PRIMARY KEY AUTOINCREMENT" in sql


def test_rows_hold_utc_and_json(store: Store) -> None:
    """Whatever zone the event came with."""
    there = START.astimezone(timezone(timedelta(hours=8)))
    details = {"reason": "caf\u00e9 {{ x }}", "changes": []}
    store.record([Event(rid("n/tool/t"), "C4", Status.DETECTED, 3, details, 1, there)])
    row = store.db.execute(
        "SELECT timestamp, details, severity, fix_attempts FROM guardian_events"
    ).fetchone()
    assert row[0] == "2026-01-02T03:04:05.000+00:00"
    assert json.loads(row[1])["reason"] == "caf\u00e9 {{ x }}"
    assert row[2:] == (3, 1)


@pytest.mark.parametrize(("severity", "status"), [(0, "fixed"), (6, "fixed"), (3, "repaired")])
def test_database_itself_refuses_what_is_no_event(store: Store, severity: int, status: str) -> None:
    """Severity 1 to 5, and the five statuses."""
    with pytest.raises(sqlite3.IntegrityError):
        store.db.execute(
            "INSERT INTO guardian_events (timestamp, check_type, issue_key, severity, status, details, node)"
            " VALUES ('t', 'C1', 'k', ?, ?, '{}', 'n')",
            [severity, status],
        )


def test_newest_events_come_first_and_are_counted_off(filled: Store) -> None:
    """The limit keeps the newest."""
    assert keys(filled.events(limit=2)) == [("node-2", "failed"), ("node-2", "detected")]


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ({"node": "node-1"}, 3),
        ({"kind": "tool"}, 2),
        ({"kind": "too"}, 0),
        ({"issue_key": "node-1/wrapper/w"}, 3),
        ({"status": "detected"}, 2),
        ({"since": "2026-01-02T03:06:05+00:00"}, 3),
        ({"node": "node-1", "status": "fixed"}, 1),
        ({"search": "npm"}, 1),
        ({"search": "content differs"}, 1),
        ({"search": "cafe"}, 1),
        ({"search": "claude-code"}, 2),
        ({"search": "node-1/wrapper/w"}, 3),
        ({"search": "cont*"}, 1),
        ({"search": '"differs content"'}, 0),
        ({"search": "nothing"}, 0),
    ],
)
def test_filters(filled: Store, filters: dict[str, str], count: int) -> None:
    """Each, and together."""
    assert len(filled.events(**filters)) == count  # type: ignore[arg-type]


def test_since_is_exact_to_the_second(filled: Store) -> None:
    """An event of that very second is included."""
    assert len(filled.events(since="2026-01-02T03:08:05+00:00")) == 1


def test_conditions_are_replaced_and_forgotten(store: Store) -> None:
    """One row per resource."""
    row = {
        "issue_key": "n/tool/t", "node": "n", "kind": "tool", "name": "t", "status": "True", "reason": "AsDesired",
        "message": "", "since": "s", "seen": "s", "digest": "d", "details": {"changes": []},
    }  # fmt: skip
    store.set_conditions([row])
    store.set_conditions([{**row, "status": "False"}, {**row, "issue_key": "n/tool/u"}])
    found = store.condition("n/tool/t")
    assert found is not None
    assert found["status"] == "False"
    store.set_conditions([], forget=["n/tool/t"])
    assert list(store.conditions()) == ["n/tool/u"]
    assert store.condition("n/tool/t") is None


def test_last_thousand_passes_are_kept(store: Store) -> None:
    """The newest is the last pass."""
    for number in range(1005):
        row = {
            "run_id": f"r{number}",
            "started": f"2026-01-01T00:00:{number:06}",
            "seconds": 1.0,
            "revision": "",
        }
        store.set_pass({**row, "exit_code": 0, "scope": "", "counts": {"True": number}})
    last = store.last_pass()
    assert last is not None
    assert (last["run_id"], last["counts"]) == ("r1004", {"True": 1004})
    assert store.db.execute("SELECT count(*) FROM passes").fetchone()[0] == 1000


# --- files ------------------------------------------------------------------------------------------


def test_store_is_created_with_its_directory_and_reopened(tmp_path: Path) -> None:
    """In WAL mode, private."""
    path = tmp_path / "a" / "b" / "r.db"
    store = Store(path)
    store.record([event("node-1/wrapper/w", Status.DETECTED)])
    assert store.db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    store.close()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    again = Store(path)
    assert len(again.events()) == 1
    assert again.db.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
    again.close()


@pytest.mark.parametrize("version", range(len(MIGRATIONS)))
def test_migration_that_was_interrupted_is_finished(tmp_path: Path, version: int) -> None:
    """The work of one was done, but not yet its number written."""
    path = tmp_path / "r.db"
    store = Store(path)
    store.record([event("node-1/wrapper/w", Status.DETECTED, reason="precious")])
    store.db.execute(f"PRAGMA user_version = {version}")
    store.close()
    again = Store(path)
    assert len(again.events(search="precious")) == 1
    again.record([event("node-1/wrapper/w", Status.FIXED, reason="new words")])
    assert len(again.events(search="words")) == 1
    again.close()


def test_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    """Never guess at what a newer one wrote."""
    path = tmp_path / "r.db"
    Store(path).close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigurationError, match="newer version"):
        Store(path)


def test_two_that_create_a_database_at_once_do_it_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each migration is taken once, however long it takes; SQLite alone would refuse the second one at once."""
    taken = []

    def long(db: sqlite_utils.Database) -> None:
        taken.append(db)
        time.sleep(0.3)

    monkeypatch.setattr("reconciler.store.MIGRATIONS", (long, *MIGRATIONS))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: Store(tmp_path / "r.db").close(), range(3)))
    assert len(taken) == 1


def test_a_stopped_process_delays_others_and_does_not_shut_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was stopped while it opened the database may never be woken."""
    monkeypatch.setattr("reconciler.store.BUSY_SECONDS", 0.1)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    Store(tmp_path / "r.db").close()
    os.close(handle)


def test_file_that_is_no_database_is_a_configuration_error(tmp_path: Path) -> None:
    """With the way out."""
    path = tmp_path / "r.db"
    path.write_text("no database, but a text that is longer than a header would be " * 20)
    with pytest.raises(ConfigurationError) as caught:
        Store(path)
    assert caught.value.problems[0].hint == "name another file with --db, or move this one away"
    with pytest.raises(ConfigurationError):
        Store(tmp_path)


def test_database_that_another_program_holds_is_readable(tmp_path: Path) -> None:
    """Readers never wait for the writer."""
    path = tmp_path / "r.db"
    store = Store(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert store.events() == []
    store.close()


# --- the command that reads it ----------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> str:
    """A file with the events above."""
    path = tmp_path / "r.db"
    store = Store(path)
    store.record(
        [
            event("node-1/wrapper/w", Status.DETECTED, 0, reason="the content differs"),
            event("node-2/tool/t", Status.FAILED, 1, reason="npm ended with 1"),
        ]
    )
    store.close()
    return str(path)


def test_events_are_printed_oldest_first(database: str) -> None:
    """As a table, and as JSON."""
    said = reconcile("events", "--db", database)
    assert said.code == 0
    assert said.out.index("node-1/wrapper/w") < said.out.index("node-2/tool/t")
    rows = reconcile("events", "--db", database, "-o", "json").json()
    assert [row["issue_key"] for row in rows] == ["node-1/wrapper/w", "node-2/tool/t"]
    assert rows[0]["details"] == {"reason": "the content differs"}


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["npm"], 1),
        (["--kind", "tool"], 1),
        (["--node", "node-1"], 1),
        (["--status", "failed"], 1),
        (["--count", "1"], 1),
        (["--since", "2026-01-02T03:04:30+00:00"], 1),
        (["--since", "1h"], 0),
    ],
)
def test_events_are_filtered(database: str, words: list[str], count: int) -> None:
    """Every option."""
    assert len(reconcile("events", *words, "--db", database, "-o", "json").json()) == count


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--since", "yesterday"], "neither a duration"),
        (["--status", "repaired"], "--status is one of detected"),
        (['"open'], "is not understood"),
    ],
)
def test_filters_that_make_no_sense_are_usage_errors(database: str, words: list[str], reason: str) -> None:
    """Exit code 1, and why."""
    said = reconcile("events", *words, "--db", database)
    assert said.code == 1
    assert reason in said.err


def test_command_that_reads_creates_no_store(tmp_path: Path) -> None:
    """A mistyped --db is not an empty history."""
    for command in ("events", "status"):
        said = reconcile(command, "--db", str(tmp_path / "none.db"))
        assert said.code == 1
        assert "no database at" in said.err
    assert not (tmp_path / "none.db").exists()
