"""Backups of our own database: whole while passes go on, and believed only after they were opened and checked."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from reconciler.model import ConfigurationError, Problem

PREFIX = "reconciler-"


def backup(db: Path, directory: Path, keep_days: int) -> dict[str, Any]:
    """Copy ``db`` through SQLite's backup API into ``directory``, then remove what is too old.

    Raises ConfigurationError; then no older backup was removed and nothing half written is left.
    """
    now = datetime.now(UTC)
    final = directory / f"{PREFIX}{now:%Y%m%dT%H%M%SZ}.db"
    beside = final.with_name(f".{final.name}.new")
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT, 0o600))
        with closing(sqlite3.connect(db)) as source, closing(sqlite3.connect(beside)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        events = _checked(beside)
        _sync(beside)
        beside.rename(final)
    except (OSError, sqlite3.Error) as error:
        hint = "is there room, and may this account write there? no older backup was removed"
        raise ConfigurationError(
            [Problem(f"no backup was made in {directory}: {error}", hint=hint)]
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    removed = _prune(directory, now - timedelta(days=keep_days), final)
    return {
        "file": str(final),
        "bytes": final.stat().st_size,
        "events": events,
        "removed": removed,
        "said": f"{final}: {final.stat().st_size:,} bytes, {events} events; {len(removed)} older ones removed",
    }


def _checked(path: Path) -> int:
    """How many events are in it. Raises sqlite3.Error where it is not whole."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as copy:
        said = copy.execute("PRAGMA integrity_check").fetchone()[0]
        if said != "ok":
            raise sqlite3.DatabaseError(f"the copy is damaged: {said}")
        return int(copy.execute("SELECT count(*) FROM guardian_events").fetchone()[0])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(directory: Path, before: datetime, newest: Path) -> list[str]:
    """Backups made before that time, by their names: copying a file must not make it young."""
    removed = []
    for path in sorted(directory.glob(f"{PREFIX}*.db")):
        with suppress(ValueError, OSError):
            made = datetime.strptime(path.name, f"{PREFIX}%Y%m%dT%H%M%SZ.db").replace(tzinfo=UTC)
            if made < before and path != newest:
                path.unlink()
                removed.append(path.name)
    return removed
