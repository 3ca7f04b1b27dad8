"""The two listening ports on one event loop, slow and oversized callers cut off, and the drain."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sidecar.metrics import Metrics
from sidecar.runtime import Runtime
from sidecar.wire import Cork, Receive, Scope, Send, send_body

_INCOMPLETE = "ASGI callable returned without completing response."
_TOO_LARGE_BODY = b'{"error":{"message":"the request headers are too large","code":"headers_too_large"}}'
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(_TOO_LARGE_BODY), _TOO_LARGE_BODY)
)
_BACKLOG = 2048


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with two limits it lacks: the size of headers and the time they may take."""

    max_header_bytes = 65_536
    header_timeout = 15.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A caller must send whole headers before long."""
        super().connection_made(transport)
        self._cork = Cork(transport)
        self.transport = self._cork  # type: ignore[assignment]
        self._head_bytes = 0
        self._in_head = True
        self._cut: asyncio.TimerHandle | None = None
        self._wait_for_head()

    def _wait_for_head(self) -> None:
        if self._cut is None:
            self._cut = self.loop.call_later(self.header_timeout, self._give_up)

    def _give_up(self) -> None:
        self._cut = None
        if not self.transport.is_closing():
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Count what belongs to headers, then parse."""
        if self._in_head:
            if self._cut is None:
                self._wait_for_head()
            self._head_bytes += len(data)
            if self._head_bytes > self.max_header_bytes and b"\r\n\r\n" not in data[: self.max_header_bytes]:
                self.transport.write(_TOO_LARGE)
                self.transport.close()
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """The head is there: stop its clock."""
        self.scope["sidecar.cork"] = self._cork  # type: ignore[typeddict-unknown-key]
        self._in_head = False
        self._cork.whole = False
        self._head_bytes = 0
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next bytes begin another head."""
        self._in_head = True
        self._cork.whole = True
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The caller does not keep up."""
        self._cork.paused = True
        super().pause_writing()

    def resume_writing(self) -> None:
        """The caller has caught up."""
        self._cork.paused = False
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to cut, and whoever works for this caller may stop."""
        on_lost, self._cork.on_lost = self._cork.on_lost, None
        if on_lost is not None:
            on_lost()
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None
        super().connection_lost(exc)


class _Companion(uvicorn.Server):
    """A server that leaves signals to somebody else."""

    on_exit: Callable[[], None] = staticmethod(lambda: None)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Nothing is captured."""
        yield


class Server(_Companion):
    """A server that tells when it was asked to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle signals without raising them again afterwards: a drained stop is a success, exit 0."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or Ctrl-C: nothing new is begun, what runs may finish."""
        self.on_exit()
        super().handle_exit(sig, frame)


def _no_incomplete(record: logging.LogRecord) -> bool:
    # Ending a broken stream without its terminator is how we make the failure explicit.
    return record.getMessage() != _INCOMPLETE


def bind(host: str, port: int, what: str) -> socket.socket:
    """A listening socket. Raises OSError with the setting to change."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port} ({error.strerror}); set {what}") from None
    sock.listen(_BACKLOG)
    sock.set_inheritable(True)
    return sock


async def serve(
    runtime: Runtime,
    app: Any,
    main: socket.socket,
    metrics: socket.socket,
    on_ready: Callable[[], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until a signal (or `stop`, when given) ends it; the books are settled when this returns."""
    settings = runtime.settings
    protocol = type(
        "Protocol",
        (GuardedProtocol,),
        {"max_header_bytes": settings.max_header_bytes, "header_timeout": settings.header_timeout_seconds},
    )
    logging.getLogger("uvicorn.error").addFilter(_no_incomplete)
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_seconds) or 1,
        timeout_keep_alive=75,
        proxy_headers=False,
    )
    server = (Server if stop is None else _Companion)(config)
    server.on_exit = runtime.fleet.drain
    companion = _Companion(
        uvicorn.Config(
            metrics_app(runtime.metrics),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
        )
    )
    beside = asyncio.create_task(companion.serve(sockets=[metrics]))
    ready = asyncio.create_task(_announce(server, on_ready, stop))
    try:
        await server.serve(sockets=[main])
    finally:
        ready.cancel()
        companion.should_exit = True
        await beside


async def _announce(server: uvicorn.Server, on_ready: Callable[[], None], stop: asyncio.Event | None) -> None:
    while not server.started:  # noqa: ASYNC110 - uvicorn offers no event for it
        await asyncio.sleep(0.01)
    on_ready()
    if stop is not None:
        await stop.wait()
        server.should_exit = True


def metrics_app(metrics: Metrics) -> Any:
    """`GET /metrics`, and nothing else."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/metrics" and scope["method"] == "GET":
            await send_body(send, 200, metrics.text(), (), b"text/plain; version=0.0.4; charset=utf-8")
        else:
            await send_body(send, 404, b"only /metrics is here\n", (), b"text/plain")

    return app
