"""``POST /api/reconcile``: a request for a pass, handed to the daemon through the store."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request

from reconciler import asks
from reconciler.api.reader import Reader, Unreadable
from reconciler.desired.places import suggestion
from reconciler.model import ConfigurationError, ResourceId
from reconciler.plan import covers
from reconciler.store import Store, StoreError

_MOST_BYTES = 4096


async def ask(request: Request, reader: Reader) -> dict[str, Any]:
    """Put it on record; its number, and where to ask what became of it. Raises HTTPException, Unreadable."""
    target = _target(await _body(request))
    if target:
        known = await reader.read(lambda store: list(store.conditions()))
        _check(target, known)
    caller = f"HTTP from {request.client.host}" if request.client else "HTTP"
    # Writing may have to wait for a pass that writes: not in the thread that everybody reads in.
    number = await run_in_threadpool(_record, reader.path, target, caller)
    return {"id": number, "target": target, "state": "waiting", "see": f"/api/requests/{number}"}


async def asked(number: int, reader: Reader) -> dict[str, Any]:
    """What became of a request. Raises HTTPException 404, Unreadable."""
    found = await reader.read(lambda store: asks.state(store, number))
    if found is None:
        raise HTTPException(404, f"there is no request {number}; requests are kept for {asks.KEEP.days} days")
    return found


def _record(path: Path, target: str, caller: str) -> int:
    try:
        with closing(Store(path)) as store:
            return asks.ask(store, target, caller)
    except (StoreError, ConfigurationError) as error:
        raise Unreadable(f"the request cannot be put on record: {error}") from error


async def _body(request: Request) -> bytes:
    found = b""
    async for part in request.stream():
        found += part
        if len(found) > _MOST_BYTES:
            raise HTTPException(413, f"the request is longer than {_MOST_BYTES} bytes")
    return found


def _target(body: bytes) -> str:
    """The target of a request; empty means everything."""
    try:
        given = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        raise HTTPException(422, 'this is not JSON; write {"target": "NODE/KIND/NAME"}, or nothing') from None
    if not isinstance(given, dict):
        raise HTTPException(422, 'write an object: {"target": "NODE/KIND/NAME"}')
    for name in given:
        if name != "target":
            raise HTTPException(422, f"{name}: there is no such field (known: target)")
    target = given.get("target", "")
    if not isinstance(target, str) or not target.isprintable():
        raise HTTPException(422, "target: write NODE, NODE/KIND or NODE/KIND/NAME")
    return target.strip()


def _check(target: str, keys: list[str]) -> None:
    """Refuse what covers nothing that was ever looked at."""
    known = [ResourceId.parse(key) for key in keys]
    if any(covers(target, rid) for rid in known):
        return
    names = [
        *dict.fromkeys(rid.node for rid in known),
        *dict.fromkeys(f"{rid.node}/{rid.kind}" for rid in known),
        *keys,
    ]
    hint = suggestion(target, names) or "NODE, NODE/KIND or NODE/KIND/NAME; * stands for any"
    if not known:
        hint = "no pass has looked at anything yet; leave the target out"
    raise HTTPException(422, f"target: {target!r} covers nothing that is known ({hint})")
