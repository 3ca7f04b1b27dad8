"""The door to the providers, and the only importer of the HTTP client.

aiohttp resolves, connects, speaks TLS and keeps idle connections; the bytes of an exchange
are parsed here with httptools, in the very call that delivers them, so that a stream's chunk
wakes no task. What that is worth stands in docs/decisions.
"""

import asyncio
import functools
import ipaddress
import socket
import ssl
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import aiohttp
import httptools
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from sidecar.addresses import AddressRefused, check_ip, literal

_KEEPALIVE_SECONDS = 20.0
# What may lie here unread before the provider is told to wait, and how long its headers may be.
_HIGH_WATER_BYTES = 2**18
_MAX_HEAD_BYTES = 2**17
_MAX_URLS = 1000
_INTERIM = range(100, 200)
_SWITCHING = 101
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_PLAIN = ("", "identity")
_PACKED = ("gzip", "x-gzip", "deflate")
Take = Callable[[bytes], bool]


class UpstreamError(Exception):
    """The exchange broke; `sent` tells whether the provider may have seen the request."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class Reply(Protocol):
    """An answer whose headers have come."""

    status: int
    headers: Mapping[str, str]

    async def read(self, limit: int) -> bytes:
        """The whole body, at most `limit` bytes. Raises UpstreamError."""
        ...

    async def pump(self, take: Take) -> bool:
        """Hand over what comes as it comes, until `take` says enough (False) or a clean end (True).

        `take` is called from the event loop, outside any task. Raises UpstreamError, or what `take` raised.
        """
        ...

    def close(self) -> None:
        """Done with it; an unfinished body closes the connection."""
        ...


class Upstream(Protocol):
    """Sends one request. `on_sent` is called when a connection is there and it leaves."""

    async def send(
        self, url: str, headers: Mapping[str, str], body: bytes | None, on_sent: Callable[[], None]
    ) -> Reply:
        """The answer's headers. Raises UpstreamError."""
        ...


