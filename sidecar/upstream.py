"""The door to the providers, and the only importer of the HTTP client.

aiohttp was chosen by measuring (see docs/decisions): its client costs about half the CPU
of httpx with the aiohttp transport for the same request.
"""

import ipaddress
import socket
import ssl
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Protocol

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from sidecar.addresses import AddressRefused, check_ip, literal

_KEEPALIVE_SECONDS = 20.0
_READ_BUFFER_BYTES = 2**16


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

    async def chunk(self) -> bytes:
        """What has come since, at least a byte; b"" at a clean end. Raises UpstreamError."""
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


class AiohttpReply:
    """A Reply on an aiohttp response."""

    __slots__ = ("_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    async def read(self, limit: int) -> bytes:
        """The whole body."""
        try:
            parts: list[bytes] = []
            size = 0
            content = self._response.content
            while part := await content.readany():
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise UpstreamError(f"the answer is longer than {limit} bytes", sent=True)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError(f"the answer broke off: {describe(error)}", sent=True) from error

    async def chunk(self) -> bytes:
        """The next bytes."""
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError(f"the stream broke off: {describe(error)}", sent=True) from error

    def close(self) -> None:
        """Release a finished exchange for reuse, or cut an unfinished one."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class AiohttpUpstream:
    """The shared client: no cookies, no redirects, no proxies, no limit but ours."""

    def __init__(self, allowed: Callable[[], tuple[str, ...]] = tuple) -> None:
        self._allowed = allowed
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_connected)
        trace.on_connection_create_end.append(_connected)
        self._connector = aiohttp.TCPConnector(
            limit=0,
            resolver=GuardedResolver(allowed),
            keepalive_timeout=_KEEPALIVE_SECONDS,
            ssl=ssl.create_default_context(),
        )
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None),
            trace_configs=[trace],
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            read_bufsize=_READ_BUFFER_BYTES,
        )
        self._urls: dict[str, URL] = {}

    def open_connections(self) -> int:
        """Connections in use now, for tests and metrics."""
        return len(self._connector._acquired)  # noqa: SLF001 - aiohttp offers no public count

    async def send(
        self, url: str, headers: Mapping[str, str], body: bytes | None, on_sent: Callable[[], None]
    ) -> Reply:
        """Send, and wait for the headers of the answer."""
        sent = False

        def note() -> None:
            nonlocal sent
            sent = True
            on_sent()

        try:
            response = await self._session._request(  # noqa: SLF001 - `request()` only wraps this in a context manager
                "GET" if body is None else "POST",
                self._url(url),
                headers=headers,
                data=body,
                allow_redirects=False,
                trace_request_ctx=note,
            )
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError(describe(error), sent=sent) from error
        return AiohttpReply(response)

    def _url(self, url: str) -> URL:
        """A parsed URL, kept; a literal address never meets the resolver, so it is checked here."""
        parsed = self._urls.get(url)
        if parsed is None:
            parsed = URL(url, encoded=True)
            address = literal(parsed.host or "")
            if address is not None:
                try:
                    check_ip(address, self._allowed())
                except AddressRefused as refused:
                    raise OSError(None, str(refused)) from None
            if len(self._urls) > 1000:  # noqa: PLR2004 - query strings come from callers
                self._urls.clear()
            self._urls[url] = parsed
        return parsed

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


async def _connected(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: Any) -> None:
    context.trace_request_ctx()


def describe(error: BaseException) -> str:
    """A client error as one short line."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the connection was closed before an answer"
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]
