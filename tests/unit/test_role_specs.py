"""The roles' argument specs and the playbooks, without a node."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

from reconciler.desired.load import load
from reconciler.inventory import Inventory
from reconciler.kinds import names
from reconciler.kinds.registry import kinds
from reconciler.requests import role_request

ROOT = Path(__file__).parents[2]
UNIT = {
    "name": "full",
    "nodes": "all",
    "unit": "files/x",
    "enabled": True,
    "restart_on": ["~/x"],
    "settle": 2,
}
# Per section: as much and as little as a declaration can say.
DECLARED: dict[str, list[dict[str, Any]]] = {
    "ssh": [{"nodes": "all"}, {"name": "little", "nodes": "all", "ignore": ["login", "control_socket"]}],
    "schema": [
        {
            "name": "full",
            "nodes": "all",
            "database": "~/{{ x }}.db",
            "tables": {
                "t": {"columns": {"id": "INTEGER", "{{ y }}": None}, "indexes": {"i": {"columns": ["id"]}}}
            },
        }
    ],
    "heartbeats": [
        {
            "agent": "full",
            "nodes": "all",
            "class": "development",
            "workspace": "~/w",
            "label": "梁思筑",
            "multica": "40abd41a",
            "checks": ["{{ x }}"],
            "language": "zh",
            "timezone": "Asia/Shanghai",
            "turn": ["true"],
            "service": "x.service",
            "scope": "system",
            "conversation": {"marker": "~/talking"},
            "path": ["~/bin"],
        },
        {
            "agent": "little",
            "nodes": "all",
            "class": "business",
            "workspace": "/w",
            "timer": "cron",
            "ignore": ["file", "program", "config", "timer", "schedule", "former", "beat", "tasks"],
        },
        {"agent": "mac", "nodes": "all", "class": "business", "workspace": "/w2", "timer": "launchd"},
    ],
    "wrappers": [
        {
            "name": "full",
            "nodes": "all",
            "src": "files/x",
            "dest": "~/{{ x }}",
            "permissions": "0755",
            "owner": "root",
            "group": "root",
            "validate": "true %s",
        },
        {"name": "little", "nodes": "all", "content": "", "dest": "/x", "ignore": ["type", "content"]},
    ],
    "tools": [
        {
            "name": "file",
            "nodes": "all",
            "version": ">=1",
            "install": {"file": "files/x"},
            "bin_dir": "~/bin",
        },
        {
            "name": "url",
            "nodes": "all",
            "version_regex": "(.)",
            "path": ["~/x"],
            "install": {"url": "https://example.invalid/x.zip", "sha256": "0" * 64, "member": "x"},
        },
        {"name": "reported", "nodes": "all"},
    ],
    "services": [UNIT, {"name": "little", "nodes": "all", "scope": "user"}],
}


@pytest.fixture
def requests(tmp_path: Path) -> list[dict[str, Any]]:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x").write_text("{{ z }}")
    (tmp_path / "state.yml").write_text(yaml.safe_dump(DECLARED))
    (tmp_path / "inventory").write_text("all: {hosts: {node-1: {}}}\n")
    desired = load(tmp_path, Inventory(tmp_path / "inventory"))
    return [role_request(resource, "attempt") for resource in desired.resources.values()]


def spec(kind: str) -> dict[str, Any]:
    path = ROOT / "roles" / kind / "meta" / "argument_specs.yml"
    specs: dict[str, Any] = yaml.safe_load(path.read_text())["argument_specs"]
    return specs


def test_every_request_fits_the_spec_of_its_role(requests: list[dict[str, Any]]) -> None:
    """A key that a kind sends and its role does not know would fail every repair."""
    assert {request["kind"] for request in requests} == set(names())
    for request in requests:
        arguments = {"resource": request["resource"], "attempt": request["attempt"]}
        for entry, options in spec(request["kind"]).items():
            result = ArgumentSpecValidator(options["options"]).validate(arguments)
            assert not result.error_messages, (request["id"], entry)


@pytest.mark.parametrize("kind", names())
def test_a_role_can_undo_exactly_when_its_kind_says_so(kind: str) -> None:
    can_undo = not kinds()[kind].NO_ROLLBACK
    assert ("rollback" in spec(kind)) == can_undo
    assert (ROOT / "roles" / kind / "tasks" / "rollback.yml").exists() == can_undo


@pytest.mark.parametrize("kind", names())
def test_every_kind_has_readme_and_scenario(kind: str) -> None:
    assert 8 <= len((ROOT / "roles" / kind / "README.md").read_text().splitlines()) <= 20
    assert (ROOT / "molecule" / kind / "molecule.yml").exists()


def test_playbooks_name_no_kind() -> None:
    for path in (ROOT / "playbooks").rglob("*.yml"):
        code = "\n".join(line for line in path.read_text().splitlines() if not line.strip().startswith("#"))
        words = set(code.replace("/", " ").replace("_", " ").replace(".", " ").split())
        assert not words & set(names()), path
