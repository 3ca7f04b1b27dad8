"""How a client fared lately: the share of 429 and the mean time of an answer, over a window that moves."""

from collections.abc import Callable

import httpx
import pytest

from sidecar import fake
from sidecar.fake import default_script
from sidecar.records import Recent, RecentCalls
from tests.sidecar.harness import CHAT, Providers, SidecarProcess, backend


def test_shares_and_means_are_of_the_last_minutes() -> None:
    recent = Recent(minutes=15)
    assert recent.of("a", 0.0) == RecentCalls(0, None, None)
    recent.add("a", 30.0, 2.0, limited=False, answered=True)
    recent.add("a", 60.0, 4.0, limited=False, answered=True)
    recent.add("a", 61.0, 0.01, limited=True, answered=False)
    recent.add("a", 62.0, 9.0, limited=False, answered=False)
    recent.add("b", 62.0, 0.01, limited=True, answered=False)
    assert recent.of("a", 100.0) == RecentCalls(4, 0.25, 3.0)
    assert recent.of("b", 100.0) == RecentCalls(1, 1.0, None)
    assert recent.of("a", 900.0) == RecentCalls(3, 1 / 3, 4.0)
    assert recent.of("a", 960.0) == RecentCalls(0, None, None)


def test_it_forgets_clients_that_fell_silent_and_keeps_a_row_per_minute() -> None:
    recent = Recent(minutes=15)
    for second in range(7200):
        recent.add("a", float(second), 0.1, limited=False, answered=True)
    assert len(recent._rows["a"]) == 15
    recent.of("a", 1e6)
    assert recent._rows == {}


def test_a_client_is_shown_with_what_it_met(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    limited, good = providers.new(lambda _seen: fake.error(429)), providers.new(default_script)
    process = sidecar([backend("limited", limited.url, priority=9), backend("good", good.url)])
    made = process.admin("POST", "/clients", {"name": "architect"}).json()
    assert made["recent"] == {
        "window_seconds": 900,
        "attempts": 0,
        "rate_429": None,
        "response_seconds": None,
    }
    headers = {"authorization": f"Bearer {made['key']}"}
    answer = httpx.post(process.url + "/v1/chat/completions", json=CHAT, headers=headers, timeout=60)
    assert answer.status_code == 200
    (shown,) = process.admin("GET", "/clients").json()["clients"]
    recent = shown["recent"]
    refused = len(limited.seen) if hasattr(limited, "seen") else None
    assert recent["attempts"] in {1, 2}
    assert recent["rate_429"] == pytest.approx((recent["attempts"] - 1) / recent["attempts"])
    assert refused is None or recent["attempts"] == refused + 1
    assert 0 < recent["response_seconds"] < 60
