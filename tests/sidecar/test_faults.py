"""The fault catalogue over real sockets: the whole answer or an explicit error, and no request too many."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from sidecar import fake
from sidecar.fake import FakeProvider, Script, Seen
from sidecar.faults import CATALOGUE, Expect, Fault
from tests.sidecar.harness import ADMIN, CHAT, Providers, SidecarProcess, backend, sse, wait_for

CASES = [
    pytest.param(fault, streaming, id=f"{fault.name}-{'stream' if streaming else 'whole'}")
    for fault in CATALOGUE
    for streaming in fault.modes
]


class Arena:
    """One sidecar, a faulty backend first and a healthy one after it."""

    def __init__(self, process: SidecarProcess, first: FakeProvider, second: FakeProvider) -> None:
        self.process, self.first, self.second = process, first, second

    def reset(self) -> None:
        for name in ("first", "second"):
            assert self.process.admin("POST", f"/backends/{name}/clear").status_code == 200
        self.first.seen.clear()
        self.second.seen.clear()


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    providers = Providers()
    first, second = providers.new(), providers.new()
    process = SidecarProcess(
        tmp_path_factory.mktemp("faults"),
        [
            backend("first", first.url, priority=0, timeout_seconds=1.5),
            backend("second", second.url, priority=1),
        ],
        SIDECAR_FIRST_TOKEN_TIMEOUT_SECONDS="1.5",
        SIDECAR_IDLE_TIMEOUT_SECONDS="1.5",
        SIDECAR_HEALTH_CHECK_INTERVAL_SECONDS="86400",
    ).start()
    yield Arena(process, first, second)
    process.stop()
    providers.close()


def ask(url: str, *, streaming: bool) -> tuple[httpx.Response, str, bool]:
    """Status, text, and whether the connection ended abnormally."""
    text = b""
    with httpx.stream(
        "POST", url + "/v1/chat/completions", json={**CHAT, "stream": streaming}, timeout=60
    ) as answer:
        try:
            for part in answer.iter_bytes():
                text += part
        except httpx.RemoteProtocolError:
            return answer, text.decode(), True
    return answer, text.decode(), False


def content(text: str, *, streaming: bool) -> str:
    if not streaming:
        found = json.loads(text)
        assert found["model"] == "gpt"
        return str(found["choices"][0]["message"]["content"])
    events = sse(text)
    assert events[-1] == "[DONE]"
    assert all(event["model"] == "gpt" and event.get("usage") is None for event in events[:-1])  # type: ignore[index, union-attr]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events[:-1])  # type: ignore[index]


@pytest.mark.parametrize(("fault", "streaming"), CASES)
def test_fault(arena: Arena, fault: Fault, *, streaming: bool) -> None:
    arena.reset()
    script = fault.script(streaming)
    arena.first.choose = lambda _seen: script
    answer, text, broke = ask(arena.process.url, streaming=streaming)
    posts = (len(arena.first.posts), len(arena.second.posts))
    if fault.expect is Expect.NEXT:
        assert (answer.status_code, broke, posts) == (200, False, (1, 1))
        assert content(text, streaming=streaming) in ("hello", "Hello")
    elif fault.expect is Expect.WHOLE:
        assert (answer.status_code, broke, posts) == (200, False, (1, 0))
        assert content(text, streaming=streaming) in ("hello", "Hello", "héllo wörld 你好")
    elif fault.expect is Expect.RETURNED:
        assert (answer.status_code, posts) == (script.status, (1, 0))
        assert text == script.body[0].decode()
    else:
        assert (answer.status_code, broke, posts) == (200, True, (1, 0))
        assert sse(text)[-1]["error"]["message"]  # type: ignore[index]
        assert "[DONE]" not in text


STATES = [
    (429, "cooling"), (402, "cooling"), (401, "error"), (403, "error"), (500, "healthy"), (400, "healthy"), (404, "healthy"), (422, "healthy"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "state"), STATES)
def test_what_a_status_does_to_the_backend(arena: Arena, status: int, state: str) -> None:
    arena.reset()
    arena.first.choose = lambda _seen: fake.error(status)
    ask(arena.process.url, streaming=False)
    shown = arena.process.admin("GET", "/backends/first").json()
    assert shown["status"] == state
    if status == 402:
        assert shown["cooldown_seconds"] > 3000, "a spent plan rests long"
    ask(arena.process.url, streaming=False)
    expected = 1 if state != "healthy" else 2
    assert len(arena.first.posts) == expected, "a resting backend is left alone"


def test_repeated_failures_eject(arena: Arena) -> None:
    arena.reset()
    arena.first.choose = lambda _seen: fake.error(500)
    for _ in range(8):
        assert ask(arena.process.url, streaming=False)[0].status_code == 200
    assert len(arena.first.posts) == 5, "after five failures it is left alone"
    assert arena.process.admin("GET", "/backends/first").json()["status"] == "cooling"


def test_when_everybody_fails_the_caller_gets_503_with_retry_after_and_no_backend_is_asked_twice(
    arena: Arena,
) -> None:
    arena.reset()
    arena.first.choose = arena.second.choose = lambda _seen: fake.error(429, "slow", x_should_retry="false")
    try:
        answer, text, _ = ask(arena.process.url, streaming=False)
    finally:
        arena.second.choose = fake.default_script
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["x-should-retry"] == "false"
    assert json.loads(text)["error"]["code"] == "rate_limited"
    assert (len(arena.first.posts), len(arena.second.posts)) == (1, 1)


def test_anthropic_streams_are_made_explicit_in_their_own_dialect(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    provider = providers.new(lambda _seen: fake.message_stream(whole=False, gap=0.01))
    process = sidecar([backend("a", provider.url.removesuffix("/v1"), api="anthropic-messages")])
    body = {"model": "gpt", "max_tokens": 9, "stream": True, "messages": []}
    text = b""
    broke = False
    with httpx.stream("POST", process.url + "/v1/messages?beta=true", json=body, timeout=60) as answer:
        try:
            for part in answer.iter_bytes():
                text += part
        except httpx.RemoteProtocolError:
            broke = True
    assert broke
    assert b"event: error\n" in text
    assert sse(text.decode())[-1]["error"]["type"] == "api_error"  # type: ignore[index]
    seen = provider.posts[0]
    assert seen.path == "/v1/messages?beta=true"
    assert seen.headers["x-api-key"].startswith("sk-provider")
    assert "authorization" not in seen.headers


def test_n_concurrent_429s_raise_the_cooldown_once_and_the_ladder_survives_a_restart(
    providers: Providers, tmp_path: Path
) -> None:
    def choose(_seen: Seen) -> Script:
        return Script(status=429, body=(b"{}",), wait=0.5)

    provider = providers.new(choose)
    process = SidecarProcess(
        tmp_path, [backend("a", provider.url)], SIDECAR_HEALTH_CHECK_INTERVAL_SECONDS="86400"
    ).start()
    try:
        providers.call(_many(process.url, 20))
        assert len(provider.posts) == 20
        shown = process.admin("GET", "/backends/a").json()
        assert (shown["cooldown_level"], shown["status"]) == (1, "cooling")
        assert 20 < shown["cooldown_seconds"] <= 30
        wait_for(lambda: process.admin("GET", "/stats/cooldown").json()["rows"], "the cooldown's record")
        process.stop()
        process.start()
        again = process.admin("GET", "/backends/a").json()
        assert again["cooldown_level"] == 1
        assert 0 < again["cooldown_seconds"] <= shown["cooldown_seconds"]
        assert again["starts_last_minute"] == 20, "the rate window survives too"
    finally:
        process.stop()


async def _many(url: str, count: int) -> None:
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=count)) as client:
        await asyncio.gather(*(client.post(url + "/v1/chat/completions", json=CHAT) for _ in range(count)))


def test_rate_headers_reach_the_caller_and_demote(arena: Arena) -> None:
    arena.reset()
    whole = fake.chat()
    headers = {
        "x-ratelimit-limit-requests": "100",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "2s",
    }
    arena.first.choose = lambda _seen: Script(
        body=whole.body, headers={**headers, "set-cookie": "a=b", "server": "x"}
    )
    answer, _, _ = ask(arena.process.url, streaming=False)
    assert {name: answer.headers[name] for name in headers} == headers
    assert "set-cookie" not in answer.headers
    assert "server" not in answer.headers
    ask(arena.process.url, streaming=False)
    assert (len(arena.first.posts), len(arena.second.posts)) == (1, 1)


def test_the_trail_is_shown_on_request_only(arena: Arena) -> None:
    arena.reset()
    arena.first.choose = lambda _seen: fake.error(503)
    plain = httpx.post(arena.process.url + "/v1/chat/completions", json=CHAT)
    assert "x-sidecar-trail" not in plain.headers
    shown = httpx.post(
        arena.process.url + "/v1/chat/completions", json=CHAT, headers={"x-sidecar-debug": "1"}
    )
    assert shown.headers["x-sidecar-trail"] == "first: failed; answered by second"
    found = httpx.post(
        arena.process.url + "/api/admin/route/explain",
        json={"model": "gpt"},
        headers={"authorization": f"Bearer {ADMIN}"},
    ).json()
    assert (found["way"], found["order"]) == ("pool", ["first", "second"])
