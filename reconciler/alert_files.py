"""One JSON file per alert, for programs that watch a directory: always whole, and in the end always current."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from reconciler.store import Store, now_text
from reconciler.wording import level_of

# Files of resolved alerts are kept so long.
KEEP_FILES = timedelta(days=30)

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_WRITTEN = ("severity", "status", "resolved", "resolution", "detail", "advice", "changes", "audience")
# Columns that hold JSON.
LISTS = ("changes", "audience")

Row = dict[str, Any]


class AlertFiles:
    """The files of one store's alerts; ``file`` and ``file_error`` in their rows say how they stand."""

    def __init__(self, store: Store, directory: Path) -> None:
        self.store, self.directory = store, directory

    def settle(self, now: datetime) -> None:
        """Write what is new, what changed, and what somebody removed while it is open; drop what is old.

        A directory that is full, read-only or gone fails nothing: the rows say so, and it is tried again.
        """
        limit = now_text(now - KEEP_FILES)
        old = "status = 'resolved' AND file != 'pruned' AND resolved < ?"
        if not alert_rows(self.store, f"file = 'stale' OR status = 'open' OR ({old}) LIMIT 1", [limit]):
            return
        try:
            with _alone(self.directory):
                for row in alert_rows(self.store, old, [limit]):
                    self._prune(row)
                for row in self._due():
                    self._write(row)
        except BlockingIOError:
            return  # another process is at it
        except OSError as error:
            for row in alert_rows(self.store, "file = 'stale' OR status = 'open'"):
                self._note(row, "stale", _why(error))

    def _due(self) -> list[Row]:
        with os.scandir(self.directory) as entries:
            present = {entry.name for entry in entries}
        rows = alert_rows(self.store, "file = 'stale' OR status = 'open' ORDER BY id")
        return [row for row in rows if row["file"] == "stale" or file_name(row) not in present]

    def _prune(self, row: Row) -> None:
        try:
            for path in (self.directory / file_name(row), _beside(self.directory, file_name(row))):
                path.unlink(missing_ok=True)
        except OSError as error:
            self._note(row, row["file"], _why(error))
        else:
            self._note(row, "pruned")

    def _write(self, row: Row) -> None:
        try:
            write_file(self.directory, file_name(row), document(row))
        except OSError as error:
            self._note(row, "stale", _why(error))
        else:
            self._note(row, "written")

    def _note(self, row: Row, state: str, error: str = "") -> None:
        """Only of what was read: where a pass has changed the row since then, its file is stale still."""
        if (row["file"], row["file_error"]) == (state, error):
            return
        same = " AND ".join(f"{name} IS :{name}" for name in _WRITTEN)
        with self.store.db.atomic():
            self.store.db.execute(
                f"UPDATE alerts SET file = :state, file_error = :error WHERE id = :id AND {same}",  # noqa: S608 - names from above
                {**row, **{name: dumped(row[name]) for name in LISTS}, "state": state, "error": error},
            )


def alert_rows(store: Store, where: str, values: Sequence[Any] = ()) -> list[Row]:
    """Rows of alerts by a clause of SQL."""
    rows = store.db.query(f"SELECT * FROM alerts WHERE {where}", list(values))  # noqa: S608 - no caller takes it from outside
    return [{**row, **{name: json.loads(row[name]) for name in LISTS}} for row in rows]


def dumped(value: Any) -> str:
    """As JSON in a column."""
    return json.dumps(value, ensure_ascii=False, default=str)


def document(row: Mapping[str, Any]) -> Row:
    """An alert as its file has it: the form that ``alert.schema.json`` describes."""
    names = (
        "id", "key", "node", "kind", "name", "reason", "severity", "status", "opened", "resolved",
        "resolution", "detail", "advice", "changes", "occurrences", "run", "revision", "cause",
    )  # fmt: skip
    return {**{name: row[name] for name in names}, "level": level_of(row["severity"]), "to": row["audience"]}


def file_name(row: Mapping[str, Any]) -> str:
    """A name that sorts by time, is distinct, and is safe whatever the key holds."""
    opened = datetime.fromisoformat(row["opened"])
    return f"{opened:%Y%m%dT%H%M%SZ}-{row['id']:06d}-{_UNSAFE.sub('_', row['key'])[:100]}.json"


def write_file(directory: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write beside, make it durable, rename: a reader sees the old file or the new one. Raises OSError."""
    beside = _beside(directory, name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(beside, flags, 0o600), "w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(directory / name)
    with _opened(directory) as handle:
        os.fsync(handle)


def _beside(directory: Path, name: str) -> Path:
    """The same name each time: what a killed process left is overwritten, not collected."""
    return directory / f".{name}.tmp"


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Make the directory where it is missing, and keep others from writing there. Raises BlockingIOError, OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _opened(directory) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def _why(error: OSError) -> str:
    return f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)
