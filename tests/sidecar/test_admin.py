"""The admin API as an operator uses it, and its document fuzzed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from sidecar import fake
from sidecar.fake import Script, Seen
from tests.sidecar.harness import (
    ADMIN,
    CHAT,
    KEY,
    MAPPING,
    ROOT,
    Providers,
    SidecarProcess,
    backend,
    wait_for,
)


def test_backends_are_made_shown_changed_and_deleted(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    first, second = providers.new(), providers.new()
    process = sidecar()
    made: dict[str, Any] = {
        "name": "My GLM",
        "api_base_url": first.url,
        "api_key": KEY,
        "model_mappings": MAPPING,
    }
    assert httpx.get(process.url + "/health/ready").status_code == 503
    shown = process.admin("POST", "/backends", made).json()
    assert (shown["id"], shown["api_key"], shown["rpm_limit"]) == ("my-glm", "sk-pro...c3d4", 40)
    assert httpx.get(process.url + "/health/ready").json() == {"status": "ok", "reasons": {}}
    shown_again = {**made, "api_key": shown["api_key"], "priority": 3}
    assert process.admin("PUT", "/backends/my-glm", shown_again).json()["priority"] == 3
    httpx.post(process.url + "/v1/chat/completions", json=CHAT)
    assert first.posts[0].headers["authorization"] == f"Bearer {KEY}", "a mask never overwrites the key"
    moved = process.admin("PUT", "/backends/my-glm", {**shown_again, "api_base_url": second.url})
    assert (moved.status_code, moved.json()["error"]["field"]) == (409, "api_key")
    assert process.admin("PUT", "/backends/my-glm", {**made, "api_base_url": second.url}).status_code == 200
    assert process.admin("POST", "/backends/my-glm/test").json()["key_ok"] is True
    assert second.seen[-1].path == "/v1/models"
    assert process.admin("DELETE", "/backends/my-glm").json() == {"deleted": True}
    assert process.admin("GET", "/backends/my-glm").status_code == 404
    assert process.admin("GET", "/stats/total").json()["total_requests"] == 1, (
        "what it cost stays in the books"
    )


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"api_base_url": "http://169.254.169.254/v1"}, 409, "api_base_url"), ({"api_base_url": "ftp://x"}, 422, "api_base_url"),
    ({"rpm_limit": 0}, 422, "rpm_limit"), ({"rpm_limit": "40"}, 422, "rpm_limit"), ({"pool": "third"}, 422, "pool"),
    ({"typo": 1}, 422, "typo"), ({"model_mappings": {"gpt": {}}}, 422, "model_mappings.gpt.native_id"),
]  # fmt: skip


def test_errors_name_the_field(sidecar: Callable[..., SidecarProcess]) -> None:
    process = sidecar()
    for change, status, field in WRONG:
        answer = process.admin(
            "POST", "/backends", {"name": "x", "api_base_url": "http://127.0.0.1/v1", **change}
        )
        assert (answer.status_code, answer.json()["error"]["field"]) == (status, field)


def test_settings_apply_at_once_and_the_environment_wins(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    process = sidecar([backend("a", providers.new().url)], SIDECAR_QUEUE_MAX="7")
    assert process.admin("GET", "/config/queue_max_depth").json()["origin"] == "environment"
    assert process.admin("PUT", "/config/queue_max_depth", {"value": 9}).status_code == 409
    assert process.admin("PUT", "/config/max_body_bytes", {"value": 1024}).json()["value"] == 1024
    big = {**CHAT, "padding": "x" * 2000}
    assert httpx.post(process.url + "/v1/chat/completions", json=big).status_code == 413
    assert process.admin("PUT", "/config/max_body_bytes", {"value": -1}).status_code == 409
    process.stop()
    process.start()
    assert process.admin("GET", "/config/max_body_bytes").json() == {
        "key": "max_body_bytes", "value": 1024, "origin": "database", "variable": "SIDECAR_MAX_BODY_BYTES",
    }  # fmt: skip
    assert process.admin("DELETE", "/config/max_body_bytes").json()["origin"] == "default"
    assert httpx.post(process.url + "/v1/chat/completions", json=big).status_code == 200


def test_the_backends_file_is_reloaded_and_a_wrong_edit_keeps_the_last_good_ones(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    first, second = providers.new(), providers.new()
    process = sidecar([backend("a", first.url)], SIDECAR_ROUTER_REFRESH_SECONDS="0.1")
    assert process.admin("PUT", "/backends/a", {"name": "x", "api_base_url": first.url}).status_code == 409
    process.declare([backend("a", first.url), backend("b", second.url, rpm_limit="many")])
    problem = wait_for(
        lambda: httpx.get(process.url + "/health/ready").json()["reasons"].get("backends_file"), "the error"
    )
    assert "backend 2 (b): rpm_limit" in problem
    assert httpx.post(process.url + "/v1/chat/completions", json=CHAT).status_code == 200
    process.declare([backend("b", second.url)])
    wait_for(
        lambda: [b["id"] for b in process.admin("GET", "/backends").json()["backends"]] == ["b"],
        "the new file",
    )
    assert httpx.post(process.url + "/v1/chat/completions", json=CHAT).status_code == 200
    assert (len(first.posts), len(second.posts)) == (1, 1)


def test_v1_is_taken_over(providers: Providers, sidecar: Callable[..., SidecarProcess]) -> None:
    provider = providers.new()
    process = sidecar(SIDECAR_UPSTREAM=provider.url, SIDECAR_API_KEY=KEY)
    answer = httpx.post(process.url + "/v1/chat/completions", json={**CHAT, "model": "native-model"})
    assert answer.json()["model"] == "native-model"
    assert provider.posts[0].json()["model"] == "native-model"
    assert provider.posts[0].headers["authorization"] == f"Bearer {KEY}"


def test_a_quarantine_lasts_until_the_key_changes_or_a_test_succeeds(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    def choose(seen: Seen) -> Script:
        return (
            fake.default_script(seen)
            if seen.headers["authorization"].endswith("good-key")
            else fake.error(401)
        )

    provider = providers.new(choose)
    process = sidecar()
    made = {
        "id": "a",
        "name": "a",
        "api_base_url": provider.url,
        "api_key": "bad-key",
        "model_mappings": MAPPING,
    }
    process.admin("POST", "/backends", made)
    assert httpx.post(process.url + "/v1/chat/completions", json=CHAT).status_code == 503
    assert process.admin("GET", "/backends/a").json()["status"] == "error"
    assert httpx.post(process.url + "/v1/chat/completions", json=CHAT).status_code == 503
    assert len(provider.posts) == 1
    wait_for(lambda: process.admin("GET", "/stats/cooldown").json()["rows"], "the record")
    process.stop()
    process.start()
    assert process.admin("GET", "/backends/a").json()["status"] == "error", "it survives a restart"
    assert process.admin("POST", "/backends/a/test").json()["key_ok"] is False
    process.admin("PUT", "/backends/a", {**made, "api_key": "good-key"})
    assert httpx.post(process.url + "/v1/chat/completions", json=CHAT).status_code == 200


def test_probes_are_authenticated_never_clear_a_cooldown_and_404_is_not_down(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    provider = providers.new(lambda seen: fake.error(404 if seen.method == "GET" else 429))
    process = sidecar([backend("a", provider.url)], SIDECAR_HEALTH_CHECK_INTERVAL_SECONDS="0.1")
    wait_for(lambda: len(provider.seen) >= 8, "some probes")
    assert provider.seen[0].headers["authorization"] == f"Bearer {KEY}"
    assert process.admin("GET", "/backends/a").json()["status"] == "healthy"
    httpx.post(process.url + "/v1/chat/completions", json=CHAT)
    provider.choose = fake.default_script
    count = len(provider.seen)
    wait_for(lambda: len(provider.seen) > count + 5, "good probes")
    assert process.admin("GET", "/backends/a").json()["status"] == "cooling"


def test_metrics_have_bounded_labels(providers: Providers, sidecar: Callable[..., SidecarProcess]) -> None:
    process = sidecar([backend("a", providers.new().url)])
    httpx.post(process.url + "/v1/chat/completions", json=CHAT)
    text = httpx.get(process.metrics_url + "/metrics").text
    for name in (
        'sidecar_pool_providers{pool="primary",type="healthy"} 1.0', "sidecar_cooldown_active 0.0", "sidecar_emergency_count 0.0",
        "sidecar_db_size_bytes", "sidecar_wal_size_bytes", "sidecar_requests_total", "sidecar_attempts_total", "sidecar_tokens_total",
        "sidecar_cost_total", "sidecar_uptime_seconds", "sidecar_overhead_seconds_bucket", "sidecar_queue_depth", "sidecar_ttft_seconds",
        "sidecar_queue_wait_seconds", "sidecar_attempts_per_request_bucket", "sidecar_latency_seconds_bucket", "sidecar_errors_total",
    ):  # fmt: skip
        assert name in text
    assert httpx.get(process.metrics_url + "/").status_code == 404
    for number in range(5):
        httpx.post(process.url + "/v1/chat/completions", json={**CHAT, "model": f"made-up-{number}"})
    assert "made-up" not in httpx.get(process.metrics_url + "/metrics").text


def test_schemathesis_finds_nothing(
    providers: Providers, sidecar: Callable[..., SidecarProcess], tmp_path: Path
) -> None:
    provider = providers.new()
    process = sidecar(SIDECAR_HEALTH_CHECK_INTERVAL_SECONDS="86400")
    for name in ("a", "b"):
        made = {
            "id": name,
            "name": name,
            "api_base_url": provider.url,
            "api_key": KEY,
            "model_mappings": MAPPING,
        }
        assert process.admin("POST", "/backends", made).status_code == 201
    document = httpx.get(process.url + "/api/admin/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    command = Path(sys.executable).with_name("schemathesis")
    ended = subprocess.run(
        [
            command, "run", f"{process.url}/api/admin/openapi.json", "--header", f"Authorization: Bearer {ADMIN}",
            "--phases", "examples,coverage,fuzzing", "--max-examples", "25", "--seed", "7",
            "--exclude-path-regex", "/test$", "--no-color", "--request-timeout", "60",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    assert KEY not in ended.stdout
    assert '"level":"error"' not in process.log.read_text()
    assert json.dumps(document).count('"$ref"') > 20
    assert ROOT.exists()
