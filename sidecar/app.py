"""`create_app`: routes, limits on what comes in, and what happens when a caller leaves."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from urllib.parse import urlsplit

import structlog

from sidecar import errors
from sidecar.errors import Refusal
from sidecar.model import ENDPOINTS, Api, Endpoint
from sidecar.payload import encode
from sidecar.proxy import Proxy
from sidecar.runtime import Runtime
from sidecar.settings import is_loopback
from sidecar.watchdog import Watchdog
from sidecar.wire import Cork, Header, Message, Receive, Scope, Send, send_body

log = structlog.get_logger("sidecar.app")
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_ID_BYTES = 8
_SECURITY: tuple[Header, ...] = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))


class CallerLeft(Exception):  # noqa: N818 - caught in this file
    """The caller closed the connection while sending."""


def create_app(runtime: Runtime, management: App) -> App:
    """The whole ASGI application: the data plane here, admin and dashboard behind `management`."""
    proxy: Proxy | None = None

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal proxy
        if scope["type"] == "lifespan":
            await _lifespan(runtime, receive, send)
            return
        if scope["type"] != "http":
            return
        path = scope["path"]
        endpoint = ENDPOINTS.get(path)
        if endpoint is not None:
            if proxy is None:
                proxy = runtime.proxy()
            await _DataPlane(runtime, proxy, endpoint, scope, receive, send).serve()
        elif path.startswith(("/api/admin", "/dashboard")):
            await management(scope, receive, send)
        else:
            await _small(runtime, scope, send)

    return app


async def _lifespan(runtime: Runtime, receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await runtime.start()
            await send({"type": "lifespan.startup.complete"})
        else:
            await runtime.stop()
            await send({"type": "lifespan.shutdown.complete"})
            return


class _DataPlane:
    """One request of a caller, from its headers to the end of the connection."""

    def __init__(
        self, runtime: Runtime, proxy: Proxy, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.runtime = runtime
        self.proxy = proxy
        self.endpoint = endpoint
        self.scope = scope
        self.receive = receive
        self._send = send
        self._cork: Cork = scope["sidecar.cork"]
        self._task: asyncio.Task[None] | None = None
        self.request_id = _new_id()
        self.done = False
        self.begun = False
        self.gone = False

    async def send(self, message: Message) -> None:
        """Remember how far the answer has got."""
        if message["type"] == "http.response.start":
            self.begun = True
            self._cork.hold = True
        else:
            self._cork.hold = False
            if not message.get("more_body"):
                self.done = True
        await self._send(message)

    async def serve(self) -> None:
        """Answer, or say why not; a caller who leaves cancels what is going on for him."""
        cork = self._cork
        try:
            headers = _joined(self.scope["headers"])
            _check_headers(self.scope, headers, open_access=self.runtime.access.open)
            body = await self._body(headers)
            self._task = asyncio.current_task()
            cork.on_lost = self._left
            await self.proxy.handle(
                self.endpoint, headers, self.scope["query_string"], self.request_id, self.send, cork, body
            )
        except Refusal as refusal:
            await self._refuse(refusal)
        except CallerLeft:
            return
        except asyncio.CancelledError:
            if not self.gone:
                raise
        finally:
            # A next request on the same connection may have begun, and be the one to tell.
            if cork.on_lost == self._left:
                cork.on_lost = None

    def _left(self) -> None:
        """The connection is gone: called by it, so that no task has to wait for that."""
        if not self.done and self._task is not None:
            self.gone = True
            self._task.cancel()

    async def _body(self, headers: dict[bytes, bytes]) -> bytes:
        hot = self.runtime.hot
        limit = hot.max_body_bytes
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        if self._cork.whole:
            # It has all come together, as nearly always: nothing is waited for, so nothing is timed.
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise CallerLeft
        else:
            message = await self._receive_within(hot.body_timeout_seconds)
        body: bytes = message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        if not message.get("more_body"):
            return body
        parts, size = [body], len(body)
        end = asyncio.get_running_loop().time() + hot.body_timeout_seconds
        while message.get("more_body"):
            message = await self._receive_within(end - asyncio.get_running_loop().time())
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise _too_large(limit)
        return b"".join(parts)

    async def _receive_within(self, seconds: float) -> Message:
        try:
            loop = asyncio.get_running_loop()
            with Watchdog(loop, loop.time() + seconds):
                message = await self.receive()
        except TimeoutError:
            raise Refusal(
                408, "body_timeout", "the body did not arrive in time", headers=((b"connection", b"close"),)
            ) from None
        if message["type"] == "http.disconnect":
            raise CallerLeft
        return message

    async def _refuse(self, refusal: Refusal) -> None:
        if self.begun:
            return
        shown = errors.body(refusal, self.endpoint.api, self.request_id)
        headers = [(b"x-request-id", self.request_id.encode()), *refusal.headers]
        wait = refusal.wait()
        if wait is not None:
            headers.append((b"retry-after", b"%d" % wait))
        await send_body(self.send, refusal.status, shown, headers)


def _ids() -> Iterator[str]:
    while True:
        random = secrets.token_bytes(_ID_BYTES * 256)
        for at in range(0, len(random), _ID_BYTES):
            yield "req_" + random[at : at + _ID_BYTES].hex()


# Asking the kernel for random bytes each time would cost more than the rest of an id.
_new_id = _ids().__next__


def _joined(raw: list[Header]) -> dict[bytes, bytes]:
    """Headers by lower-case name; a repeated one is joined as HTTP says."""
    headers: dict[bytes, bytes] = {}
    for name, value in raw:
        headers[name] = headers[name] + b", " + value if name in headers else value
    return headers


def _check_headers(scope: Scope, headers: dict[bytes, bytes], *, open_access: bool) -> None:
    if scope["method"] != "POST":
        raise Refusal(405, "method_not_allowed", "use POST", headers=((b"allow", b"POST"),))
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind and kind != b"application/json":
        # Browsers send text/plain to other origins without asking; nobody else does.
        raise Refusal(415, "wrong_content_type", "send Content-Type: application/json")
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise Refusal(415, "wrong_content_encoding", "send the body without Content-Encoding")
    origin = headers.get(b"origin")
    if open_access and origin is not None and not is_loopback(_host(origin)):
        raise Refusal(403, "foreign_origin", "a web page of another origin may not use this sidecar")


def _host(origin: bytes) -> str:
    try:
        return urlsplit(origin.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


def _too_large(limit: int) -> Refusal:
    text = f"the body is larger than {limit} bytes; SIDECAR_MAX_BODY_BYTES sets the limit"
    return Refusal(413, "body_too_large", text, headers=((b"connection", b"close"),))


async def _small(runtime: Runtime, scope: Scope, send: Send) -> None:
    """Health and the list of models; everything else is not here."""
    path, method = scope["path"], scope["method"]
    anthropic = any(name == b"anthropic-version" for name, _ in scope["headers"])
    try:
        if path not in ("/health", "/health/live", "/health/ready", "/v1/models") and not path.startswith(
            "/v1/models/"
        ):
            raise Refusal(404, "not_found", f"there is nothing at {path}")
        if method not in ("GET", "HEAD"):
            raise Refusal(405, "method_not_allowed", "use GET", headers=((b"allow", b"GET, HEAD"),))
        if path.startswith("/v1/"):
            runtime.access.identify(_joined(scope["headers"]))
            found = _models(runtime, path.removeprefix("/v1/models").strip("/"), anthropic=anthropic)
            await send_body(send, 200, found, _SECURITY)
            return
        wrong = runtime.readiness() if path == "/health/ready" else {}
        state = {"status": "not ready" if wrong else "ok", "reasons": wrong}
        await send_body(send, 503 if wrong else 200, encode(state), _SECURITY)
    except Refusal as refusal:
        body = errors.body(refusal, Api.ANTHROPIC if anthropic else Api.OPENAI, "")
        await send_body(send, refusal.status, body, refusal.headers)


def _models(runtime: Runtime, wanted: str, *, anthropic: bool) -> bytes:
    """The configured canonical models, or one of them."""
    shown: dict[str, dict[str, object]] = {}
    for lane in runtime.fleet.lanes.values():
        for name in lane.backend.model_mappings if lane.backend.enabled else ():
            if anthropic:
                shown[name] = {
                    "type": "model",
                    "id": name,
                    "display_name": name,
                    "created_at": "1970-01-01T00:00:00Z",
                }
            else:
                shown[name] = {"id": name, "object": "model", "created": 0, "owned_by": "sidecar"}
    if wanted:
        if wanted not in shown:
            raise Refusal(404, "model_not_found", f"the model {wanted!r} is not configured", "model")
        return encode(shown[wanted])
    data = [shown[name] for name in sorted(shown)]
    if anthropic:
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return encode({"data": data, "has_more": False, **ends})
    return encode({"object": "list", "data": data})