class GuardedResolver(AbstractResolver):
    """Resolves names and refuses what must not be talked to.

    The connector connects to exactly the addresses returned here, so that a name which
    changes its mind between check and use gains nothing.
    """

    def __init__(self, allowed: Callable[[], tuple[str, ...]]) -> None:
        self._inner = ThreadedResolver()
        self._allowed = allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of a name; raises OSError (as the connector expects) for a refused one."""
        found = await self._inner.resolve(host, port, family)
        try:
            for entry in found:
                check_ip(ipaddress.ip_address(entry["host"].partition("%")[0]), self._allowed())
        except AddressRefused as refused:
            raise OSError(None, f"{host} resolves to a refused address: {refused}") from None
        return found

    async def close(self) -> None:
        """Nothing is held."""
        await self._inner.close()


class Exchange(asyncio.Protocol):
    """One connection to a provider, and what is under way on it.

    The upper half is what aiohttp's pool asks of a connection; the lower half is called by httptools.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._closing: asyncio.Future[None] | None = None
        self._lost = False
        self.busy = False
        self._clear()

    def _clear(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.complete = False
        self.should_close = False
        self.error: UpstreamError | None = None
        self._head_done = self._until_close = self._interim = self._paused = False
        self._head_bytes = self._size = 0
        self._limit: int | None = None
        self._parts: list[bytes] = []
        self._unpack: Any = None
        self._packed = False
        self._take: Take | None = None
        self._waiter: asyncio.Future[bool] | None = None

    # -- for the pool ---------------------------------------------------------------------

    @property
    def closed(self) -> asyncio.Future[None] | None:
        """Done when the connection is gone; None when it is gone already."""
        if self._closing is None and not self._lost:
            self._closing = self._loop.create_future()
        return self._closing

    def is_connected(self) -> bool:
        """Whether another request may be written."""
        return self.transport is not None and not self.transport.is_closing()

    def close(self) -> None:
        """Close after what was written."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self.transport is not None:
            self.transport.abort()

    # -- for a reply ----------------------------------------------------------------------

    async def ask(self, request: bytes) -> None:
        """Write a request and wait for the headers of its answer. Raises UpstreamError."""
        self._clear()
        self.busy = True
        if self.transport is None or not self.is_connected():
            raise UpstreamError("the connection was closed before an answer", sent=True)
        self.transport.write(request)
        await self._wait()

    async def read(self, limit: int) -> bytes:
        """The whole body."""
        self._limit = limit
        if not self.complete and self.error is None:
            self._resume()
            await self._wait()
        if self.error is not None:
            raise self.error
        if self._size > limit:
            raise _too_long(limit)
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    async def pump(self, take: Take) -> bool:
        """See Reply."""
        if self._parts:
            held, self._parts, self._size = b"".join(self._parts), [], 0
            if take(held):
                return False
        if self.complete:
            return True
        if self.error is not None:
            raise self.error
        self._take = take
        self._resume()
        try:
            return await self._wait()
        finally:
            self._take = None

    def reusable(self) -> bool:
        """Whether the exchange is over and the connection fit for another."""
        if not self.complete or self.should_close or self.transport is None:
            return False
        return not self.transport.get_write_buffer_size()

    async def _wait(self) -> bool:
        self._waiter = self._loop.create_future()
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def _wake(self, *, over: bool) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(over)

    def _wake_at_end(self) -> None:
        if self.complete:
            self._wake(over=True)

    def _fail(self, error: Exception) -> None:
        """End what is under way; the connection is of no further use."""
        self.should_close = True
        if not self.complete and self.error is None:
            self.error = error if isinstance(error, UpstreamError) else None
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)
        self.close()

    def _resume(self) -> None:
        if self._paused and self.transport is not None:
            self._paused = False
            self.transport.resume_reading()

    # -- from the event loop -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ready."""
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Parse, then hand over at once all that came together."""
        if not self.busy or self.complete:
            # Nobody asked for anything: such a connection is not used again.
            self.should_close = True
            self.close()
            return
        if not self._head_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.should_close = True
            if not self.complete:
                if self._parts and self._take is not None:
                    self._hand_over()
                ours = error.__context__
                text = f"the answer is no HTTP: {describe(error)}"
                self._fail(ours if isinstance(ours, UpstreamError) else UpstreamError(text, sent=True))
                return
        if not self._head_done and self._head_bytes > _MAX_HEAD_BYTES:
            self._fail(UpstreamError("the headers of the answer are too long", sent=True))
        elif self._parts:
            self._hand_over()
        else:
            self._wake_at_end()

    def _hand_over(self) -> None:
        take = self._take
        if take is None:
            # Nobody streams: a reader waits for the end, or will come for it.
            if self.complete:
                self._wake_at_end()
            elif self._limit is not None:
                if self._size > self._limit:
                    self._fail(_too_long(self._limit))
            elif self._size > _HIGH_WATER_BYTES and self.transport is not None:
                self._paused = True
                self.transport.pause_reading()
            return
        held = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts, self._size = [], 0
        try:
            enough = take(held)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to the task that waits
            self._fail(error)
            return
        if enough:
            self._take = None
            self._wake(over=False)
        else:
            self._wake_at_end()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of the connection is the end of a body only where nothing else marks it."""
        self._lost = True
        self.should_close = True
        if self.busy and not self.complete and self.error is None:
            if self._head_done and self._until_close and exc is None:
                self._finish()
            elif not self._head_done:
                text = describe(exc) if exc else "the connection was closed before an answer"
                self._fail(UpstreamError(text, sent=True))
            else:
                text = describe(exc) if exc else "the connection was closed in the middle"
                self._fail(UpstreamError(f"the answer broke off: {text}", sent=True))
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)
        self.transport = None

    def _finish(self) -> None:
        try:
            self.on_message_complete()
        except UpstreamError as error:
            self._fail(error)
            return
        self._wake_at_end()

    # -- from httptools ------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header by its lower-case name; a repeated one is joined as HTTP says."""
        if self._head_done:
            return
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def on_headers_complete(self) -> None:
        """The answer begins, unless it is an interim one."""
        status = self._parser.get_status_code()
        if status == _SWITCHING:
            raise UpstreamError("the answer switches to another protocol", sent=True)
        if status in _INTERIM:
            self._interim = True
            self.headers = {}
            return
        self.status = status
        self._head_done = True
        headers = self.headers
        self.should_close = not self._parser.should_keep_alive()
        self._until_close = "content-length" not in headers and not headers.get(
            "transfer-encoding", ""
        ).lower().endswith("chunked")
        packed = headers.get("content-encoding", "").strip().lower()
        if packed in _PACKED:
            self._unpack = zlib.decompressobj(_GZIP_OR_ZLIB)
        elif packed not in _PLAIN:
            raise UpstreamError(
                f"the answer is encoded as {packed[:40]!r}, which was not asked for", sent=True
            )
        self._wake(over=False)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._unpack is not None:
            self._packed = True
            try:
                body = self._unpack.decompress(body)
            except zlib.error as error:
                raise UpstreamError(f"the answer broke off: {describe(error)}", sent=True) from None
            if not body:
                return
        self._parts.append(body)
        self._size += len(body)

    def on_message_complete(self) -> None:
        """The answer is whole, unless it was an interim one."""
        if self._interim:
            self._interim = False
            return
        if self._packed and not self._unpack.eof:
            raise UpstreamError("the answer broke off: its compressed body is cut", sent=True)
        self.complete = True


