"""The schema role's steps on real databases."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.unit.support import Fleet, converge, look, step

TABLES = """
schema:
  - name: d
    nodes: node-1
    database: ~/d.db
    tables:
      tasks:
        columns: {id: INTEGER PRIMARY KEY, project: "TEXT NOT NULL DEFAULT 'it''s'", started_at: TEXT}
        indexes: {by_project: {columns: [project], unique: false}}
"""


@pytest.fixture
def resource(fleet: Fleet) -> dict[str, Any]:
    """The declared schema as the role gets it."""
    fleet.write(TABLES)
    found = fleet.resource("node-1/schema/d")
    return {**found.args, **found.fields}


@pytest.fixture
def path(account: Path) -> Path:
    """Where the database stands."""
    return account / "d.db"


def execute(path: Path, *statements: str) -> list[tuple[Any, ...]]:
    """Run statements and return the rows of the last."""
    with closing(sqlite3.connect(path)) as database, database:
        for statement in statements:
            rows = database.execute(statement).fetchall()
    return rows


def seen(path: Path) -> Any:
    """What the probe says."""
    return look("schema", {"database": str(path), "tables": {"tasks": None}})


def names(path: Path) -> list[str]:
    """What stands in the database's directory, less the node's own state."""
    return sorted(entry.name for entry in path.parent.iterdir() if entry.name != ".local")


def test_database_that_is_missing_is_created(resource: dict[str, Any], path: Path) -> None:
    """With table, defaults and index; a second pass finds nothing to do."""
    assert converge("schema", resource)["result"]["changed"]
    assert execute(path, "INSERT INTO tasks (id) VALUES (1)", "SELECT * FROM tasks") == [(1, "it's", None)]
    assert "by_project" in seen(path)["facts"]["tables"]["tasks"]["indexes"]
    assert step("apply", "schema", resource, attempt="a2")["result"]["changed"] is False


def test_missing_column_and_index_are_added_and_rows_stay(resource: dict[str, Any], path: Path) -> None:
    """A database of last month's dispatcher."""
    execute(
        path, "CREATE TABLE tasks (id INTEGER PRIMARY KEY, old TEXT)", "INSERT INTO tasks VALUES (7, 'kept')"
    )
    answer = converge("schema", resource)["result"]
    assert "ALTER TABLE" in answer["detail"]
    assert execute(path, "SELECT * FROM tasks") == [(7, "kept", "it's", None)]


def test_backup_is_whole_and_can_be_opened(resource: dict[str, Any], path: Path) -> None:
    """Rows that are still in the write-ahead log are in the backup, which is one file."""
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("PRAGMA wal_autocheckpoint=0")
        writer.execute("CREATE TABLE tasks (id INTEGER PRIMARY KEY)")
        writer.executemany("INSERT INTO tasks VALUES (?)", [(n,) for n in range(500)])
        writer.commit()
        saved = step("backup", "schema", resource)["result"]["saved"]
        assert step("apply", "schema", resource)["result"]["changed"]
    assert saved == [f"{path}.a1.bak"]
    assert execute(Path(saved[0]), "SELECT count(*) FROM tasks") == [(500,)]
    assert execute(Path(saved[0]), "PRAGMA integrity_check") == [("ok",)]
    assert [name for name in names(path) if name.startswith("d.db.a1")] == ["d.db.a1.bak"]
    assert Path(saved[0]).stat().st_mode & 0o777 == path.stat().st_mode & 0o777


def test_mismatches_are_reported_and_never_touched(resource: dict[str, Any], path: Path) -> None:
    """What can be added is added all the same, and the step says that the rest is for a person."""
    execute(
        path,
        "CREATE TABLE tasks (id INTEGER PRIMARY KEY, project INTEGER)",
        "INSERT INTO tasks VALUES (1, 5)",
    )
    answer = converge("schema", resource)
    assert answer["failed"].startswith("only a person can put this right: tasks.project is INTEGER")
    assert execute(path, "SELECT * FROM tasks") == [(1, 5, None)]
    assert seen(path)["facts"]["tables"]["tasks"]["columns"]["project"]["type"] == "INTEGER"


