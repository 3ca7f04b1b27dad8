"""ASGI small change: types, header allow-lists in both directions, plain answers."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, Protocol

from sidecar.model import Api, Backend

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

# Allow-lists, because the next header that leaks a credential is not known yet.
_TO_PROVIDER = (
    b"accept",
    b"anthropic-beta",
    b"anthropic-version",
    b"idempotency-key",
    b"openai-beta",
    b"traceparent",
    b"user-agent",
)
_TO_CALLER = frozenset(
    {"retry-after", "x-should-retry", "request-id", "openai-processing-ms", "openai-version", "openai-model"}
)
_RATE_PREFIXES = ("x-ratelimit-", "anthropic-ratelimit-")
ANTHROPIC_VERSION = "2023-06-01"


def provider_headers(headers: Mapping[bytes, bytes], backend: Backend) -> dict[str, str]:
    """What goes upstream: what is allowed of the caller's, and the backend's own key."""
    out = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    for name in _TO_PROVIDER:
        value = headers.get(name)
        if value is not None:
            out[name.decode()] = value.decode("latin-1")
    out.setdefault("user-agent", "sidecar")
    out.update(key_headers(backend))
    if backend.api is Api.ANTHROPIC:
        out.setdefault("anthropic-version", ANTHROPIC_VERSION)
    return out


def key_headers(backend: Backend) -> dict[str, str]:
    """The backend's key as its API wants it; none for a local model without one."""
    if not backend.api_key:
        return {}
    if backend.api is Api.ANTHROPIC and backend.metadata.get("auth") != "bearer":
        return {"x-api-key": backend.api_key}
    return {"authorization": f"Bearer {backend.api_key}"}


def caller_headers(headers: Mapping[str, str]) -> list[Header]:
    """What of a provider's headers reaches the caller."""
    out: list[Header] = []
    for name, value in headers.items():
        lower = name.lower()
        if lower in _TO_CALLER or lower.startswith(_RATE_PREFIXES):
            out.append((lower.encode("latin-1"), value.encode("latin-1", "replace")))
    return out


class Caller(Protocol):
    """A caller's connection, as far as ASGI does not show it."""

    on_lost: Callable[[], None] | None
    whole: bool

    def chunk(self, data: bytes) -> None:
        """Write a part of an answer whose headers have been sent without a length."""
        ...

    def slow(self) -> bool:
        """Whether what was written still waits for the caller to take it."""
        ...


class Cork:
    """A transport that can hold back an answer's headers until its first body goes with them.

    Two writes are two system calls and two wake-ups of the caller: a tenth of a request's cost.
    It is also where the data plane meets the caller's connection itself (see Caller).
    """

    __slots__ = ("_held", "_transport", "hold", "is_closing", "on_lost", "paused", "whole")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held = b""
        self.hold = False
        self.paused = False
        self.whole = False
        self.on_lost: Callable[[], None] | None = None
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Write, or keep for the next write."""
        if self.hold:
            self._held += data
        elif self._held:
            held, self._held = self._held, b""
            self._transport.write(held + data)
        elif data:
            self._transport.write(data)

    def chunk(self, data: bytes) -> None:
        """One chunk of a chunked answer."""
        if not self.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def slow(self) -> bool:
        """Whether the write buffer is full."""
        return self.paused

    def close(self) -> None:
        """Nothing held is lost."""
        if self._held:
            self.hold = False
            self.write(b"")
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        """Everything else is the transport's own."""
        return getattr(self._transport, name)


async def send_body(
    send: Send,
    status: int,
    body: bytes,
    headers: Iterable[Header] = (),
    content_type: bytes = b"application/json",
) -> None:
    """A whole answer at once."""
    start = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
