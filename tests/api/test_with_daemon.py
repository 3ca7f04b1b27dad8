"""The server in its daemon: real passes, asked for over HTTP, and an end that open pages do not hold up."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.local.test_daemon import SLOW, Service, service
from tests.local.test_demo import until

__all__ = ["service"]
TOKEN = "a-token-of-some-length"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def here(service: Service) -> Iterator[httpx.Client]:
    """A running daemon over the demo's fleet, before or in its first pass."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    http = {"RECONCILER_HTTP__ENABLED": "true", "RECONCILER_HTTP__PORT": str(port)}
    service.start(**http, RECONCILER_HTTP__TOKEN="$env:FLEET_TOKEN", FLEET_TOKEN=TOKEN)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)

    def answers() -> bool:
        try:
            return client.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    assert until(answers, SLOW), service.log()
    yield client
    client.close()


def test_a_pass_asked_for_over_http_is_made_and_followed(service: Service, here: httpx.Client) -> None:
    """Unready before the first pass, ready after it; then a repair by request, seen live, and counted."""
    if here.get("/readyz").status_code == 503:
        assert here.get("/readyz").json()["reasons"][0]["code"] == "NoPass"
    service.idle()
    assert until(lambda: here.get("/readyz").status_code == 200, SLOW), here.get("/readyz").text
    before = here.get("/api/status").json()
    assert before["score"] == 100
    assert before["daemon"]["next_pass"] > before["last_pass"]["started"]
    service.wrapper().unlink()
    asked = here.post("/api/reconcile", json={"target": "node-3/wrapper"}, headers=BEARER)
    assert asked.status_code == 202
    see = asked.json()["see"]
    assert until(lambda: here.get(see).json()["state"] == "done", SLOW), here.get(see).text
    done = here.get(see).json()
    assert (done["exit_code"], done["problem"], service.wrapper().exists()) == (0, "", True)
    found = here.get("/api/status").json()
    assert found["last_pass"]["run_id"] == done["run_id"]
    newest = [row for row in found["episodes"] if row["resource"] == "node-3/wrapper/task-wrapper"]
    assert [(row["state"], row["attempts"]) for row in newest] == [("fixed", 1), ("fixed", 1)]
    assert 'reconciler_reconcile_total{result="as_desired"} 2.0' in here.get("/metrics").text
    assert here.get("/api/nodes/node-3").json()["score"] == 100
    assert service.stop() == 0


def test_an_open_page_does_not_hold_up_the_end(service: Service, here: httpx.Client) -> None:
    """The stream ends, the process ends in order, the port is free."""
    service.idle()
    ended, heard = threading.Event(), threading.Event()

    def listen() -> None:
        with httpx.stream("GET", here.base_url.join("/api/stream"), timeout=SLOW, trust_env=False) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    json.loads(line[6:])
                    heard.set()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    assert heard.wait(SLOW)
    began = time.monotonic()
    assert service.stop() == 0
    assert ended.wait(SLOW)
    assert time.monotonic() - began < 30
    with pytest.raises(httpx.TransportError):
        here.get("/healthz")


def test_a_mistake_in_the_desired_state_is_why_it_is_not_ready(service: Service, here: httpx.Client) -> None:
    """Said with its place, and over when it is mended."""
    service.idle()
    state = service.directory / "desired_state/fleet.yml"
    good = state.read_text()
    state.write_text(good.replace("wrappers:", "wrapers:"))
    number = here.post("/api/reconcile", headers=BEARER).json()["id"]
    assert until(lambda: here.get(f"/api/requests/{number}").json()["state"] == "done", SLOW)
    assert "did you mean 'wrappers'" in here.get(f"/api/requests/{number}").json()["problem"]
    (reason,) = here.get("/readyz").json()["reasons"]
    assert "wrapers" in reason["message"]
    state.write_text(good)
    here.post("/api/reconcile", headers=BEARER)
    assert until(lambda: here.get("/readyz").status_code == 200, SLOW), here.get("/readyz").text
    assert service.stop() == 0
