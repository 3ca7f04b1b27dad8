"""Keys at rest: bound to their place, rotated while running, refused when they cannot be opened."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.keys import Keyring, KeyringError, Place, is_mask_of, load, mask, parse_key
from sidecar.model import Backend
from sidecar.store import Store, count_stale, read_backends, rotate_some, write_backend
from tests.sidecar.harness import CHAT, KEY, MAPPING, Providers, SidecarProcess

OLD, NEW = b"o" * 32, b"n" * 32
HERE = Place("backends", "a", "api_key")


@given(st.text())
def test_what_is_sealed_opens_in_its_place_only(text: str) -> None:
    ring = Keyring(OLD)
    blob = ring.seal(text, HERE)
    assert ring.open(blob, HERE) == text
    for other in (
        Place("backends", "b", "api_key"),
        Place("clients", "a", "api_key"),
        Place("backends", "a", "x"),
    ):
        with pytest.raises(KeyringError):
            ring.open(blob, other)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_changed_byte_is_noticed(at: int, change: int) -> None:
    ring = Keyring(OLD)
    blob = bytearray(ring.seal("secret", HERE))
    blob[at % len(blob)] ^= change
    with pytest.raises(KeyringError):
        ring.open(bytes(blob), HERE)


def test_a_decrypt_only_key_opens_and_the_primary_seals() -> None:
    blob = Keyring(OLD).seal("secret", HERE)
    ring = Keyring(NEW, [OLD])
    assert ring.open(blob, HERE) == "secret"
    assert not ring.current(blob)
    assert ring.current(ring.seal("secret", HERE))


def test_a_rotation_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.db")
    old, new = Keyring(OLD), Keyring(NEW, [OLD])
    for number in range(7):
        made = Backend(id=f"b{number}", name="x", api_base_url="http://h", api_key=f"key-{number}")
        store.run_now(lambda db, made=made: write_backend(db, old, made))
    assert store.run_now(lambda db: rotate_some(db, new, batch=3)) == 4
    assert store.run_now(lambda db: count_stale(db, new)) == 4
    while store.run_now(lambda db: rotate_some(db, new, batch=3)):
        pass
    found = store.run_now(lambda db: read_backends(db, Keyring(NEW)))
    assert [backend.api_key for backend in found] == [f"key-{number}" for number in range(7)]
    store.close()


def test_a_key_is_made_only_while_nothing_is_encrypted(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(KeyringError, match="--degraded"):
        load("", "", path, anything_encrypted=True)
    assert not path.exists()
    load("", "", path, anything_encrypted=False)
    assert path.stat().st_mode & 0o777 == 0o600
    assert re.fullmatch(r"[0-9a-f]{64}\n", path.read_text())


def test_a_wrong_key_is_named_by_place_and_never_by_value() -> None:
    with pytest.raises(KeyringError, match="SIDECAR_ENCRYPTION_KEY must be 64 hex") as error:
        parse_key("my-secret", "SIDECAR_ENCRYPTION_KEY")
    assert "my-secret" not in str(error.value)


def test_masks() -> None:
    assert mask(KEY) == "sk-pro...c3d4"
    assert mask("short") == "..."
    assert is_mask_of(mask(KEY), KEY)
    assert not is_mask_of(KEY, KEY)


def run(process: SidecarProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sidecar", *arguments], env=process.env, cwd=process.folder, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip


def test_rotation_is_online_and_survives_a_restart(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    provider = providers.new()
    process = sidecar(SIDECAR_ROUTER_REFRESH_SECONDS="0.2")
    made = {"id": "a", "name": "a", "api_base_url": provider.url, "api_key": KEY, "model_mappings": MAPPING}
    assert process.admin("POST", "/backends", made).status_code == 201
    raw = (process.folder / "data" / "sidecar.db").read_bytes() + (
        process.folder / "data" / "sidecar.db-wal"
    ).read_bytes()
    assert KEY.encode() not in raw
    ended = run(process, "keys", "rotate")
    assert ended.returncode == 0, ended.stderr
    assert "1 key(s)" in ended.stdout
    assert httpx.post(process.url + "/v1/chat/completions", json=CHAT).status_code == 200
    assert len((process.folder / "data" / "encryption_key").read_text().split()) == 2
    assert run(process, "keys", "rotate", "--prune").returncode == 0
    assert len((process.folder / "data" / "encryption_key").read_text().split()) == 1
    process.stop()
    process.start()
    assert httpx.post(process.url + "/v1/chat/completions", json=CHAT).status_code == 200
    assert provider.posts[-1].headers["authorization"] == f"Bearer {KEY}"


def test_a_start_without_the_right_key_is_refused_unless_degraded(
    providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    process = sidecar()
    made = {
        "id": "a",
        "name": "a",
        "api_base_url": providers.new().url,
        "api_key": KEY,
        "model_mappings": MAPPING,
    }
    process.admin("POST", "/backends", made)
    process.stop()
    (process.folder / "data" / "encryption_key").unlink()
    refused = run(process)
    assert refused.returncode == 1
    assert "--degraded" in refused.stderr
    process.start("--degraded")
    ready = httpx.get(process.url + "/health/ready")
    assert ready.status_code == 503
    assert "a" in ready.json()["reasons"]["keys"]
    assert httpx.post(process.url + "/v1/chat/completions", json=CHAT).status_code == 503
    assert process.admin("PUT", "/backends/a", made).status_code == 200
    assert httpx.post(process.url + "/v1/chat/completions", json=CHAT).status_code == 200
