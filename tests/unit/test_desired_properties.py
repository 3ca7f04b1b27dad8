"""Whatever stands in a desired-state file, it ends in a desired state or in problems, never in a traceback."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from reconciler.desired.load import load
from reconciler.desired.schema import schema
from reconciler.inventory import Inventory
from reconciler.model import ConfigurationError
from reconciler.render import console, problems
from tests.unit.support import HOSTS

KEYS = sorted(
    {
        *schema()["properties"],
        *(key for d in schema()["definitions"].values() for key in d.get("properties", ())),
    }
)
WORDS = [
    "all", "node-1", "workers", "a", "t", "~/a", "/a", "files/a", "tool/a", "tool/t", "1.0", ">=2", "0755", "5m", "enforce",
    "warn", "running", "system", "launchd", "TEXT", "INTEGER PRIMARY KEY", "bash -n %s", "(x)", "https://a/b.zip", "a" * 64,
    "$env", "$var", "$file", "HOME", "inventory_hostname", "", "{{ x }}", "%s", "..", "~", "a.b", "2026-01-01", "\u4e2d", "\x00",
]  # fmt: skip

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
keys = st.sampled_from(KEYS) | st.sampled_from(WORDS) | st.text(max_size=6)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    """Three nodes; read once, as it does not change."""
    path = tmp_path_factory.mktemp("inventory") / "hosts.yml"
    path.write_text(HOSTS)
    found = Inventory(path)
    assert found.variables
    return found


def outcome(content: bytes, inventory: Inventory) -> str:
    """``valid`` or ``refused``, having printed the problems as a person would see them."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "a.yml").write_bytes(content)
        try:
            load(Path(directory), inventory)
        except ConfigurationError as error:
            refused = error
        else:
            return "valid"
    out = console()
    with out.capture() as said:
        problems(refused, out)
    said.get().encode()
    assert refused.problems
    assert all(problem.message for problem in refused.problems)
    return "refused"


@given(content=st.binary(max_size=200))
def test_any_bytes(inventory: Inventory, content: bytes) -> None:
    """A picture that was saved under the wrong name."""
    outcome(content, inventory)


@given(content=st.text(alphabet="ab:-{}[]&*!|>'\"%@`#,?\t\n \\udx0189<~", max_size=60))
def test_any_text_of_yaml_characters(inventory: Inventory, content: str) -> None:
    """Everything that YAML's grammar is made of, in any order."""
    outcome(content.encode(), inventory)


@given(content=st.text(max_size=60))
def test_any_text(inventory: Inventory, content: str) -> None:
    """Unicode of all sorts, as a value in quotes too."""
    outcome(content.encode("utf-8", "replace"), inventory)
    outcome(b"tools: [{name: t, nodes: all, command: " + json.dumps(content).encode() + b"}]", inventory)


@given(section=st.sampled_from(sorted(schema()["properties"])), data=values)
def test_any_structure_under_a_known_section(inventory: Inventory, section: str, data: Any) -> None:
    """Right sections, wrong everything else."""
    outcome(yaml.safe_dump({section: data}, allow_unicode=True).encode("utf-8", "surrogatepass"), inventory)


ENTRIES: dict[str, dict[str, Any]] = {
    "tools": {"name": "t", "nodes": "all", "version": ">=1", "install": {"npm": "t"}},
    "wrappers": {"name": "w", "nodes": "all", "dest": "~/w", "content": "x", "mode": "0755"},
    "services": {"name": "s", "nodes": "all", "run": {"command": ["/s"]}, "enabled": True},
    "schema": {
        "name": "d",
        "nodes": "all",
        "database": "~/d.db",
        "tables": {"t": {"columns": {"a": "TEXT"}, "indexes": {"i": {"columns": ["a"]}}}},
    },
    "ssh": {"nodes": "all"},
    "heartbeats": {"agent": "a", "nodes": "all", "class": "business", "workspace": "~/a", "checks": ["x"]},
}


