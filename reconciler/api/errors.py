"""Every error is the same small document: ``{"error": {"message": …}}``, said once, here."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from reconciler.api.reader import Unreadable

_WORDS = {404: "there is nothing at this address", 405: "this address is asked in another way"}


def answer(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error."""
    headers = dict(headers or {})
    if status == 401:  # noqa: PLR2004 - HTTP demands it of a 401
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": {"message": message}}, status, headers)


async def refused(_request: Request, error: Exception) -> Response:
    """What a route refuses, and what Starlette refuses before one is found."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for these only
    has_words = error.detail and error.detail not in ("Not Found", "Method Not Allowed")
    message = error.detail if has_words else _WORDS.get(error.status_code, "this cannot be answered")
    return answer(error.status_code, message, dict(error.headers or {}))


async def unreadable(_request: Request, error: Exception) -> Response:
    """The store is not there, not ours, or its disk fails."""
    return answer(503, str(error), {"retry-after": "10"})


async def broken(_request: Request, _error: Exception) -> Response:
    """A mistake of ours; the traceback is in the log."""
    return answer(500, "this failed for a reason of its own; the log has it")


HANDLERS = {HTTPException: refused, Unreadable: unreadable, Exception: broken}