def test_all_additions_are_one_transaction(fleet: Fleet, path: Path) -> None:
    """An index that cannot be made leaves no column behind."""
    execute(path, "CREATE TABLE t (a TEXT)", "INSERT INTO t VALUES ('x'), ('x')")
    fleet.write(
        "schema:\n  - {name: d, nodes: node-1, database: ~/d.db, tables: {t: {columns: {a: TEXT, b: TEXT},"
        " indexes: {i: {columns: [a], unique: true}}}}}\n"
    )
    found = fleet.resource("node-1/schema/d")
    answer = converge("schema", {**found.args, **found.fields})
    assert "UNIQUE constraint failed" in answer["failed"]
    assert [row[1] for row in execute(path, "PRAGMA table_info(t)")] == ["a"]


def test_observing_leaves_nothing_behind(path: Path) -> None:
    """No -wal and -shm files appear, and the file keeps its time."""
    execute(path, "PRAGMA journal_mode=WAL", "CREATE TABLE tasks (id INTEGER)")
    assert names(path) == ["d.db"]
    before = path.stat()
    assert seen(path)["facts"]["tables"]["tasks"]["columns"].keys() == {"id"}
    assert (names(path), path.stat().st_mtime_ns) == (["d.db"], before.st_mtime_ns)


def test_observing_sees_what_is_only_in_the_log(path: Path) -> None:
    """A dispatcher that has the database open."""
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("PRAGMA wal_autocheckpoint=0")
        writer.execute("CREATE TABLE tasks (id INTEGER)")
        writer.commit()
        assert seen(path)["facts"]["tables"]["tasks"]["columns"].keys() == {"id"}


def test_observing_does_not_create_a_database(path: Path) -> None:
    """Absent is a fact, and so is whether its directory exists."""
    assert seen(path)["facts"] == {"database": "absent", "directory": True, "tables": {}}
    assert look("schema", {"database": "~/no/d.db", "tables": {}})["facts"]["directory"] is False
    assert names(path) == []


def test_file_that_is_no_database_is_unknown_and_stays(resource: dict[str, Any], path: Path) -> None:
    """Never overwritten."""
    path.write_text("these are notes, not a database, and longer than a header has to be\n" * 20)
    before = path.read_bytes()
    assert "not a database" in seen(path)["error"]
    assert "not a database" in converge("schema", resource)["failed"]
    assert path.read_bytes() == before


def test_busy_database_is_waited_for_and_then_given_up(
    resource: dict[str, Any], path: Path, tmp_path: Path
) -> None:
    """A writer that does not let go: nothing is changed, and the reason is SQLite's."""
    execute(path, "CREATE TABLE tasks (id INTEGER PRIMARY KEY)")
    steps = Path(__file__).parent.parent.parent / "roles/schema/files/steps.py"
    quick = tmp_path / "roles" / "schema" / "files"
    quick.mkdir(parents=True)
    (quick / "steps.py").write_text(steps.read_text().replace("BUSY_SECONDS = 15", "BUSY_SECONDS = 0.2"))
    step("backup", "schema", resource)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        answer = step("apply", "schema", resource, roles=tmp_path / "roles")
        writer.execute("ROLLBACK")
    assert "database is locked" in answer["failed"]
    assert step("apply", "schema", resource)["result"]["changed"]


@pytest.mark.parametrize("name", ["a b.db", "100%.db", "what?.db", "a#b.db", "d\u00e9j\u00e0.db"])
def test_strange_names_of_databases(account: Path, name: str) -> None:
    """Characters that mean something in a URI."""
    execute(account / name, "CREATE TABLE tasks (id INTEGER)")
    assert seen(account / name)["facts"]["tables"]["tasks"]["columns"].keys() == {"id"}
    assert names(account / name) == [name]


def test_quotes_in_names_are_names(account: Path) -> None:
    """A table that was there before us, whatever it is called."""
    execute(account / "d.db", 'CREATE TABLE "a""b" ("c d" TEXT)')
    answer = look("schema", {"database": "~/d.db", "tables": {'a"b': None}})
    assert answer["facts"]["tables"]['a"b']["columns"].keys() == {"c d"}
