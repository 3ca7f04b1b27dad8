"""The dashboard: one page from our own files, live over server-sent events, behind a session."""

import asyncio
import hmac
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from sidecar import admin_store
from sidecar.payload import encode
from sidecar.runtime import Runtime

if TYPE_CHECKING:
    from sidecar.admin import Admin

_STATIC = Path(__file__).parent / "static"
_COOKIE = "sidecar_session"
_SESSION_SECONDS = 12 * 3600
_MAX_SESSIONS = 1000
_MAX_FORM_BYTES = 4096
_FILES = {"app.js": "text/javascript; charset=utf-8", "style.css": "text/css; charset=utf-8"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Sessions:
    """Who has shown the admin token in this browser. Kept in memory: a restart asks again."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._until: dict[str, float] = {}

    def open(self) -> str:
        """A new session's secret."""
        now = self._runtime.clock.now()
        self._until = {key: until for key, until in self._until.items() if until > now}
        if len(self._until) >= _MAX_SESSIONS:
            self._until.pop(next(iter(self._until)))
        key = secrets.token_urlsafe(32)
        self._until[key] = now + _SESSION_SECONDS
        return key

    def valid(self, request: Request) -> bool:
        """Whether the request carries a live session."""
        return self._until.get(request.cookies.get(_COOKIE, ""), 0.0) > self._runtime.clock.now()

    def close(self, request: Request) -> None:
        """Forget the request's session."""
        self._until.pop(request.cookies.get(_COOKIE, ""), None)

    @staticmethod
    def check_origin(request: Request) -> None:
        """A session acts only for pages of ours. Raises Problem 403."""
        from sidecar.admin import Problem  # noqa: PLC0415 - admin knows the dashboard's routes too

        origin = request.headers.get("origin")
        if request.method not in ("GET", "HEAD") and origin is None:
            raise Problem(403, "foreign_origin", "a change needs an Origin header of this page")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise Problem(403, "foreign_origin", "this came from a page of another origin")


class Pages:
    """The handlers of the page."""

    def __init__(self, runtime: Runtime, admin: "Admin", sessions: Sessions) -> None:
        self._runtime = runtime
        self._admin = admin
        self._sessions = sessions
        self._series: tuple[float, list[dict[str, Any]]] = (-1e9, [])
        self._overview: tuple[float, bytes] = (-1e9, b"")

    async def page(self, _request: Request) -> Response:
        """The page itself holds nothing secret; what it shows comes over the stream."""
        return Response(
            (_STATIC / "index.html").read_bytes(), headers=_HEADERS, media_type="text/html; charset=utf-8"
        )

    async def asset(self, request: Request) -> Response:
        """One of our own files."""
        name = request.path_params["name"]
        if name not in _FILES:
            return Response("not here\n", 404, _HEADERS, "text/plain")
        return Response((_STATIC / name).read_bytes(), headers=_HEADERS, media_type=_FILES[name])

    async def login(self, request: Request) -> Response:
        """Exchange the admin token for a session cookie that scripts cannot read."""
        from sidecar.admin import Problem  # noqa: PLC0415

        try:
            self._sessions.check_origin(request)
        except Problem as problem:
            return Response(str(problem), problem.status, _HEADERS, "text/plain")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MAX_FORM_BYTES:
                return Response("too long", 413, _HEADERS, "text/plain")
        if not hmac.compare_digest(body.strip(), self._runtime.admin_token.encode()):
            return Response("wrong token", 401, _HEADERS, "text/plain")
        response = Response("", 204, _HEADERS)
        response.set_cookie(
            _COOKIE, self._sessions.open(), _SESSION_SECONDS, httponly=True, samesite="strict", path="/"
        )
        return response

    async def logout(self, request: Request) -> Response:
        """Forget the session."""
        self._sessions.close(request)
        response = RedirectResponse("/dashboard", 303, _HEADERS)
        response.delete_cookie(_COOKIE, path="/")
        return response

    async def events(self, request: Request) -> Response:
        """The overview, again and again."""
        if not self._sessions.valid(request):
            return Response("log in first", 401, _HEADERS, "text/plain")
        headers = {**_HEADERS, "x-accel-buffering": "no"}
        return StreamingResponse(self._stream(), 200, headers, "text/event-stream")

    async def _stream(self) -> AsyncIterator[bytes]:
        while not self._runtime.fleet.draining:
            yield b"data: " + await self._shown() + b"\n\n"
            await asyncio.sleep(self._runtime.hot.dashboard_sse_seconds)

    async def _shown(self) -> bytes:
        """One overview serves all open pages of the same moment."""
        now = self._runtime.clock.now()
        if now - self._overview[0] >= self._runtime.hot.dashboard_sse_seconds / 2:
            self._overview = (now, await self.overview(now))
        return self._overview[1]

    async def overview(self, now: float) -> bytes:
        """Everything the page shows, as JSON."""
        runtime = self._runtime
        if now - self._series[0] >= runtime.hot.stats_refresh_seconds or runtime.ledger.total.requests <= 1:
            self._series = (now, await runtime.store.run(lambda db: admin_store.series(db, now)))
        total = await runtime.store.run(admin_store.total)
        backends = [
            lane.model_dump(mode="json", include=_SHOWN)
            for lane in (await self._admin.list_backends()).backends
        ]
        return encode(
            {
                "total": total,
                "backends": backends,
                "queue": runtime.fleet.queued,
                "emergency": runtime.fleet.emergencies,
                "uptime": round(now - runtime.started_at),
                "series": self._series[1],
                "now": now,
                "reasons": runtime.readiness(),
            }
        )


_SHOWN = {
    "id", "name", "label", "pool", "status", "status_detail", "cooldown_seconds", "starts_last_minute", "rpm_limit",
    "in_flight", "priority",
}  # fmt: skip


def dashboard_routes(runtime: Runtime, admin: "Admin", sessions: Sessions) -> list[Route]:
    """The routes of the page."""
    pages = Pages(runtime, admin, sessions)
    return [
        Route("/dashboard", pages.page, methods=["GET"]),
        Route("/dashboard/login", pages.login, methods=["POST"]),
        Route("/dashboard/logout", pages.logout, methods=["POST"]),
        Route("/dashboard/sse", pages.events, methods=["GET"]),
        Route("/dashboard/static/{name}", pages.asset, methods=["GET"]),
    ]
