"""What must not come in, must not go out, and must not be read anywhere."""

import re
import socket
import time
from collections.abc import Callable

import httpx
import pytest

from sidecar import fake
from sidecar.addresses import URL_PATTERN, AddressRefused, base_of, check_url
from sidecar.fake import Script, Seen
from tests.sidecar.harness import ADMIN, CHAT, KEY, MAPPING, Providers, SidecarProcess, backend

REFUSED = [
    "ftp://h/v1", "http://u:p@h/v1", "http://h/v1?x=1", "http://h/v1#x", "http://", "http://h:99999/", "h/v1",
    "http://169.254.169.254/v1", "http://[fe80::1]/v1", "http://[::ffff:169.254.169.254]/v1", "http://2852039166/v1",
    "http://0xa9fea9fe/v1", "http://0251.0376.0251.0376/v1", "http://0.0.0.0/v1", "http://0/v1", "http://[::]/v1",
    "http://10.0.0.1/v1", "http://192.168.1.1/v1", "http://172.16.0.1/v1", "http://100.64.0.1/v1", "http://[fd00::1]/v1",
    "http://167772161/v1", "http://[::ffff:a00:1]/v1", "http://224.0.0.1/", "http://metadata.google.internal/",
    "http://[64:ff9b::a9fe:a9fe]/", "http://[2002:a9fe:a9fe::1]/",
]  # fmt: skip


@pytest.mark.parametrize("url", REFUSED)
def test_refused_addresses(url: str) -> None:
    with pytest.raises(AddressRefused):
        check_url(url)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]/v1", "https://api.example.com"]
)
def test_allowed_addresses(url: str) -> None:
    check_url(url)
    assert re.match(URL_PATTERN, url)


def test_private_ranges_by_allow_list() -> None:
    check_url("http://10.1.2.3/v1", ("10.0.0.0/8",))
    with pytest.raises(AddressRefused, match="SIDECAR_PRIVATE_NETWORKS"):
        check_url("http://10.1.2.3/v1", ("192.168.0.0/16",))


@pytest.mark.parametrize(
    ("url", "anthropic", "base"),
    [
        ("https://h", False, "https://h/v1"), ("https://h/", False, "https://h/v1"), ("https://h/api/v4", False, "https://h/api/v4"),
        ("https://h", True, "https://h/v1"), ("https://h/v1", True, "https://h/v1"), ("https://h/anthropic", True, "https://h/anthropic/v1"),
    ],
)  # fmt: skip
def test_the_base_address_follows_the_sdks(url: str, *, anthropic: bool, base: str) -> None:
    assert base_of(url, anthropic=anthropic) == base


