"""Probes of the backends, and what outlives a restart of a lane."""

import asyncio
import hashlib
import json
import random
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidecar.addresses import AddressRefused, base_of, check_url
from sidecar.errors import redact_text
from sidecar.lane import Lane
from sidecar.limits import Cooldown
from sidecar.model import Api, Backend
from sidecar.upstream import Upstream, UpstreamError
from sidecar.wire import ANTHROPIC_VERSION, key_headers

_OK, _REDIRECT, _UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _TOO_MANY, _SERVER_ERROR = (
    200,
    300,
    401,
    403,
    404,
    429,
    500,
)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a look at a backend's `/models` said. `key_ok` is None when it could not tell."""

    reachable: bool
    key_ok: bool | None
    detail: str
    status: int = 0


async def probe(backend: Backend, upstream: Upstream, timeout: float, allowed: tuple[str, ...] = ()) -> Probe:  # noqa: ASYNC109 - a setting, in seconds
    """Ask for the list of models: free of charge, and it needs the key."""
    if backend.key_error:
        return Probe(reachable=False, key_ok=None, detail=backend.key_error)
    headers = {"accept": "application/json", "user-agent": "sidecar-probe", **key_headers(backend)}
    if backend.api is Api.ANTHROPIC:
        headers["anthropic-version"] = ANTHROPIC_VERSION
    url = base_of(backend.api_base_url, anthropic=backend.api is Api.ANTHROPIC) + "/models"
    try:
        check_url(backend.api_base_url, allowed)
        async with asyncio.timeout(timeout):
            reply = await upstream.send(url, headers, None, lambda: None)
        status = reply.status
        reply.close()
    except AddressRefused as refused:
        return Probe(reachable=False, key_ok=None, detail=f"api_base_url {refused}")
    except TimeoutError:
        return Probe(reachable=False, key_ok=None, detail=f"no answer within {timeout:g} s")
    except UpstreamError as error:
        return Probe(reachable=False, key_ok=None, detail=redact_text(str(error), [backend.api_key]))
    return _read(status)


def _read(status: int) -> Probe:
    if status in (_UNAUTHORIZED, _FORBIDDEN):
        return Probe(
            reachable=True,
            key_ok=False,
            detail=f"the provider refuses the key (status {status})",
            status=status,
        )
    if status >= _SERVER_ERROR:
        return Probe(reachable=False, key_ok=None, detail=f"the provider answers {status}", status=status)
    if _OK <= status < _REDIRECT:
        return Probe(reachable=True, key_ok=True, detail="ok", status=status)
    if status == _NOT_FOUND:
        # Many compatible servers have no /models: that is not "down", and says nothing of the key.
        return Probe(
            reachable=True, key_ok=None, detail="reachable; it offers no list of models", status=status
        )
    return Probe(reachable=True, key_ok=None, detail=f"reachable; it answers {status}", status=status)


def jittered(seconds: float) -> float:
    """Between 90 % and 110 %, so that a fleet of sidecars does not probe in step."""
    return seconds * random.uniform(0.9, 1.1)  # noqa: S311 - spreading load, not secrets


def digest(backend: Backend) -> str:
    """Names a key and address, to tell whether a quarantine still concerns them."""
    return hashlib.sha256(f"{backend.api_base_url} {backend.api_key}".encode()).hexdigest()[:16]


def state_of(lane: Lane, now: float) -> dict[str, Any]:
    """A row of backend_health."""
    return {
        "backend_id": lane.backend.id,
        "status": lane.status(now),
        "cooldown_level": lane.cooldown.level,
        "cooldown_until": lane.cooldown.until,
        "cooldown_reason": lane.cooldown.reason,
        "recovered_at": lane.cooldown.recovered_at,
        "quarantine": lane.quarantine,
        "key_digest": digest(lane.backend),
        "ejections": lane.breaker.ejections,
        "ejected_until": lane.breaker.until,
        "starts": json.dumps(lane.starts.tally(now)),
    }


def restore(lane: Lane, row: Mapping[str, Any]) -> None:
    """Put a lane back to where an earlier process left it."""
    lane.cooldown = Cooldown(
        level=row["cooldown_level"],
        until=row["cooldown_until"],
        reason=row["cooldown_reason"],
        recovered_at=row["recovered_at"],
    )
    lane.breaker.ejections = row["ejections"]
    lane.breaker.until = row["ejected_until"]
    if row["key_digest"] == digest(lane.backend):
        lane.quarantine = row["quarantine"]
    # A plain number is one start, as versions before this one wrote them.
    kept = [entry if isinstance(entry, list) else (entry, 1) for entry in json.loads(row["starts"])]
    lane.starts.restore((at, count) for at, count in kept)


def read_states(db: sqlite3.Connection) -> dict[str, dict[str, Any]]:
    """All rows of backend_health by backend."""
    return {row["backend_id"]: dict(row) for row in db.execute("SELECT * FROM backend_health")}
