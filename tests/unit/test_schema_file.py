"""The JSON Schema that editors use: shipped, current, draft-07, and of the same opinion as the product."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import yaml

from reconciler.desired.schema import schema
from tests.unit.support import ROOT, Fleet, reconcile

SHIPPED = ROOT / "reconciler" / "desired_state.schema.json"
VALIDATOR = jsonschema.Draft7Validator(schema())


def test_shipped_schema_is_current() -> None:
    """After a change of the models: ``reconcile schema > reconciler/desired_state.schema.json``."""
    assert reconcile("schema").out == SHIPPED.read_text()


def test_schema_is_valid_draft_07() -> None:
    """The draft that editors understand."""
    document = json.loads(SHIPPED.read_text())
    assert document["$schema"] == "http://json-schema.org/draft-07/schema#"
    jsonschema.Draft7Validator.check_schema(document)


def test_every_field_has_a_description_and_simple_ones_an_example() -> None:
    """What an editor shows while somebody types."""
    found = schema()
    definitions = [found, *found["definitions"].values()]
    lacking = [
        f"{definition.get('title')}.{name}"
        for definition in definitions
        for name, field in definition.get("properties", {}).items()
        if "description" not in field
        or (
            "examples" not in field
            and definition.get("title") not in ("Desired state of a fleet", "Defaults")
        )
    ]
    allowed = {"None.$env", "None.$file", "None.$secret", "None.$var"}
    nested = {
        "Tool.install",
        "Tool.suspend",
        "Wrapper.suspend",
        "Service.suspend",
        "Service.run",
        "Ssh.suspend",
    }
    nested |= {
        "Schema.suspend",
        "Schema.tables",
        "Heartbeat.suspend",
        "Heartbeat.conversation",
        "Classes.heartbeats",
    }
    windows = {name for name in lacking if name.endswith(".window")}
    assert set(lacking) <= allowed | nested | windows


@pytest.mark.parametrize("path", sorted((ROOT / "desired_state").glob("*.yml")), ids=lambda path: path.name)
def test_our_own_desired_state_fits(path: Any) -> None:
    """The fleet that comes with the project."""
    assert list(VALIDATOR.iter_errors(yaml.safe_load(path.read_text()))) == []


VALID = [
    "defaults: {mode: warn, interval: 5m, tool: {max_attempts: 3}}\nlimits: {max_changed_nodes: 30%}\n",
    "tools: [{name: t, nodes: all, version: {$var: wanted}, install: {npm: t}}]\n",
    'wrappers: [{name: w, nodes: all, dest: ~/w, content: {$env: TOKEN}, mode: "0600", validate: bash -n %s}]\n',
    "services: [{name: s, nodes: all, run: {command: [/s]}, settle: 5, enabled: true}]\n",
    "schema: [{name: d, nodes: all, database: ~/d, tables: {t: {columns: {a: TEXT, b: null}}}}]\n",
    "ssh: [{nodes: all, interval: 30}]\nprotected: [~/.netrc]\ntools:\n",
]
INVALID = [
    "tolls: []\n",
    "tools: [{nodes: all}]\n",
    "tools: [{name: t, nodes: all, verson: '1'}]\n",
    "tools: [{name: t, nodes: all, version: 1.0}]\n",
    "tools: [{name: t, nodes: all, mode: sometimes}]\n",
    "tools: [{name: t, nodes: {$var: where}}]\n",
    "tools: [{name: t, nodes: all, version: {$vra: wanted}}]\n",
    "tools: {name: t}\n",
    "services: [{name: s, nodes: all, state: up}]\n",
    "schema: [{name: d, nodes: all, database: ~/d, tables: {}}]\n",
]


@pytest.mark.parametrize("text", VALID)
def test_valid_file_is_accepted(fleet: Fleet, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the schema and by the product."""
    monkeypatch.setenv("TOKEN", "x")
    for host in ("node-1", "node-2", "mac"):
        fleet.variables(host, "wanted: '1.0'\n")
    fleet.write(text)
    assert list(VALIDATOR.iter_errors(yaml.safe_load(text))) == []
    assert reconcile("validate").code == 0


@pytest.mark.parametrize("text", INVALID)
def test_invalid_file_is_refused(fleet: Fleet, text: str) -> None:
    """By the schema and by the product."""
    fleet.write(text)
    assert list(VALIDATOR.iter_errors(yaml.safe_load(text))) != []
    assert reconcile("validate").code == 1


def test_modelines_point_at_the_schema() -> None:
    """Editors find it from every file of the desired state."""
    for path in sorted((ROOT / "desired_state").glob("*.yml")):
        first = path.read_text().splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema="), path
        assert (path.parent / first.split("=", 1)[1]).resolve() == SHIPPED.resolve()