def test_headers_pass_by_allow_lists_only(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    provider = providers.new()
    process = sidecar([backend("a", provider.url)])
    sent = {
        "authorization": "Bearer caller-secret", "x-api-key": "caller-secret", "cookie": "a=b", "x-forwarded-for": "1.2.3.4",
        "proxy-authorization": "x", "te": "trailers", "openai-organization": "org-x", "openai-beta": "v2", "traceparent": "00-1-1-01",
    }  # fmt: skip
    assert httpx.post(process.url + "/v1/chat/completions", json=CHAT, headers=sent).status_code == 200
    got = provider.posts[0].headers
    assert got["authorization"] == f"Bearer {KEY}"
    assert (got["openai-beta"], got["traceparent"]) == ("v2", "00-1-1-01")
    assert not {
        "cookie",
        "x-api-key",
        "x-forwarded-for",
        "proxy-authorization",
        "te",
        "openai-organization",
    } & set(got)
    assert got["host"].startswith("127.0.0.1:")


def test_keys_appear_nowhere(providers: Providers, sidecar: Callable[..., SidecarProcess]) -> None:
    def leak(seen: Seen) -> Script:
        if seen.method == "GET":
            return fake.default_script(seen)
        status = 401 if b'"leak401"' in seen.body else 400
        return fake.error(status, f"Incorrect API key provided: {KEY}. Bearer {KEY}")

    provider = providers.new(leak)
    process = sidecar(LOG_LEVEL="debug")
    made = {"id": "a", "name": "a", "api_base_url": provider.url, "api_key": KEY, "model_mappings": MAPPING}
    texts = [process.admin("POST", "/backends", made).text]
    created = process.admin("POST", "/clients", {"name": "c"}).json()
    for user in ("plain", "leak401"):
        answer = httpx.post(
            process.url + "/v1/chat/completions", json={**CHAT, "user": user}, headers={"x-sidecar-debug": "1", "authorization": f"Bearer {created['key']}"},
        )  # fmt: skip
        texts += [answer.text, str(answer.headers)]
    assert "redacted" in texts[1]
    for path in (
        "/backends",
        "/backends/a",
        "/clients",
        "/config",
        "/stats/hourly",
        "/stats/cooldown",
        "/openapi.json",
    ):
        texts.append(process.admin("GET", path).text)
    texts.append(process.admin("POST", "/backends/a/test").text)
    texts.append(httpx.get(process.metrics_url + "/metrics").text)
    texts.append(httpx.get(process.url + "/health/ready").text)
    process.stop()
    texts.append(process.log.read_text())
    everything = "\n".join(texts)
    for secret in (KEY, created["key"], ADMIN):
        assert secret not in everything
    assert process.log.stat().st_size > 100


def test_client_keys_budgets_and_model_lists(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    provider = providers.new()
    process = sidecar([backend("a", provider.url)])
    rich = process.admin("POST", "/clients", {"name": "rich"}).json()
    poor = process.admin("POST", "/clients", {"name": "poor", "budget": 0.000015}).json()
    other = process.admin("POST", "/clients", {"name": "other", "models": ["x"]}).json()

    def ask(key: str, header: str = "authorization") -> httpx.Response:
        value = f"Bearer {key}" if header == "authorization" else key
        return httpx.post(process.url + "/v1/chat/completions", json=CHAT, headers={header: value})

    assert ask(rich["key"]).status_code == 200
    assert ask(rich["key"], "x-api-key").status_code == 200
    assert ask("sk-sc-wrong-key").status_code == 401
    assert ask(poor["key"]).status_code == 200
    spent = ask(poor["key"])
    assert (spent.status_code, spent.json()["error"]["code"]) == (402, "budget_exceeded")
    refused = ask(other["key"])
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "model")
    process.stop()
    process.start()
    assert ask(poor["key"]).status_code == 402, "a budget survives a restart"
    assert process.admin("DELETE", f"/clients/{rich['id']}").status_code == 200
    assert ask(rich["key"]).status_code == 401
    rows = process.admin("GET", "/stats/hourly").json()["rows"]
    assert {row["client_id"]: row["request_count"] for row in rows} == {rich["id"]: 2, poor["id"]: 1}


def test_the_admin_token_guards_reads_and_writes(sidecar: Callable[..., SidecarProcess]) -> None:
    process = sidecar()
    for method, path in (
        ("GET", "/backends"),
        ("GET", "/stats/total"),
        ("POST", "/clients"),
        ("DELETE", "/config"),
    ):
        for headers in ({}, {"authorization": "Bearer wrong"}):
            assert httpx.request(method, f"{process.url}/api/admin{path}", headers=headers).status_code == 401


def test_paths_methods_and_pages_of_others(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    process = sidecar([backend("a", providers.new().url)])
    url = process.url
    for path in ("/", "/v1", "/v1/files", "/v1/chat/completions/x", "/metrics", "/v1/../api", "/favicon.ico"):
        assert httpx.get(url + path).status_code == 404
    assert httpx.get(url + "/v1/chat/completions").status_code == 405
    assert (
        httpx.post(
            url + "/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}
        ).status_code
        == 415
    )
    assert (
        httpx.post(
            url + "/v1/chat/completions", json=CHAT, headers={"origin": "http://evil.example"}
        ).status_code
        == 403
    )
    assert "access-control-allow-origin" not in httpx.options(url + "/v1/models").headers


def test_bad_bodies_are_named(sidecar: Callable[..., SidecarProcess]) -> None:
    process = sidecar()
    cases = {
        b"{": None,
        b"[]": None,
        b"{}": "model",
        b'{"model":1}': "model",
        b'{"model":"gpt","stream":"yes"}': "stream",
    }
    for body, param in cases.items():
        answer = httpx.post(process.url + "/v1/chat/completions", content=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), body


def raw(process: SidecarProcess, *parts: bytes, wait: float = 0.0) -> bytes:
    host, port = process.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        for part in parts:
            try:
                sock.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(wait)
        answer = b""
        try:
            while data := sock.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
        return answer


def test_limits_on_bodies_headers_and_slow_callers(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    process = sidecar(
        [backend("a", providers.new().url)],
        SIDECAR_MAX_BODY_BYTES="2000",
        SIDECAR_MAX_HEADER_BYTES="4096",
        SIDECAR_HEADER_TIMEOUT_SECONDS="0.5",
        SIDECAR_BODY_TIMEOUT_SECONDS="0.5",
    )
    post = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
    assert raw(process, post + b"content-length: 5000\r\n\r\n").startswith(b"HTTP/1.1 413")
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    assert raw(process, post + b"transfer-encoding: chunked\r\n\r\n", chunk * 4).startswith(b"HTTP/1.1 413")
    assert raw(process, post + b"x: " + b"y" * 9000).startswith(b"HTTP/1.1 431")
    both = raw(process, post + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")
    assert both.startswith(b"HTTP/1.1 400")
    assert b"connection: close" in both
    assert raw(process, post) == b"", "headers that never end are cut off"
    assert raw(process, post + b"content-length: 50\r\n\r\n{").startswith(b"HTTP/1.1 408")
    assert httpx.post(process.url + "/v1/chat/completions", json=CHAT).status_code == 200


def test_a_caller_who_does_not_read_is_cut_off(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    words = tuple("x" * 60_000 for _ in range(300))
    provider = providers.new(
        lambda s: fake.chat_stream(words) if s.method == "POST" else fake.default_script(s)
    )
    process = sidecar([backend("a", provider.url)], SIDECAR_CALLER_WRITE_TIMEOUT_SECONDS="0.5")
    host, port = process.url.removeprefix("http://").split(":")
    body = b'{"model":"gpt","stream":true}'
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        deadline = time.monotonic() + 60
        while provider.open and time.monotonic() < deadline:
            time.sleep(0.05)
    shown = process.admin("GET", "/backends/a").json()
    assert (shown["in_flight"], shown["status"]) == (0, "healthy")
    assert process.admin("GET", "/stats/total").json()["total_errors"] == 0, (
        "a slow caller is not the backend's fault"
    )


def test_binding_wider_without_client_keys_is_refused(sidecar: Callable[..., SidecarProcess]) -> None:
    process = sidecar()
    process.stop()
    process.env["SIDECAR_HOST"] = "0.0.0.0"
    with pytest.raises(AssertionError, match="SIDECAR_ALLOW_OPEN"):
        process.start()