class PooledReply:
    """A Reply on a pooled connection."""

    __slots__ = ("_connection", "_exchange", "headers", "pump", "read", "status")

    def __init__(self, connection: aiohttp.connector.Connection, exchange: Exchange) -> None:
        self._connection = connection
        self._exchange = exchange
        self.status = exchange.status
        self.headers: Mapping[str, str] = exchange.headers
        self.pump = exchange.pump
        self.read = exchange.read

    def close(self) -> None:
        """Release a finished exchange for reuse, or cut an unfinished one."""
        exchange = self._exchange
        reusable = exchange.reusable()
        exchange.busy = False
        if reusable:
            self._connection.release()
        else:
            self._connection.close()


class _Pool(aiohttp.TCPConnector):
    """aiohttp's connector, making our connections instead of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, **options: Any) -> None:
        super().__init__(**options)
        self._factory = functools.partial(Exchange, loop)  # type: ignore[arg-type, assignment]

    def in_use(self) -> int:
        """Connections in use now; aiohttp offers no public count."""
        return len(self._acquired)


class AiohttpUpstream:
    """The shared client: no cookies, no redirects, no proxies, no limit but ours."""

    def __init__(self, allowed: Callable[[], tuple[str, ...]] = tuple) -> None:
        self._allowed = allowed
        self._loop = asyncio.get_running_loop()
        self._pool = _Pool(
            self._loop,
            limit=0,
            resolver=GuardedResolver(allowed),
            keepalive_timeout=_KEEPALIVE_SECONDS,
            ssl=ssl.create_default_context(),
        )
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None)
        self._known: dict[str, tuple[aiohttp.ClientRequest, str]] = {}

    def open_connections(self) -> int:
        """Connections in use now, for tests and metrics."""
        return self._pool.in_use()

    async def send(
        self, url: str, headers: Mapping[str, str], body: bytes | None, on_sent: Callable[[], None]
    ) -> Reply:
        """Send, and wait for the headers of the answer."""
        try:
            where, line = self._where(url)
            request = _request(line, headers, body)
            connection = await self._pool.connect(where, [], self._timeout)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError(describe(error), sent=False) from error
        exchange: Exchange = connection.protocol  # type: ignore[assignment]
        try:
            on_sent()
            await exchange.ask(request)
        except BaseException:
            exchange.busy = False
            connection.close()
            raise
        return PooledReply(connection, exchange)

    def _where(self, url: str) -> tuple[aiohttp.ClientRequest, str]:
        """What the pool connects to, and the beginning of a request, both kept.

        A literal address never meets the resolver, so it is checked here.
        """
        known = self._known.get(url)
        if known is None:
            parsed = URL(url, encoded=True)
            address = literal(parsed.host or "")
            if address is not None:
                try:
                    check_ip(address, self._allowed())
                except AddressRefused as refused:
                    raise OSError(None, str(refused)) from None
            target = parsed.raw_path_qs
            if any(letter <= " " for letter in target):
                raise ValueError("the address contains a space or a control character")
            line = f"{target} HTTP/1.1\r\nHost: {parsed.host_port_subcomponent}\r\n"
            if len(self._known) > _MAX_URLS:  # query strings come from callers
                self._known.clear()
            known = self._known[url] = (aiohttp.ClientRequest("POST", parsed, loop=self._loop), line)
        return known

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.close()


def _request(line: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
    """A request's bytes. Raises ValueError for a header that would become two."""
    text = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if text.count("\n") != len(headers) or text.count("\r") != len(headers) or "\0" in text:
        raise ValueError("a header contains a line end or a NUL")
    if body is None:
        return f"GET {line}{text}\r\n".encode("latin-1")
    return f"POST {line}{text}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body


def _too_long(limit: int) -> UpstreamError:
    return UpstreamError(f"the answer is longer than {limit} bytes", sent=True)


def describe(error: BaseException) -> str:
    """A client error as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]
