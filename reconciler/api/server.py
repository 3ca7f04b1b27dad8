"""The server in a thread of the daemon's process. Its libraries are imported when it starts, not before."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from reconciler.api.state import DaemonState
from reconciler.kinds.base import seconds
from reconciler.model import ConfigurationError, Problem
from reconciler.settings import FILE, HttpSettings, Settings, referred

if TYPE_CHECKING:
    import uvicorn

    from reconciler.api.stream import Streams

_log = logging.getLogger(__name__)
_GRACE = 3
"""Seconds that answers under way are given at the end; streams are told to end at once."""

_SHORTEST = 16
"""What is shorter is guessed."""


class Server:
    """Answers over HTTP until it is stopped. One that was stopped is not started again."""

    def __init__(self, settings: Settings, state: Callable[[], DaemonState]) -> None:
        """``state`` is called from the server's thread whenever somebody looks: it has to be quick and safe there."""
        self.settings, self.state = settings, state
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._server: uvicorn.Server | None = None
        self._streams: Streams | None = None

    @property
    def url(self) -> str:
        """Where it answers, once it was started."""
        host, port = self._socket.getsockname()[:2] if self._socket else ("", 0)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Listen, and answer from another thread. Raises ConfigurationError where that cannot be."""
        import uvicorn

        from reconciler.api.stream import Streams

        token = _token(self.settings.http)
        self._socket = _listening(self.settings.http)
        self._streams = Streams()
        config = uvicorn.Config(
            self._app(token, self._streams), log_config=None, access_log=False, lifespan="off", ws="none",
            server_header=False, timeout_keep_alive=75, timeout_graceful_shutdown=_GRACE, limit_concurrency=256,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End; answers under way are given a little time, within ``timeout`` seconds. Harmless where it never began."""
        if self._streams:
            self._streams.close()
        if self._server:
            self._server.should_exit = True
        if self._thread:
            self._thread.join(timeout)
            if self._thread.is_alive():
                _log.warning("the HTTP server did not end within %g s; it is left behind", timeout)
        if self._socket:
            self._socket.close()

    def _app(self, token: str, streams: Streams) -> Callable[..., object]:
        from reconciler.api.app import create_app
        from reconciler.api.fleet import Fleet
        from reconciler.api.guard import Access
        from reconciler.api.reader import Reader

        self._reader = Reader(self.settings.db)
        fleet = Fleet(self._reader, self.state, seconds(self.settings.interval))
        return create_app(fleet, Access(self.settings.http.host, token), streams)

    def _run(self) -> None:
        assert self._server  # noqa: S101 - for the type checker
        assert self._socket  # noqa: S101
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        except Exception:  # noqa: BLE001 - whatever happens here, passes go on
            _log.exception("the HTTP server ended; passes go on without it")
        finally:
            self._reader.close()


def _token(http: HttpSettings) -> str:
    """The token itself, empty where none is configured. Raises ConfigurationError."""
    from reconciler.api.guard import is_loopback

    if http.token is None:
        if not is_loopback(http.host):
            message = f"[http] host: {http.host} can be reached from elsewhere, so a token is needed"
            hint = 'add token = "$env:NAME" or "$file:/path", or take host = "127.0.0.1"'
            raise ConfigurationError([Problem(message, hint=hint)])
        return ""
    try:
        token = referred(http.token)
    except LookupError as error:
        raise ConfigurationError([Problem(f"[http] token: {error}")]) from None
    if len(token) < _SHORTEST:
        raise ConfigurationError(
            [Problem(f"[http] token: {http.token} is shorter than {_SHORTEST} characters")]
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError([Problem(f"[http] token: {http.token} has characters that no token has")])
    return token


def _listening(http: HttpSettings) -> socket.socket:
    """A socket that listens. Raises ConfigurationError where the address is taken, or not ours."""
    try:
        family, kind, number, _name, address = socket.getaddrinfo(
            http.host, http.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, number)
    except OSError as error:
        raise _not_listening(http, error) from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        with suppress(OSError):
            found.close()
        raise _not_listening(http, error) from None
    return found


def _not_listening(http: HttpSettings, error: OSError) -> ConfigurationError:
    message = f"[http] cannot listen on {http.host} port {http.port}: {error.strerror or error}"
    hint = f"is another one running? name another port, or say enabled = false, in the table [http] of {FILE}"
    return ConfigurationError([Problem(message, hint=hint)])
