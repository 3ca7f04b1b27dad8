"""Who may ask what: before any route is looked at. Pure ASGI, as streams must see that their reader has left."""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reconciler.api.errors import answer

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_SET_ONE = 'set one: token = "$env:NAME" or "$file:/path" in the table [http] of reconciler.toml'


def is_loopback(host: str) -> bool:
    """Whether an address or name can mean this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Access:
    """What is asked of callers. ``token`` is the secret itself; without one nothing but reading is possible."""

    host: str = "127.0.0.1"
    token: str = field(default="", repr=False)

    @property
    def is_open(self) -> bool:
        """Whether anybody who reaches the port may read: only this machine can."""
        return is_loopback(self.host)

    def refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """Why this call is not answered, as status and words; None where it is."""
        if self.is_open and not is_loopback(_name(headers.get("host", ""))):
            # A page of somebody else's whose name was made to mean this machine (DNS rebinding).
            return 421, "this server answers to localhost and 127.0.0.1 only, as the Host header says"
        if method not in ("GET", "HEAD"):
            if not self.token:
                return 403, f"asking for a pass needs a token, and none is configured; {_SET_ONE}"
            return self._wrong_token(headers)
        # The page itself says nothing about the fleet, and whether the process lives is no secret.
        if self.is_open or path in ("/", "/healthz") or path.startswith("/static/"):
            return None
        return self._wrong_token(headers)

    def _wrong_token(self, headers: Headers) -> tuple[int, str] | None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode()):
            return None
        return 401, "show the token: Authorization: Bearer TOKEN"


def _name(host: str) -> str:
    """The host of a Host header: ``127.0.0.1:9180``, ``[::1]:9180``, ``localhost``."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


class Guard:
    """Refuses what Access refuses; every answer carries the headers that keep a page to itself."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One call."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refused = self.access.refusal(scope["method"], scope["path"], Headers(scope=scope))
        app = self.app if refused is None else answer(*refused)
        await app(scope, receive, guarded)
