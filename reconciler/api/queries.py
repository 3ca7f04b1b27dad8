"""Query parameters: each is known, or refused by name."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from starlette.exceptions import HTTPException
from starlette.requests import Request

from reconciler.desired.places import suggestion
from reconciler.kinds.registry import kinds
from reconciler.model import ConfigurationError, ResourceId, Status
from reconciler.render import moment_since

MOST = 500
_EVENTS = {"node", "kind", "resource", "status", "since", "search", "limit"}


def none_expected(request: Request) -> None:
    """Refuse any parameter. Raises HTTPException 422."""
    _known(request, set())


def event_filters(request: Request) -> dict[str, Any]:
    """The filters of ``/api/events`` as the store wants them. Raises HTTPException 422."""
    _known(request, _EVENTS)
    given = dict(request.query_params)
    _one_of("status", given.get("status"), [status.value for status in Status])
    _one_of("kind", given.get("kind"), list(kinds()))
    resource = given.pop("resource", None)
    if resource is not None:
        try:
            ResourceId.parse(resource)
        except ValueError:
            _refuse("resource", f"{resource!r} is not NODE/KIND/NAME")
    limit = given.pop("limit", "50")
    if not re.fullmatch(r"[0-9]{1,4}", limit) or not 1 <= int(limit) <= MOST:
        _refuse("limit", f"write a number from 1 to {MOST}, not {limit!r}")
    since = given.pop("since", None)
    if since is not None:
        try:
            since = moment_since(since)
        except ConfigurationError as error:
            _refuse("since", str(error).removeprefix("--since: "))
    return {**given, "issue_key": resource, "since": since, "limit": int(limit)}


def _known(request: Request, names: set[str]) -> None:
    for name in request.query_params:
        if name not in names:
            hint = suggestion(name, sorted(names)) or (
                f"known: {', '.join(sorted(names))}" if names else "it takes none"
            )
            _refuse(name, f"there is no such parameter ({hint})")
        if len(request.query_params.getlist(name)) > 1:
            _refuse(name, "give it once")


def _one_of(name: str, value: str | None, known: list[str]) -> None:
    if value is not None and value not in known:
        hint = suggestion(value, known) or f"known: {', '.join(known)}"
        _refuse(name, f"there is no {value!r} ({hint})")


def _refuse(name: str, why: str) -> NoReturn:
    raise HTTPException(422, f"{name}: {why}")
