"""The admin API's handlers. Each is one small function from a typed request to a typed answer."""

import os
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ValidationError

from sidecar import access, admin_store, keys, store
from sidecar import admin_models as m
from sidecar.access import Client
from sidecar.addresses import AddressRefused, check_url
from sidecar.lane import Hints, Lane, Query
from sidecar.limits import Cooldown
from sidecar.model import Backend, Pool, Source
from sidecar.routing import Way, Why
from sidecar.runtime import Runtime
from sidecar.settings import HotSettings, SettingsError, from_environment, load, variable

_CREATED = 201


class Problem(Exception):  # noqa: N818 - an answer
    """An error answer: status, constant code, message, and the field at fault."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.field = status, code, field


class Admin:
    """Handlers over one runtime. `path` holds path parameters, `query` validated query values."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    # -- backends ----------------------------------------------------------------------------

    def _lane(self, backend_id: str) -> Lane:
        lane = self.runtime.fleet.lanes.get(backend_id)
        if lane is None:
            raise Problem(404, "not_found", f"there is no backend {backend_id!r}", "id")
        return lane

    def _editable(self, backend_id: str) -> Backend:
        backend = self._lane(backend_id).backend
        if backend.source is Source.DESIRED:
            where = self.runtime.settings.backends_file
            raise Problem(
                409, "declared_elsewhere", f"this backend is declared in {where}; change it there", "id"
            )
        if backend.source is Source.ENV:
            raise Problem(
                409, "declared_elsewhere", "this backend comes from SIDECAR_UPSTREAM; change it there", "id"
            )
        return backend

    def show(self, lane: Lane) -> m.BackendOut:
        """A backend for an admin's eyes."""
        now, backend = self.runtime.clock.now(), lane.backend
        fields = {name: getattr(backend, name) for name in Backend.model_fields if name != "key_error"}
        fields["api_key"] = keys.mask(backend.api_key)
        return m.BackendOut(
            **fields,
            status=lane.status(now),
            status_detail=backend.key_error
            or lane.quarantine
            or lane.count.last_error
            or lane.count.last_probe,
            cooldown_seconds=round(max(0.0, lane.rests_until() - now), 1),
            cooldown_level=lane.cooldown.settled(now, lane.policy).level,
            starts_last_minute=lane.starts.used(now),
            in_flight=lane.count.in_flight,
        )

    async def list_backends(self, **_: Any) -> m.BackendList:
        """All backends with their state."""
        return m.BackendList(
            backends=[self.show(lane) for _, lane in sorted(self.runtime.fleet.lanes.items())]
        )

    async def get_backend(self, path: Mapping[str, str], **_: Any) -> m.BackendOut:
        """One backend."""
        return self.show(self._lane(path["id"]))

    async def create_backend(self, body: m.BackendIn, **_: Any) -> m.BackendOut:
        """Add a backend."""
        backend_id = body.id or self._fresh_id(body.name)
        if backend_id in self.runtime.fleet.lanes:
            raise Problem(409, "exists", f"there is a backend {backend_id!r} already", "id")
        return await self._write(backend_id, body, None)

    async def put_backend(self, path: Mapping[str, str], body: m.BackendIn, **_: Any) -> m.BackendOut:
        """Replace a backend; its counters and cooldown stay."""
        old = self._editable(path["id"])
        if body.id not in (None, old.id):
            raise Problem(409, "id_fixed", "the id of a backend cannot change; create another one", "id")
        return await self._write(old.id, body, old)

    def _fresh_id(self, name: str) -> str:
        stem = (
            "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower()).strip("-")[:40]
            or "backend"
        )
        taken, number, found = self.runtime.fleet.lanes, 1, stem
        while found in taken:
            number += 1
            found = f"{stem}-{number}"
        return found

    async def _write(self, backend_id: str, body: m.BackendIn, old: Backend | None) -> m.BackendOut:
        try:
            check_url(body.api_base_url, self.runtime.settings.private_networks)
        except AddressRefused as refused:
            raise Problem(409, "address_refused", f"api_base_url {refused}", "api_base_url") from None
        key, keep = self._key(body, old)
        fields = body.model_dump(exclude={"id", "api_key", "rpm_limit", "model_mappings"})
        backend = Backend(
            id=backend_id,
            api_key=key,
            rpm_limit=body.rpm_limit or self.runtime.hot.rate_rpm,
            model_mappings=body.model_mappings,
            source=old.source if old else Source.WEBUI,
            key_error=old.key_error if old and keep else "",
            **fields,
        )
        ring = self.runtime.ring
        await self.runtime.store.run(lambda db: store.write_backend(db, ring, backend, keep_key=keep))
        self.runtime.stored = [b for b in self.runtime.stored if b.id != backend_id] + [backend]
        self.runtime.refresh()
        return self.show(self._lane(backend_id))

    @staticmethod
    def _key(body: m.BackendIn, old: Backend | None) -> tuple[str, bool]:
        """The key to use, and whether the stored ciphertext stays as it is."""
        sent = body.api_key
        keep = old is not None and (sent is None or keys.is_mask_of(sent, old.api_key) or sent == "...")
        if old is None or not keep:
            return sent or "", False
        if body.api_base_url != old.api_base_url and (old.api_key or old.key_error):
            # Otherwise whoever may edit could send the stored key to an address of his.
            raise Problem(409, "key_needed", "enter the key anew when the address changes", "api_key")
        return old.api_key, True

    async def delete_backend(self, path: Mapping[str, str], **_: Any) -> m.Deleted:
        """Remove a backend with its cooldown and health; its usage stays."""
        backend = self._editable(path["id"])
        self.runtime.stored = [b for b in self.runtime.stored if b.id != backend.id]
        self.runtime.refresh()
        await self.runtime.flush()
        await self.runtime.store.run(lambda db: store.delete_backend(db, backend.id))
        self.runtime.forget(backend.id)
        return m.Deleted()

    async def test_backend(self, path: Mapping[str, str], **_: Any) -> m.TestOut:
        """Look at the provider now; a success lifts a quarantine."""
        lane = self._lane(path["id"])
        seen = await self.runtime.probe(lane)
        if seen.key_ok:
            lane.quarantine = ""
        return m.TestOut(reachable=seen.reachable, key_ok=seen.key_ok, status=seen.status, detail=seen.detail)

    async def clear_backend(self, path: Mapping[str, str], **_: Any) -> m.BackendOut:
        """Forget cooldown, ejection and quarantine."""
        lane = self._lane(path["id"])
        lane.cooldown, lane.quarantine, lane.hints = Cooldown(), "", Hints()
        lane.breaker.reset()
        self.runtime.fleet.wake()
        return self.show(lane)

    async def pools(self, **_: Any) -> m.Pools:
        """Pools and queue in numbers."""
        now, fleet = self.runtime.clock.now(), self.runtime.fleet
        shown = []
        for pool in Pool:
            states = [lane.status(now) for lane in fleet.lanes.values() if lane.backend.pool is pool]
            counts = {state: states.count(state) for state in ("healthy", "cooling", "error", "disabled")}
            shown.append(m.PoolOut(pool=pool, **counts))
        return m.Pools(pools=shown, queue_depth=fleet.queued, emergency_count=fleet.emergencies)

    # -- statistics ---------------------------------------------------------------------------

    async def _read(self, work: Any) -> Any:
        # What was booked up to now belongs into the answer.
        await self.runtime.flush()
        return await self.runtime.store.run(work)

    async def total(self, **_: Any) -> m.TotalOut:
        """Sums since the first day."""
        return m.TotalOut(**await self._read(admin_store.total))

    async def hourly(self, query: Mapping[str, Any], **_: Any) -> m.Hourly:
        """By hour, backend, model and client."""
        now = self.runtime.clock.now()
        rows = await self._read(lambda db: admin_store.hourly(db, now, query["hours"], query["backend_id"]))
        return m.Hourly(rows=rows)

    async def daily(self, query: Mapping[str, Any], **_: Any) -> m.Daily:
        """By day and pool."""
        now = self.runtime.clock.now()
        return m.Daily(rows=await self._read(lambda db: admin_store.daily(db, now, query["days"])))

    async def cooldown(self, query: Mapping[str, Any], **_: Any) -> m.CooldownLog:
        """The log of cooldowns, ejections and quarantines."""
        rows = await self._read(lambda db: admin_store.cooldowns(db, query["backend_id"], query["limit"]))
        return m.CooldownLog(rows=rows)

    # -- settings ------------------------------------------------------------------------------

    async def list_config(self, **_: Any) -> m.ConfigOut:
        """All settings that apply without a restart."""
        stored = await self.runtime.store.run(admin_store.read_config)
        return m.ConfigOut(settings=[self._entry(key, stored) for key in HotSettings.model_fields])

    def _entry(self, key: str, stored: Mapping[str, Any]) -> m.ConfigEntry:
        given = from_environment(os.environ)
        origin = "environment" if key in given else "database" if key in stored else "default"
        return m.ConfigEntry(
            key=key, value=getattr(self.runtime.hot, key), origin=origin, variable=variable(key)
        )

    def _known(self, key: str) -> str:
        if key not in HotSettings.model_fields:
            raise Problem(
                404, "not_found", f"there is no setting {key!r} that can change while running", "key"
            )
        return key

    async def get_config(self, path: Mapping[str, str], **_: Any) -> m.ConfigEntry:
        """One setting."""
        key = self._known(path["key"])
        return self._entry(key, await self.runtime.store.run(admin_store.read_config))

    async def put_config(self, path: Mapping[str, str], body: m.ConfigValue, **_: Any) -> m.ConfigEntry:
        """Change one setting at once."""
        key = self._known(path["key"])
        if key in from_environment(os.environ):
            raise Problem(
                409, "set_by_environment", f"{variable(key)} sets this; change it there and restart", key
            )
        stored = {**await self.runtime.store.run(admin_store.read_config), key: body.value}
        try:
            HotSettings.model_validate({key: body.value})
            hot = load(os.environ, stored).hot()
        except (ValidationError, SettingsError) as error:
            text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise Problem(409, "out_of_range", f"{key}: {text}", "value") from None
        value = getattr(hot, key)
        await self.runtime.store.run(lambda db: admin_store.write_config(db, key, value))
        self.runtime.set_hot(hot)
        return self._entry(key, stored)

    async def delete_config(self, path: Mapping[str, str], **_: Any) -> m.ConfigEntry:
        """Back to the default."""
        key = self._known(path["key"])

        def work(db: sqlite3.Connection) -> dict[str, Any]:
            admin_store.delete_config(db, key)
            return admin_store.read_config(db)

        stored = await self.runtime.store.run(work)
        await self.runtime.reload_settings(stored)
        return self._entry(key, stored)

    async def reset_config(self, **_: Any) -> m.ConfigOut:
        """All settings back to their defaults."""
        await self.runtime.store.run(admin_store.delete_config)
        await self.runtime.reload_settings({})
        return await self.list_config()

    # -- clients ----------------------------------------------------------------------------------

    def _client(self, client: Client) -> dict[str, Any]:
        now, recent = self.runtime.clock.now(), self.runtime.ledger.recent
        spent = self.runtime.access.of(client.id, now).dollars
        calls = m.RecentOut(window_seconds=recent.minutes * 60, **asdict(recent.of(client.id, now)))
        shown = {"id": client.id, "name": client.name, "budget": client.budget, "models": list(client.models)}
        return {**shown, "spent_this_month": spent, "recent": calls}

    async def list_clients(self, **_: Any) -> m.ClientList:
        """All client keys, without their secrets."""
        return m.ClientList(
            clients=[m.ClientOut(**self._client(c)) for c in self.runtime.access.clients.values()]
        )

    async def create_client(self, body: m.ClientIn, **_: Any) -> m.ClientCreated:
        """A new client key, shown this once."""
        public, key, digest = access.new_key()
        client = Client(public, body.name, digest, body.budget, tuple(body.models))
        await self.runtime.store.run(lambda db: admin_store.write_client(db, client))
        self.runtime.set_clients([*self.runtime.access.clients.values(), client])
        return m.ClientCreated(**self._client(client), key=key)

    async def delete_client(self, path: Mapping[str, str], **_: Any) -> m.Deleted:
        """Revoke a client key at once."""
        if path["id"] not in self.runtime.access.clients:
            raise Problem(404, "not_found", f"there is no client key {path['id']!r}", "id")
        self.runtime.set_clients([c for c in self.runtime.access.clients.values() if c.id != path["id"]])
        await self.runtime.store.run(lambda db: admin_store.delete_client(db, path["id"]))
        return m.Deleted()

    # -- routing --------------------------------------------------------------------------------------

    async def explain(self, body: m.ExplainIn, **_: Any) -> m.ExplainOut:
        """What routing would do with a request now; nothing is sent or taken."""
        fleet = self.runtime.fleet
        query = Query(body.model, body.api.value, body.tokens)
        decision = fleet.look(query)
        rows = [
            m.ExplainRow(
                backend_id=name,
                pool=fleet.lanes[name].backend.pool,
                candidate=why is Why.OK,
                reason=why.value,
            )
            for name, why in decision.reasons
        ]
        waits = decision.way in (Way.WAIT, Way.EMERGENCY)
        return m.ExplainOut(
            way=decision.way.value,
            order=[lane.backend.id for lane in decision.order],
            backends=rows,
            wait_seconds=round(fleet.estimate(query), 3) if waits else 0.0,
        )


def problem_of(error: ValidationError) -> Problem:
    """The first thing wrong with a request, naming its field."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Problem(400, "invalid_json", f"the body is not JSON: {first['msg']}")
    field = ".".join(str(part) for part in first["loc"]) or None
    return Problem(422, "invalid", f"{field or 'body'}: {first['msg']}", field)


def dump(answer: BaseModel) -> bytes:
    """An answer as JSON."""
    return answer.model_dump_json(by_alias=True).encode()


CREATED = _CREATED