@pytest.mark.parametrize("section", sorted(ENTRIES))
def test_entries_to_be_mutated_are_valid(inventory: Inventory, section: str) -> None:
    """Otherwise the next test would prove nothing."""
    assert outcome(json.dumps({section: [ENTRIES[section]]}).encode(), inventory) == "valid"


def test_every_section_is_mutated() -> None:
    """A new kind joins the list above."""
    header = {"classes", "defaults", "limits", "protected", "backup_retention_days"}
    assert set(ENTRIES) == set(schema()["properties"]) - header


@given(section=st.sampled_from(sorted(ENTRIES)), data=st.data())
def test_any_change_to_a_valid_entry(inventory: Inventory, section: str, data: st.DataObject) -> None:
    """One field of a valid entry becomes anything; one more key appears; the entry is nested elsewhere."""
    properties = schema()["definitions"][
        schema()["properties"][section]["anyOf"][0]["items"]["$ref"].rsplit("/")[-1]
    ]
    entry = dict(ENTRIES[section])
    for _ in range(data.draw(st.integers(1, 2))):
        entry[data.draw(st.sampled_from(sorted(properties["properties"])) | keys)] = data.draw(values)
    outcome(yaml.safe_dump({section: [entry]}).encode(), inventory)


NASTY = [
    "",
    "\x00",
    "~nobody-here/x",
    "..",
    "x" * 5000,
    "\u2028",
    "%",
    "{$env: X}",
    "[",
    "'",
    "-n",
    "\U0001f600",
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a structure where a scalar stands."""
    if isinstance(value, dict):
        return [place for key, item in value.items() for place in places(item, (*path, key))]
    if isinstance(value, list):
        return [place for index, item in enumerate(value) for place in places(item, (*path, index))]
    return [path]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The structure with one value replaced."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("section", sorted(ENTRIES))
def test_nasty_text_in_every_field(inventory: Inventory, section: str) -> None:
    """NUL, a home of nobody's, emptiness, length: everywhere that text may stand, sources of files included."""
    definition = schema()["properties"][section]["anyOf"][0]["items"]["$ref"].rsplit("/")[-1]
    sources = {"src": "content", "template": "content", "unit": "run", "unit_template": "run"}
    for text in NASTY:
        for place in places(ENTRIES[section]):
            changed = put(ENTRIES[section], place, text)
            outcome(json.dumps({section: [changed]}).encode(), inventory)
        for key in schema()["definitions"][definition]["properties"]:
            changed = {k: v for k, v in ENTRIES[section].items() if k != sources.get(key)}
            for value in (
                (text, [text], {"$file": text}) if text in ("", "\x00", "~nobody-here/x") else (text,)
            ):
                outcome(json.dumps({section: [{**changed, key: value}]}).encode(), inventory)
    outcome(json.dumps({section: [{**ENTRIES[section], "install": {"file": "\x00"}}]}).encode(), inventory)


def test_aliases_that_multiply_are_refused_quickly(inventory: Inventory) -> None:
    """A few hundred bytes that stand for billions of values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert outcome("\n".join(lines).encode(), inventory) == "refused"


def test_deep_nesting_is_refused(inventory: Inventory) -> None:
    """Deeper than any interpreter's stack."""
    for depth in (100, 5000):
        assert outcome(b"tools: " + b"[" * depth + b"]" * depth, inventory) == "refused"


def test_half_a_character_is_refused_and_two_halves_are_one(inventory: Inventory) -> None:
    """YAML's escapes can spell what no text can hold."""
    entry = b'wrappers: [{name: w, nodes: all, dest: ~/w, content: "%s"}]'
    assert outcome(entry % rb"\ud83d\ude00", inventory) == "valid"
    assert outcome(entry % rb"\ud83d", inventory) == "refused"
    assert outcome(rb'tools: [{name: t, nodes: all, "\udc00": x}]', inventory) == "refused"
