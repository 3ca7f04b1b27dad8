"""Where a value counts as a secret: every way that leads to one."""

import subprocess
import sys
from pathlib import Path

import pytest
from ansible import constants

from reconciler.desired.load import load
from reconciler.inventory import Inventory
from reconciler.model import ResourceId

SECRET = "hunter2-4711"


@pytest.fixture
def inventory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inventory:
    """One variable that is vaulted inline, one that is nested and vaulted, and a plain one."""
    password = tmp_path / "password"
    password.write_text("opensesame\n")
    argv = [
        Path(sys.executable).parent / "ansible-vault",
        "encrypt_string",
        "--vault-password-file",
        password,
        SECRET,
    ]
    vaulted = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout
    (tmp_path / "inventory/group_vars").mkdir(parents=True)
    (tmp_path / "inventory/hosts.yml").write_text("all: {hosts: {n1: {ansible_connection: local}}}\n")
    indented = vaulted.replace("\n", "\n  ").rstrip()
    text = f"key: {vaulted}\nnested:\n  key: {indented}\nplain: visible\n"
    (tmp_path / "inventory/group_vars/all.yml").write_text(text)
    monkeypatch.setattr(constants, "DEFAULT_VAULT_PASSWORD_FILE", str(password))
    return Inventory(tmp_path / "inventory")


@pytest.mark.parametrize(
    ("content", "extra", "secret"),
    [
        ("{$var: plain}", "", False),
        ("{$secret: plain}", "", True),
        ("{$var: key}", "", True),
        ("{$var: nested.key}", "", True),
        ("text", "secret: true, ", True),
    ],
)
def test_what_is_secret_is_known_to_be(
    content: str,
    extra: str,
    secret: bool,  # noqa: FBT001 - a parameter of the cases
    inventory: Inventory,
    tmp_path: Path,
) -> None:
    (tmp_path / "state").mkdir()
    entry = f"wrappers: [{{name: w, nodes: n1, dest: /tmp/w, {extra}content: {content}}}]\n"
    (tmp_path / "state/a.yml").write_text(entry)
    resource = load(tmp_path / "state", inventory).resources[ResourceId("n1", "wrapper", "w")]
    assert resource.secret is secret
