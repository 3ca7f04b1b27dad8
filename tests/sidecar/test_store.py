"""Books, backups, migrations, and what a kill leaves behind."""

import asyncio
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from sidecar.fake import Script, Seen, chat_stream, default_script
from sidecar.migrations import STEPS, migrate
from sidecar.model import Usage
from sidecar.records import Key, Ledger
from sidecar.runtime import Runtime
from sidecar.settings import Settings
from sidecar.store import Store, StoreError, write_books
from tests.sidecar.harness import CHAT, Providers, SidecarProcess, backend, wait_for


def ask(process: SidecarProcess, times: int = 1) -> None:
    with httpx.Client(timeout=60) as client:
        for _ in range(times):
            assert client.post(process.url + "/v1/chat/completions", json=CHAT).status_code == 200


def booked(folder: Path) -> tuple[int, float]:
    with closing(sqlite3.connect(folder / "data" / "sidecar.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        return db.execute(
            "SELECT coalesce(sum(request_count),0), coalesce(sum(cost),0) FROM backend_usage_logs"
        ).fetchone()


def test_sigterm_settles_the_books(providers: Providers, sidecar: Callable[..., SidecarProcess]) -> None:
    process = sidecar([backend("a", providers.new().url)])
    ask(process, 25)
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    count, cost = booked(process.folder)
    assert count == 25
    assert cost == pytest.approx(25 * (10e-6 + 10e-6))


def test_sigkill_loses_at_most_a_second_and_never_integrity(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    process = sidecar([backend("a", providers.new().url)])
    ask(process, 30)
    wait_for(lambda: booked(process.folder)[0] == 30, "the batch of the first requests")
    ask(process, 5)
    process.signal(signal.SIGKILL)
    process.wait()
    assert 30 <= booked(process.folder)[0] <= 35
    process.start()
    ask(process)
    process.stop()
    assert booked(process.folder)[0] >= 31


def test_sigterm_lets_a_stream_finish_and_takes_nothing_new(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    def choose(seen: Seen) -> Script:
        return chat_stream(gap=0.4) if seen.method == "POST" else default_script(seen)

    provider = providers.new(choose)
    process = sidecar([backend("a", provider.url)])
    text = b""
    with httpx.stream(
        "POST", process.url + "/v1/chat/completions", json={**CHAT, "stream": True}, timeout=60
    ) as answer:
        for number, part in enumerate(answer.iter_bytes()):
            if number == 0:
                process.signal(signal.SIGTERM)
                wait_for(lambda: _refuses(process.url), "no new connections")
            text += part
    assert b"[DONE]" in text
    assert process.wait() == 0
    assert booked(process.folder)[0] == 1


def _refuses(url: str) -> bool:
    try:
        httpx.get(url + "/health")
    except httpx.TransportError:
        return True
    return False


def test_a_write_that_fails_is_kept_for_the_next() -> None:
    ledger = Ledger()
    key = Key(0, "a", "m", "c", "primary")
    ledger.add(key, Usage(1, 2), cost=0.5, latency_ms=3, ttft_ms=None, error=False)
    taken = ledger.take()
    ledger.add(key, Usage(1, 2), cost=0.5, latency_ms=3, ttft_ms=1, error=True)
    ledger.put_back(taken)
    row = ledger.take()[key]
    assert (row.requests, row.errors, row.prompt, row.cost, row.ttft_count) == (2, 1, 2, 1.0, 1)


def test_a_batch_is_written_although_its_flush_is_cancelled(tmp_path: Path) -> None:
    async def run() -> None:
        settings = Settings(db_path=tmp_path / "a.db", backup_dir=tmp_path / "b", admin_token="x")
        runtime = Runtime(settings)
        key = Key(3600, "a", "m", "c", "primary")
        runtime.ledger.add(key, Usage(1, 2), cost=0.5, latency_ms=3, ttft_ms=None, error=False)
        busy = asyncio.create_task(runtime.store.run(lambda _db: time.sleep(0.2)))
        await asyncio.sleep(0.05)
        flush = asyncio.create_task(runtime.flush())
        await asyncio.sleep(0.05)
        flush.cancel()
        await asyncio.gather(flush, busy, return_exceptions=True)
        await runtime.stop()
        with closing(sqlite3.connect(tmp_path / "a.db")) as db:
            assert db.execute("SELECT request_count FROM backend_usage_logs").fetchone()[0] == 1

    asyncio.run(run())


def test_books_add_up_over_batches(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.db")
    ledger = Ledger()
    for _ in range(3):
        ledger.add(
            Key(3600, "a", "m", "c", "primary"),
            Usage(10, 5, 4),
            cost=0.1,
            latency_ms=8,
            ttft_ms=2,
            error=False,
        )
        taken = ledger.take()
        store.run_now(lambda db, taken=taken: write_books(db, taken, [], {("c", "1970-01"): 0.1}, []))
    row = store.run_now(lambda db: dict(db.execute("SELECT * FROM backend_usage_logs").fetchone()))
    assert (row["request_count"], row["prompt_tokens"], row["cached_tokens"]) == (3, 30, 12)
    assert store.run_now(
        lambda db: db.execute("SELECT dollars FROM client_spend").fetchone()[0]
    ) == pytest.approx(0.3)
    assert store.run_now(lambda db: db.execute("SELECT request_count FROM daily_stats").fetchone()[0]) == 3
    store.close()


def test_a_backup_opens_and_is_checked_and_old_ones_go(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(tmp_path / "a.db")
        folder = tmp_path / "backups"
        first = await store.backup(folder, 7)
        old = time.time() - 8 * 86_400
        os.utime(first, (old, old))
        second = await store.backup(folder, 7)
        assert sorted(folder.iterdir()) == [second]
        assert second.stat().st_mode & 0o777 == 0o600
        with closing(sqlite3.connect(second)) as copy:
            assert copy.execute("SELECT count(*) FROM backends").fetchone()[0] == 0
        store.close()

    asyncio.run(run())


def test_migrations_are_applied_once_and_a_newer_database_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as db:
        assert migrate(db) == len(STEPS)
        assert migrate(db) == len(STEPS)
        db.execute("INSERT INTO schema_migrations VALUES (99, 0)")
    with pytest.raises(StoreError, match="newer sidecar"):
        Store(tmp_path / "a.db")


def test_a_damaged_database_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(b"this is no database, " * 500)
    with pytest.raises(StoreError, match="restore a backup"):
        Store(path)


def test_daily_backups_run_in_the_process(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    process = sidecar([backend("a", providers.new().url)], SIDECAR_BACKUP_INTERVAL_SECONDS="0.3")
    wait_for(lambda: list((process.folder / "backups").glob("sidecar-*.db")), "a backup")
