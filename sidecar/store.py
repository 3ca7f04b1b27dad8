"""The database file: one thread of its own, so that no request ever waits for the disk."""

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from sidecar.keys import Keyring, KeyringError, Place
from sidecar.migrations import migrate
from sidecar.model import Backend
from sidecar.records import Key, Sum

T = TypeVar("T")
_BUSY_MS = 5000
_COLUMNS = tuple(name for name in Backend.model_fields if name != "key_error")
# Debian 12's SQLite does not know unixepoch('subsec').
_NOW = "(julianday('now') - 2440587.5) * 86400.0"
_JSON = ("model_mappings", "metadata")


class StoreError(Exception):
    """The database cannot be used; the message says why and what to do."""


class Store:
    """All reading and writing, in the order it was asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._db = self._thread.submit(_open, path).result()

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` with the connection, inside one transaction, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    def run_now(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The same, waiting: for the start and for commands."""
        return self._thread.submit(self._transact, work).result()

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with transaction(self._db):
            return work(self._db)

    async def backup(self, folder: Path, keep_days: int) -> Path:
        """Copy through the backup API, open the copy and check it; drop the old ones."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, _backup, self._db, folder, keep_days
        )

    def sizes(self) -> tuple[int, int]:
        """Bytes of the database and of its write-ahead log."""
        return tuple(p.stat().st_size if p.exists() else 0 for p in (self.path, self._wal))  # type: ignore[return-value]

    @property
    def _wal(self) -> Path:
        return self.path.with_name(self.path.name + "-wal")

    def close(self) -> None:
        """Everything asked for is written before this returns."""
        self._thread.submit(self._db.close).result()
        self._thread.shutdown()


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False)
    try:
        path.chmod(0o600)
        db.row_factory = sqlite3.Row
        db.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        db.execute("PRAGMA journal_mode=WAL")
        # NORMAL survives a kill of the process whole; a power cut may lose the last commits.
        db.execute("PRAGMA synchronous=NORMAL")
        _check(db, path)
        migrate(db)
    except sqlite3.DatabaseError as error:
        db.close()
        raise StoreError(
            f"{path} cannot be used as a database: {error}; restore a backup or move it away"
        ) from error
    except (StoreError, RuntimeError) as error:
        db.close()
        raise StoreError(str(error)) from None
    return db


def _check(db: sqlite3.Connection, path: Path) -> None:
    found = db.execute("PRAGMA quick_check").fetchone()[0]
    if found != "ok":
        raise StoreError(f"{path} is damaged ({found}); restore the newest file of the backup folder")


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _backup(db: sqlite3.Connection, folder: Path, keep_days: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    target = folder / f"sidecar-{stamp}.db"
    beside = target.with_suffix(".part")
    with closing(sqlite3.connect(beside)) as copy:
        db.backup(copy)
    beside.chmod(0o600)
    with closing(sqlite3.connect(beside)) as copy:
        found = copy.execute("PRAGMA integrity_check").fetchone()[0]
        copy.execute("SELECT count(*) FROM backends").fetchone()
    if found != "ok":
        beside.unlink()
        raise StoreError(f"the backup {target} did not pass its check: {found}")
    beside.replace(target)
    edge = time.time() - keep_days * 86_400
    for old in folder.glob("sidecar-*.db"):
        if old != target and old.stat().st_mtime < edge:
            old.unlink()
    return target


# -- backends -----------------------------------------------------------------------------


def _place(backend_id: str) -> Place:
    return Place("backends", backend_id, "api_key")


def read_backends(db: sqlite3.Connection, ring: Keyring) -> list[Backend]:
    """All stored backends; one whose key cannot be opened carries the reason instead."""
    return [_backend(row, ring) for row in db.execute("SELECT * FROM backends ORDER BY id")]


def _backend(row: sqlite3.Row, ring: Keyring) -> Backend:
    fields: dict[str, Any] = {name: row[name] for name in _COLUMNS}
    for name in _JSON:
        fields[name] = json.loads(fields[name])
    try:
        fields["api_key"] = ring.open(row["api_key"], _place(row["id"])) if row["api_key"] else ""
    except KeyringError as error:
        fields["api_key"], fields["key_error"] = "", str(error)
    return Backend.model_validate(fields)


def write_backend(db: sqlite3.Connection, ring: Keyring, backend: Backend, *, keep_key: bool = False) -> None:
    """Insert or replace one backend. `keep_key` leaves a stored ciphertext as it is."""
    fields = backend.model_dump(mode="json", by_alias=True, include=set(_COLUMNS))
    for name in _JSON:
        fields[name] = json.dumps(fields[name])
    fields["api_key"] = ring.seal(backend.api_key, _place(backend.id)) if backend.api_key else None
    changing = [name for name in _COLUMNS if name != "id" and not (keep_key and name == "api_key")]
    db.execute(
        f"INSERT INTO backends ({', '.join(_COLUMNS)}, created_at, updated_at) "  # noqa: S608 - our own names
        f"VALUES ({', '.join(':' + name for name in _COLUMNS)}, {_NOW}, {_NOW}) "
        f"ON CONFLICT (id) DO UPDATE SET {', '.join(f'{n} = excluded.{n}' for n in changing)}, "
        "updated_at = excluded.updated_at",
        fields,
    )


def delete_backend(db: sqlite3.Connection, backend_id: str) -> None:
    """The backend with its cooldowns and health; what it cost stays in the books."""
    for table, column in (
        ("backends", "id"),
        ("cooldown_events", "backend_id"),
        ("backend_health", "backend_id"),
    ):
        db.execute(f"DELETE FROM {table} WHERE {column} = ?", (backend_id,))  # noqa: S608 - our own names


def encrypted_count(db: sqlite3.Connection) -> int:
    """How many rows hold a ciphertext."""
    return int(db.execute("SELECT count(*) FROM backends WHERE api_key IS NOT NULL").fetchone()[0])


def rotate_some(db: sqlite3.Connection, ring: Keyring, batch: int = 50) -> int:
    """Seal some rows with the primary key and verify each; returns how many were left to do.

    Interrupted at any row it goes on where it stopped: done rows carry the primary's id.
    """
    rows = db.execute("SELECT id, api_key FROM backends WHERE api_key IS NOT NULL").fetchall()
    todo = [row for row in rows if not ring.current(row["api_key"])]
    for row in todo[:batch]:
        place = _place(row["id"])
        text = ring.open(row["api_key"], place)
        sealed = ring.seal(text, place)
        if ring.open(sealed, place) != text:
            raise KeyringError(f"backends/{row['id']}: the new ciphertext does not open to the same key")
        db.execute(
            "UPDATE backends SET api_key = ? WHERE id = ? AND api_key = ?",
            (sealed, row["id"], row["api_key"]),
        )
    return max(0, len(todo) - batch)


def count_stale(db: sqlite3.Connection, ring: Keyring) -> int:
    """How many rows are not yet sealed with the primary key."""
    rows = db.execute("SELECT api_key FROM backends WHERE api_key IS NOT NULL")
    return sum(not ring.current(row["api_key"]) for row in rows)


def verify_all(db: sqlite3.Connection, ring: Keyring) -> None:
    """Open every row. Raises KeyringError for the first that stays shut."""
    for row in db.execute("SELECT id, api_key FROM backends WHERE api_key IS NOT NULL"):
        ring.open(row["api_key"], _place(row["id"]))


# -- books ---------------------------------------------------------------------------------


def write_books(
    db: sqlite3.Connection,
    sums: Mapping[Key, Sum],
    health: list[dict[str, Any]],
    spent: Mapping[tuple[str, str], float],
    events: list[tuple[str, str, int, float, float, str]],
) -> None:
    """One batch of records, in one transaction."""
    for key, row in sums.items():
        db.execute(
            """INSERT INTO backend_usage_logs VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)
            ON CONFLICT DO UPDATE SET request_count = request_count + excluded.request_count,
            error_count = error_count + excluded.error_count,
            prompt_tokens = prompt_tokens + excluded.prompt_tokens,
            completion_tokens = completion_tokens + excluded.completion_tokens,
            cached_tokens = cached_tokens + excluded.cached_tokens,
            estimated_count = estimated_count + excluded.estimated_count, cost = cost + excluded.cost,
            latency_ms_sum = latency_ms_sum + excluded.latency_ms_sum,
            ttft_ms_sum = ttft_ms_sum + excluded.ttft_ms_sum, ttft_count = ttft_count + excluded.ttft_count""",
            (*key, row.requests, row.errors, row.prompt, row.completion, row.cached, row.estimated, row.cost,
             row.latency_ms, row.ttft_ms, row.ttft_count),
        )  # fmt: skip
        date = datetime.fromtimestamp(key.hour, UTC).date().isoformat()
        db.execute(
            """INSERT INTO daily_stats VALUES (?,?,?,?,?,?,?)
            ON CONFLICT DO UPDATE SET request_count = request_count + excluded.request_count,
            error_count = error_count + excluded.error_count, prompt_tokens = prompt_tokens + excluded.prompt_tokens,
            completion_tokens = completion_tokens + excluded.completion_tokens, cost = cost + excluded.cost""",
            (date, key.pool, row.requests, row.errors, row.prompt, row.completion, row.cost),
        )
    for state in health:
        names = ", ".join(state)
        db.execute(
            f"INSERT OR REPLACE INTO backend_health ({names}, updated_at) "  # noqa: S608 - our own names
            f"VALUES ({', '.join(':' + name for name in state)}, (julianday('now') - 2440587.5) * 86400.0)",
            state,
        )
    for (client_id, month), dollars in spent.items():
        db.execute(
            "INSERT INTO client_spend VALUES (?,?,?) ON CONFLICT DO UPDATE SET dollars = dollars + excluded.dollars",
            (client_id, month, dollars),
        )
    db.executemany(
        "INSERT INTO cooldown_events (backend_id, kind, level, at, until, detail) VALUES (?,?,?,?,?,?)",
        events,
    )
