"""Backups of our own database."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from reconciler.model import Event, ResourceId, Status
from reconciler.store import Store
from tests.unit.support import reconcile


@pytest.fixture
def db(tmp_path: Path) -> Path:
    """With one event, and a writer that has it open."""
    path = tmp_path / "r.db"
    with closing(Store(path)) as store:
        store.record([Event(ResourceId("n", "k", "x"), "C1", Status.DETECTED, 2, {})])
    return path


def test_backup_is_whole_while_somebody_writes(db: Path, tmp_path: Path) -> None:
    """What was committed is in it, what was not is not, and nothing lies beside it."""
    with closing(sqlite3.connect(db)) as writer:
        writer.execute("INSERT INTO guardian_events SELECT 2, timestamp, check_type, issue_key, severity, status, "
                       "fix_attempts, details, node FROM guardian_events")  # fmt: skip
        said = reconcile("backup", str(tmp_path / "b"), "--db", str(db), "--output", "json")
        writer.rollback()
    assert (said.code, said.json()["events"]) == (0, 1), said.err
    (made,) = (tmp_path / "b").iterdir()
    assert made.stat().st_mode & 0o777 == 0o600
    with closing(Store(made)) as copy:
        assert [event["issue_key"] for event in copy.events()] == ["n/k/x"]


def test_old_backups_go_by_their_names_and_other_files_stay(db: Path, tmp_path: Path) -> None:
    """Only once the new one was made."""
    kept = tmp_path / "b"
    kept.mkdir()
    for name in ("reconciler-20200101T000000Z.db", "reconciler-notes.db", "other.db"):
        (kept / name).touch()
    broken = tmp_path / "broken.db"
    broken.write_bytes(db.read_bytes()[:-4096] + b"x" * 4096)
    said = reconcile("backup", str(kept), "--db", str(broken))
    assert said.code == 1
    assert len(list(kept.iterdir())) == 3
    said = reconcile("backup", str(kept), "--db", str(db))
    assert said.code == 0
    assert "1 older ones removed" in said.out
    assert not (kept / "reconciler-20200101T000000Z.db").exists()
    assert len(list(kept.iterdir())) == 3


def test_directory_that_cannot_be_written_is_a_clear_error(db: Path, tmp_path: Path) -> None:
    """With the way out."""
    (tmp_path / "file").touch()
    said = reconcile("backup", str(tmp_path / "file"), "--db", str(db))
    assert said.code == 1
    assert "no backup was made in" in said.err
    assert "is there room" in said.err
