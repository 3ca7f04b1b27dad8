"""The application over HTTP: it is its constructor's arguments. Routes, errors and streams on one screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from reconciler.api import documents
from reconciler.api.errors import HANDLERS
from reconciler.api.fleet import Fleet
from reconciler.api.guard import Access, Guard
from reconciler.api.metrics import exposition
from reconciler.api.orders import ask, asked
from reconciler.api.queries import event_filters, none_expected
from reconciler.api.stream import Streams
from reconciler.store import Store, StoreError

STATIC = Path(__file__).parent / "static"
_TYPES = {".svg": "image/svg+xml", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
_METRICS = "text/plain; version=0.0.4; charset=utf-8"


def create_app(fleet: Fleet, access: Access, streams: Streams) -> Starlette:
    """The application: what it shows, who may ask, and the streams that are open."""
    found = _Handlers(fleet, streams)
    routes = [
        Route("/", found.page, methods=["GET"]),
        Route("/static/{name}", found.static, methods=["GET"]),
        Route("/healthz", found.healthz, methods=["GET"]),
        Route("/readyz", found.readyz, methods=["GET"]),
        Route("/metrics", found.metrics, methods=["GET"]),
        Route("/api/status", found.status, methods=["GET"]),
        Route("/api/events", found.events, methods=["GET"]),
        Route("/api/nodes/{name}", found.node, methods=["GET"]),
        Route("/api/stream", found.stream, methods=["GET"]),
        Route("/api/reconcile", found.reconcile, methods=["POST"]),
        Route("/api/requests/{number:int}", found.request, methods=["GET"]),
    ]
    return Starlette(
        routes=routes, middleware=[Middleware(Guard, access=access)], exception_handlers=HANDLERS
    )


class _Handlers:
    """One method per route."""

    def __init__(self, fleet: Fleet, streams: Streams) -> None:
        self.fleet, self.streams, self.reader = fleet, streams, fleet.reader
        # Read once: what is served is what was installed, and no path of a caller ever reaches the disk.
        self.files = {path.name: path.read_bytes() for path in sorted(STATIC.iterdir()) if path.is_file()}

    async def page(self, _request: Request) -> Response:
        """The fleet page."""
        return Response(self.files["index.html"], media_type="text/html; charset=utf-8")

    async def static(self, request: Request) -> Response:
        """A file of the page."""
        name = request.path_params["name"]
        kind = _TYPES.get(Path(name).suffix)
        if name not in self.files or kind is None:
            raise HTTPException(404)
        return Response(self.files[name], media_type=kind, headers={"cache-control": "no-cache"})

    async def healthz(self, _request: Request) -> Response:
        """The process lives and answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """Whether what the store says can be relied on, and if not, why."""
        none_expected(request)
        reasons = await self.fleet.unready()
        return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    async def metrics(self, _request: Request) -> Response:
        """For Prometheus."""
        state = self.fleet.state()
        text = await self.reader.read(lambda store: exposition(store, state))
        return Response(text, headers={"content-type": _METRICS})

    async def status(self, request: Request) -> Response:
        """Everything the page shows; unchanged: 304 to who names its revision."""
        none_expected(request)
        shown = await self.fleet.shown()
        headers = {"etag": f'"{shown.revision}"', "cache-control": "no-cache", "vary": "accept-encoding"}
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["content-encoding"] = "gzip"
            return Response(shown.packed, media_type="application/json", headers=headers)
        return Response(shown.body, media_type="application/json", headers=headers)

    async def events(self, request: Request) -> Response:
        """What happened, newest first."""
        filters = event_filters(request)
        return _json({"events": await self.reader.read(lambda store: _events(store, filters))})

    async def node(self, request: Request) -> Response:
        """One node in full."""
        none_expected(request)
        name = request.path_params["name"]
        found = await self.reader.read(lambda store: documents.node(store, name))
        if found is None:
            raise HTTPException(404, f"nothing is known of a node {name!r}")
        return _json(found)

    async def stream(self, request: Request) -> Response:
        """A line whenever something has changed."""
        none_expected(request)
        return self.streams.response(self.fleet)

    async def reconcile(self, request: Request) -> Response:
        """Put a request for a pass on record."""
        return JSONResponse(await ask(request, self.reader), 202)

    async def request(self, request: Request) -> Response:
        """What became of a request."""
        return JSONResponse(await asked(request.path_params["number"], self.reader))


def _events(store: Store, filters: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        return store.events(**filters)
    except StoreError as error:
        if filters.get("search") is None:
            raise
        raise HTTPException(422, f"search: this is not understood: {error}") from None


def _json(document: Any) -> Response:
    """JSON that also takes what only its text form says (a time within facts of a node)."""
    return Response(
        json.dumps(document, ensure_ascii=False, separators=(",", ":"), default=str),
        media_type="application/json",
    )
