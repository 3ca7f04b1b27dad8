"""Everything one process holds, and its life: start, background work, drain, stop."""

import asyncio
import os
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog

from sidecar import access, health, keys, store
from sidecar.access import Access, Client
from sidecar.backends_file import BackendsFile, from_v1
from sidecar.clock import Clock, SystemClock
from sidecar.fleet import Fleet
from sidecar.keys import Keyring, KeyringError
from sidecar.lane import Lane
from sidecar.logs import AccessLog
from sidecar.metrics import Metrics
from sidecar.model import Backend
from sidecar.proxy import Proxy
from sidecar.records import Ledger
from sidecar.settings import HotSettings, Settings, load
from sidecar.store import Store
from sidecar.upstream import AiohttpUpstream

log = structlog.get_logger("sidecar.runtime")
FLUSH_SECONDS = 0.4


class Runtime:
    """The parts, wired. It is also the journal the data plane writes its news to."""

    def __init__(self, settings: Settings, *, degraded: bool = False, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock: Clock = clock or SystemClock()
        self.started_at = self.clock.now()
        self.alerts: list[str] = []
        self.store = Store(settings.db_path)
        self.ring = self._keyring(degraded=degraded)
        self.admin_token = settings.admin_token or _kept_token(settings)
        self.hot: HotSettings = settings.hot()
        self.fleet = Fleet(self.clock, self.hot)
        self.ledger = Ledger()
        self.access = Access(open=settings.loopback_only or settings.allow_open)
        self.upstream: AiohttpUpstream | None = None
        self.lines = AccessLog()
        self.metrics = Metrics(self.fleet, self.started_at, self.store.sizes)
        self.file = BackendsFile(settings.backends_file, os.environ, settings.private_networks)
        self.stored: list[Backend] = []
        self._news: list[tuple[str, str, int, float, float, str]] = []
        self._spent: dict[tuple[str, str], float] = {}
        self._states: dict[str, dict[str, Any]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._flushing = asyncio.Lock()
        self._flush_task: asyncio.Future[None] | None = None
        self._key_stamp = 0
        self.db_error = ""
        self.last_backup = ""
        self._load()

    def _keyring(self, *, degraded: bool) -> Keyring:
        settings = self.settings
        try:
            return keys.load(
                settings.encryption_key,
                settings.old_encryption_keys,
                settings.key_file,
                anything_encrypted=self.store.run_now(store.encrypted_count) > 0,
            )
        except KeyringError:
            if not degraded:
                self.store.close()
                raise
            # Nothing can be opened, yet everything else works and new keys can be entered.
            return Keyring(os.urandom(32))

    def _load(self) -> None:
        def work(
            db: sqlite3.Connection,
        ) -> tuple[list[Backend], dict[str, Any], list[Client], list[tuple[str, str, float]]]:
            spent = [
                (r["client_id"], r["month"], r["dollars"]) for r in db.execute("SELECT * FROM client_spend")
            ]
            return store.read_backends(db, self.ring), health.read_states(db), read_clients(db), spent

        self.stored, states, clients, spent = self.store.run_now(work)
        self.set_clients(clients)
        month = access.month_of(self.clock.now())
        for client_id, when, dollars in spent:
            if when == month:
                self.access.of(client_id, self.clock.now()).dollars = dollars
        self.file.load()
        self.refresh()
        for backend_id, row in states.items():
            lane = self.fleet.lanes.get(backend_id)
            if lane is not None:
                health.restore(lane, row)
        self.metrics.know(self.proxy_models)

    def proxy_models(self) -> set[str]:
        """Canonical names that are configured."""
        return {name for lane in self.fleet.lanes.values() for name in lane.backend.model_mappings}

    # -- configuration ---------------------------------------------------------------------

    def refresh(self) -> None:
        """Hand the fleet the backends of all sources; a file's win over stored ones of the same id."""
        everything = {backend.id: backend for backend in self.stored}
        for backend in (*from_v1(self.settings), *self.file.backends):
            everything[backend.id] = backend
        self.fleet.replace(everything.values())

    def set_clients(self, clients: list[Client]) -> None:
        """Take over the client keys."""
        self.access.clients = {client.id: client for client in clients}

    def set_hot(self, hot: HotSettings) -> None:
        """Take over changed settings at once."""
        self.hot = hot
        self.fleet.apply(hot)

    async def reload_settings(self, stored: Mapping[str, Any]) -> None:
        """Environment over `stored` over defaults."""
        self.set_hot(load(os.environ, stored).hot())

    def proxy(self) -> Proxy:
        """The data plane."""
        if self.upstream is None:
            raise RuntimeError("start() opens the upstream client first")
        return Proxy(
            self.fleet, self.upstream, self.ledger, self.access, self.clock, self.metrics, self, self.lines,
            asyncio.get_running_loop(),
        )  # fmt: skip

    # -- the journal of the data plane ---------------------------------------------------------

    def cooled(self, backend_id: str, reason: str, level: int, until: float, now: float) -> None:
        """A cooldown began or grew."""
        self._news.append((backend_id, reason, level, now, until, ""))
        log.warning(
            "backend cools down", backend=backend_id, reason=reason, level=level, seconds=round(until - now)
        )

    def quarantined(self, backend_id: str, detail: str, now: float) -> None:
        """A provider refused a key: no traffic until the key changes or an admin clears it."""
        self._news.append((backend_id, "key", 0, now, 0.0, detail))
        log.error("backend quarantined: the provider refuses its key", backend=backend_id, detail=detail)

    def ejected(self, backend_id: str, until: float, now: float) -> None:
        """A breaker opened."""
        self._news.append((backend_id, "ejected", 0, now, until, ""))
        log.warning("backend ejected after failures", backend=backend_id, seconds=round(until - now))

    def spent(self, client: Client, dollars: float, now: float) -> None:
        """A client's request has cost this much."""
        key = (client.id, access.month_of(now))
        self._spent[key] = self._spent.get(key, 0.0) + dollars

    # -- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the upstream client and begin the background work."""
        self.upstream = AiohttpUpstream(lambda: self.settings.private_networks)
        for every, work in (
            (lambda: FLUSH_SECONDS, self.flush),
            (lambda: self.hot.router_refresh_seconds, self._watch_file),
            (lambda: health.jittered(self.hot.health_check_interval_seconds), self.probe_all),
            (lambda: self.hot.backup_interval_seconds, self._backup),
        ):
            self._tasks.append(asyncio.create_task(self._repeat(every, work)))

    async def _repeat(self, every: Callable[[], float], work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(every())
            try:
                await work()
            except (OSError, sqlite3.Error, store.StoreError) as error:
                log.error("background work failed", work=work.__name__, error=str(error))  # noqa: TRY400 - expected kinds; the text says it

    async def flush(self) -> None:
        """Write what has been booked since the last time.

        Shielded: a batch that was taken is written even when whoever asked for it is
        cancelled (the timer at shutdown, an admin who leaves); otherwise it would be lost.
        """
        self._flush_task = asyncio.ensure_future(self._flush())
        await asyncio.shield(self._flush_task)

    async def _flush(self) -> None:
        async with self._flushing:
            taken, news, spent = self.ledger.take(), self._news, self._spent
            self._news, self._spent = [], {}
            states = self._changed_states()
            if not (taken or news or spent or states):
                return
            try:
                await self.store.run(lambda db: store.write_books(db, taken, states, spent, news))
                self.db_error = ""
            except sqlite3.Error as error:
                self.db_error = str(error)
                self.ledger.put_back(taken)
                self._news = news + self._news
                for key, dollars in spent.items():
                    self._spent[key] = self._spent.get(key, 0.0) + dollars
                for state in states:
                    self._states.pop(state["backend_id"], None)
                log.error("the books could not be written; they are kept and tried again", error=str(error))  # noqa: TRY400

    def _changed_states(self) -> list[dict[str, Any]]:
        now = self.clock.now()
        changed = []
        for lane in self.fleet.lanes.values():
            state = health.state_of(lane, now)
            if self._states.get(lane.backend.id) != state:
                self._states[lane.backend.id] = state
                changed.append(state)
        return changed

    def forget(self, backend_id: str) -> None:
        """A backend was deleted."""
        self._states.pop(backend_id, None)

    def _reread_keys(self) -> None:
        """A rotation put a new key into the file: seal with it from now on."""
        settings = self.settings
        if settings.encryption_key or not settings.key_file.exists():
            return
        stamp = settings.key_file.stat().st_mtime_ns
        if stamp != self._key_stamp:
            self._key_stamp = stamp
            try:
                self.ring = keys.load(
                    "", settings.old_encryption_keys, settings.key_file, anything_encrypted=True
                )
            except KeyringError as error:
                log.error("the encryption key file cannot be used; the old keyring stays", error=str(error))  # noqa: TRY400

    async def _watch_file(self) -> None:
        self._reread_keys()
        if await asyncio.to_thread(self.file.load):
            self.refresh()
            log.info("backends file read", backends=len(self.file.backends), error=self.file.error)

    async def probe_all(self) -> None:
        """Look at every backend once; a 429's cooldown is never cleared by this."""
        lanes = [lane for lane in self.fleet.lanes.values() if lane.backend.enabled and not lane.quarantine]
        await asyncio.gather(*(self.probe(lane) for lane in lanes))

    async def probe(self, lane: Lane) -> health.Probe:
        """Look at one backend and keep what was seen."""
        if self.upstream is None:
            raise RuntimeError("start() opens the upstream client first")
        began, backend = self.clock.now(), lane.backend
        seen = await health.probe(
            backend, self.upstream, self.hot.health_check_timeout_seconds, self.settings.private_networks
        )
        lane.count.last_probe = seen.detail
        if seen.key_ok is False and not lane.quarantine and lane.backend is backend:
            lane.quarantine = seen.detail
            self.quarantined(backend.id, seen.detail, self.clock.now())
        elif not seen.reachable and lane.breaker.failure(began, self.clock.now()):
            self.ejected(backend.id, lane.breaker.until, self.clock.now())
        return seen

    async def _backup(self) -> None:
        made = await self.store.backup(self.settings.backup_dir, self.hot.backup_retention_days)
        self.last_backup = made.name
        log.info("backup made and checked", file=made.name)

    async def stop(self) -> None:
        """Settle the books and close everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.fleet.close()
        self.lines.write()
        await self.flush()
        if self.upstream is not None:
            await self.upstream.close()
        self.store.close()

    def readiness(self) -> dict[str, str]:
        """What keeps the sidecar from being ready, by part; empty when it is."""
        wrong: dict[str, str] = {}
        if self.db_error:
            wrong["database"] = self.db_error
        unreadable = [lane.backend.id for lane in self.fleet.lanes.values() if lane.backend.key_error]
        if unreadable:
            wrong["keys"] = f"cannot be decrypted: {', '.join(sorted(unreadable))}"
        now = self.clock.now()
        if not any(lane.status(now) == "healthy" for lane in self.fleet.lanes.values()):
            states = ", ".join(f"{i}: {lane.status(now)}" for i, lane in sorted(self.fleet.lanes.items()))
            wrong["backends"] = f"none is available ({states or 'none is configured'})"
        if self.file.error:
            wrong["backends_file"] = self.file.error
        if self.fleet.draining:
            wrong["draining"] = "the sidecar is shutting down"
        return wrong


def read_clients(db: sqlite3.Connection) -> list[Client]:
    """All client keys."""
    return [
        Client(
            row["id"],
            row["name"],
            row["key_hash"],
            row["budget"],
            tuple(filter(None, row["models"].split("\n"))),
        )
        for row in db.execute("SELECT * FROM clients ORDER BY id")
    ]


def _kept_token(settings: Settings) -> str:
    path = settings.token_file
    if path.exists():
        token = path.read_text(encoding="ascii", errors="replace").strip()
        if token:
            return token
    token = os.urandom(24).hex()
    keys.write_secret(path, token + "\n")
    return token
