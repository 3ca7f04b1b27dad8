"""The command, as a newcomer and an operator type it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from sidecar.settings import HotSettings, Settings, SettingsError, load, variable
from tests.sidecar.harness import ADMIN, ROOT, Providers, SidecarProcess, backend


def run(process: SidecarProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**process.env, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "sidecar", *arguments], env=env, cwd=process.folder, capture_output=True, text=True, timeout=240, check=False
    )  # fmt: skip


def test_it_starts_with_no_configuration_and_says_where_the_dashboard_is(tmp_path: Path) -> None:
    process = SidecarProcess(tmp_path)
    for name in [n for n in process.env if n.startswith("SIDECAR_") and not n.endswith("PORT")]:
        del process.env[name]
    process.start()
    try:
        said = process.log.read_text()
        assert "/dashboard" in said
        token = tmp_path / "data" / "admin_token"
        assert str(Path("data") / "admin_token") in said
        assert token.stat().st_mode & 0o777 == 0o600
        assert token.read_text().strip() not in said
        assert httpx.get(process.url + "/dashboard").status_code == 200
        assert httpx.get(process.url + "/health").json()["status"] == "ok"
        headers = {"authorization": f"Bearer {token.read_text().strip()}"}
        assert httpx.get(process.url + "/api/admin/backends", headers=headers).json() == {"backends": []}
        answer = httpx.post(process.url + "/v1/chat/completions", json={"model": "m"})
        assert (answer.status_code, "add a backend" in answer.json()["error"]["message"]) == (404, True)
    finally:
        process.stop()


def test_check_says_what_can_be_reached_and_why_not(providers: Providers, tmp_path: Path) -> None:
    good = backend("good", providers.new().url)
    process = SidecarProcess(tmp_path, [good, backend("dead", "http://127.0.0.1:9/v1")])
    ended = run(process, "check")
    assert ended.returncode == 1
    assert "ok" in next(line for line in ended.stdout.splitlines() if "good" in line)
    assert "Cannot connect" in ended.stdout
    process.declare([good])
    assert run(process, "check").returncode == 0
    assert "not asked" in run(process, "check", "--offline").stdout
    process.declare([{**good, "api_key_env": "NOT_SET"}])
    wrong = run(process, "check")
    assert (wrong.returncode, "NOT_SET" in wrong.stderr) == (1, True)


def test_selftest_prints_a_scorecard_and_touches_no_real_provider(
    providers: Providers, tmp_path: Path
) -> None:
    provider = providers.new()
    process = SidecarProcess(
        tmp_path, [backend("a", provider.url), backend("b", provider.url, pool="fallback")]
    )
    ended = run(process, "selftest")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "63 of 63 passed" in ended.stdout
    assert provider.seen == []


def test_a_wrong_setting_is_one_line_naming_the_variable(tmp_path: Path) -> None:
    process = SidecarProcess(tmp_path)
    process.env["SIDECAR_QUEUE_TIMEOUT"] = "soon"
    ended = run(process)
    assert ended.returncode == 1
    assert "SIDECAR_QUEUE_TIMEOUT" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_taken_port_is_named(sidecar: Callable[..., SidecarProcess]) -> None:
    process = sidecar()
    process.env["SIDECAR_PORT"] = process.url.rpartition(":")[2]
    ended = run(process)
    assert (ended.returncode, "SIDECAR_PORT" in ended.stderr) == (1, True)


def test_environment_over_database_over_defaults() -> None:
    assert load({}).queue_max_depth == 500
    assert load({}, {"queue_max_depth": 3}).queue_max_depth == 3
    assert load({"SIDECAR_QUEUE_MAX": "4"}, {"queue_max_depth": 3}).queue_max_depth == 4
    with pytest.raises(SettingsError, match="SIDECAR_PORT"):
        load({"SIDECAR_PORT": "99999"})
    with pytest.raises(SettingsError) as error:
        load({"SIDECAR_PRIVATE_NETWORKS": "10.0.0.0/99"})
    assert "SIDECAR_PRIVATE_NETWORKS" in str(error.value)


def test_every_setting_and_command_is_documented() -> None:
    text = (ROOT / "docs" / "sidecar.md").read_text()
    for field in Settings.model_fields:
        assert f"`{variable(field)}`" in text, field
    for command in ("sidecar check", "sidecar selftest", "sidecar keys rotate"):
        assert command in text
    assert set(HotSettings.model_fields) <= set(Settings.model_fields)
    assert ADMIN not in text
    assert os.sep
