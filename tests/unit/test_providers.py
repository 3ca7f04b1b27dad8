"""What the sidecar's word means: an outage, none, or that nobody knows. Its answers come over real HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from reconciler import providers
from reconciler.desired.load import Desired
from reconciler.kinds.heartbeat import probe
from reconciler.model import ConfigurationError
from reconciler.providers import NotKnownError, Providers, judged
from reconciler.settings import SidecarSettings, load
from tests.unit.support import Fleet

CLIENT = {
    "id": "c",
    "name": "architect",
    "recent": {"attempts": 4, "rate_429": 0.5, "response_seconds": 1.25},
}


def backends(**states: str) -> dict[str, Any]:
    """The admin API's list of backends."""
    return {"backends": [{"id": name, "status": state, "pool": "primary"} for name, state in states.items()]}


@pytest.mark.parametrize(
    ("states", "outage"),
    [
        ({"a": "cooling", "b": "cooling"}, True),
        ({"a": "cooling"}, True),
        ({"a": "cooling", "b": "healthy"}, False),
        ({"a": "healthy"}, False),
        ({"a": "cooling", "b": "disabled"}, True),
        ({"a": "cooling", "b": "error"}, True),  # refused for its key: it could not help
        ({"a": "error"}, False),  # a wrong key is no outage
        ({"a": "disabled"}, False),
        ({}, False),
        ({"a": "cooling", "b": "resting"}, False),  # a word of a later version
    ],
)
def test_an_outage_is_when_all_that_take_part_are_cooling(states: dict[str, str], *, outage: bool) -> None:
    """And never for lack of backends."""
    found = judged(backends(**states), {"clients": [CLIENT]})
    assert found.outage is outage
    assert found.clients == {"architect": {"rate_429": 0.5, "seconds": 1.25, "attempts": 4}}


@pytest.mark.parametrize(
    "answer", [{}, [], None, {"backends": [{"id": "a"}]}, {"backends": "x"}, {"backends": [1]}]
)
def test_a_strange_answer_is_not_known(answer: Any) -> None:
    """Of whatever version it is."""
    with pytest.raises(NotKnownError):
        judged(answer, {"clients": []})


@contextmanager
def admin_api(*answers: tuple[int, Any], token: str = "secret", wait: float = 0.0) -> Iterator[str]:
    """Something on a port of this machine that gives these answers in turn."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(wait)
            allowed = self.headers.get("authorization") == f"Bearer {token}"
            status, body = left.pop(0) if allowed else (401, {"error": {"code": "unauthorized"}})
            text = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_words: Any) -> None:
            """Nothing on standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture
def desired(fleet: Fleet) -> Desired:
    """One agent, and something that has no use for providers."""
    fleet.write(
        "heartbeats:\n  - {agent: architect, nodes: node-1, class: development, workspace: ~/w}\n"
        "wrappers:\n  - {name: w, nodes: node-1, dest: ~/w.txt, content: x}\n"
    )
    return fleet.load()


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")


def settings(url: str, **given: Any) -> SidecarSettings:
    """The table [sidecar]."""
    return SidecarSettings(**{"url": url, "token": "$env:TOKEN", **given})


def test_an_outage_reaches_the_nodes_own_comparison(desired: Desired) -> None:
    """Only of the kind that has a use for it; and what is declared stays the same declaration."""
    with admin_api((200, backends(a="cooling")), (200, {"clients": [CLIENT]})) as url:
        found = providers.asked(settings(url), desired)
    told = providers.overlaid(desired, found)
    agent, wrapper = (
        next(r for r in told.resources.values() if r.id.kind == k) for k in ("heartbeat", "wrapper")
    )
    assert agent.args["provider"] == {
        "outage": True,
        "client": {"rate_429": 0.5, "seconds": 1.25, "attempts": 4},
    }
    assert agent.digest == desired.resources[agent.id].digest
    assert wrapper == desired.resources[wrapper.id]
    late = {"outage": True, "healthy": False, "beat": "late", "stuck": [{"id": "T", "stage": "recover"}]}
    assert probe.changes({"beat": "fresh", "tasks": "moving"}, late) == []
    notice = providers.standing(settings("http://x"), found)["ProviderOutage"]
    assert notice is not None
    assert "every language-model provider rests: a" in notice.detail


@pytest.mark.parametrize(
    ("answers", "given", "why"),
    [
        ([(500, {})], {}, "/backends answered 500"),
        ([(200, b"<html>")], {}, "something else than JSON"),
        ([(200, backends(a="cooling")), (404, {})], {}, "/clients answered 404"),
        ([(200, backends(a="cooling"))], {"token": None}, "/backends answered 401"),
        ([(200, backends(a="cooling"))], {"token": "$env:NOWHERE"}, "$env:NOWHERE holds no token"),
        ([(200, backends(a="cooling"))], {"token": "$file:/nowhere"}, "cannot read the token in /nowhere"),
        ([(200, b"[" * (5 << 20))], {}, "its answer does not end"),
        ([(302, {})], {}, "answered 302"),
    ],
)
def test_what_cannot_be_asked_is_not_known(
    desired: Desired, answers: list[tuple[int, Any]], given: dict[str, Any], why: str
) -> None:
    """And never an outage: nothing is told, and a late agent is late."""
    with admin_api(*answers) as url:
        found = providers.asked(settings(url, **given), desired)
    assert found is not None
    assert found.outage is None
    assert why in found.detail
    assert providers.standing(settings("http://x"), found) == {}
    (agent,) = (r for r in providers.overlaid(desired, found).resources.values() if r.id.kind == "heartbeat")
    assert agent.args["provider"] == {"outage": None, "client": None}


def test_a_sidecar_that_is_not_there_or_hangs_is_waited_for_a_short_time(desired: Desired) -> None:
    """A pass is not delayed by it."""
    found = providers.asked(settings("http://127.0.0.1:1"), desired)
    assert found is not None
    assert found.outage is None
    with admin_api((200, backends(a="cooling")), wait=5.0) as url:
        began = time.monotonic()
        found = providers.asked(settings(url, timeout="0.3s"), desired)
        assert time.monotonic() - began < 4
    assert found is not None
    assert found.outage is None


def test_nobody_is_asked_where_nobody_has_a_use_for_it(desired: Desired) -> None:
    """Or where none is configured: then an outage that was told once is over, too."""
    none = replace(desired, resources={k: r for k, r in desired.resources.items() if k.kind == "wrapper"})
    assert providers.asked(settings("http://127.0.0.1:1"), none) is None
    assert providers.asked(SidecarSettings(), desired) is None
    assert providers.overlaid(desired, None) is desired
    assert providers.standing(SidecarSettings(), None) == {"ProviderOutage": None}
    assert providers.standing(settings("http://x"), Providers(outage=False)) == {"ProviderOutage": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[sidecar]\nurl = "here"', "[sidecar] (or RECONCILER_SIDECAR__URL): url: write the base URL"),
        ('[sidecar]\ntoken = "abc"', "token: refer to it with $env:NAME or $file:/path"),
        ("[sidecar]\nport = 1", "[sidecar]: unknown key 'port'"),
    ],
)
def test_mistakes_in_the_settings_are_named(text: str, message: str) -> None:
    """Without repeating what may be a secret."""
    Path("reconciler.toml").write_text(text)
    with pytest.raises(ConfigurationError) as raised:
        load()
    assert message in str(raised.value)
    assert "abc" not in str(raised.value)
