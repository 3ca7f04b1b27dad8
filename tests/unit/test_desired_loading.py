"""What a valid desired state becomes: merging, patterns, layers of defaults, what is ignored, what is secret."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime

import pytest

from reconciler.diff import diff
from reconciler.model import SECRET, ConfigurationError, Mode, Observation
from reconciler.store import Store
from tests.unit.support import Fleet, reconcile, rid


def test_files_are_merged(fleet: Fleet) -> None:
    """One file or many, .yml or .yaml; hidden files and other files are not read."""
    fleet.write("tools: [{name: a, nodes: node-1}]\n")
    fleet.write("tools: [{name: b, nodes: node-1}]\nssh: [{nodes: node-1}]\n", "b.yaml")
    fleet.write("tools: [", ".hidden.yml")
    fleet.write("tools: [", "notes.txt")
    assert set(map(str, fleet.load().resources)) == {"node-1/tool/a", "node-1/tool/b", "node-1/ssh/control"}


@pytest.mark.parametrize(
    ("pattern", "nodes"),
    [
        ("all", {"node-1", "node-2", "mac"}),
        ("workers", {"node-1", "node-2"}),
        ("node-1,mac", {"node-1", "mac"}),
        ("node-1:mac", {"node-1", "mac"}),
        ("all:!mac", {"node-1", "node-2"}),
        ("workers:&node-2", {"node-2"}),
        ("node-*", {"node-1", "node-2"}),
        ("~node-[2-9]", {"node-2"}),
        ("workers[0]", {"node-1"}),
    ],
)
def test_nodes_is_an_ansible_host_pattern(fleet: Fleet, pattern: str, nodes: set[str]) -> None:
    """Exactly what Ansible makes of it."""
    fleet.write(f"tools: [{{name: t, nodes: '{pattern}'}}]\n")
    assert {found.node for found in fleet.load().resources} == nodes


def test_order_is_node_then_kind(fleet: Fleet) -> None:
    """Kinds that others build upon come first, whatever the order of the files."""
    fleet.write(
        "wrappers: [{name: w, nodes: all, dest: ~/w, content: x}]\n"
        "services: [{name: s, nodes: all}]\nssh: [{nodes: all}]\ntools: [{name: t, nodes: all}]\n"
    )
    order = [(found.node, found.kind) for found in fleet.load().resources]
    kinds = ["ssh", "tool", "wrapper", "service"]
    assert order == [(node, kind) for node in ("node-1", "node-2", "mac") for kind in kinds]


def test_default_policy(fleet: Fleet) -> None:
    """What holds where nobody says anything."""
    fleet.write("tools: [{name: t, nodes: node-1}]\n")
    policy = fleet.resource("node-1/tool/t").policy
    assert policy.mode is Mode.ENFORCE
    assert (policy.interval, policy.retry_interval, policy.max_attempts) == (None, 60.0, 2)
    assert not policy.allow_become


def test_defaults_come_in_layers(fleet: Fleet) -> None:
    """File, kind, the node's variables, the resource: the nearer one wins, field by field."""
    fleet.variables("node-1", "reconciler_defaults: {retry_interval: 3m, max_attempts: 7}\n")
    fleet.write(
        "defaults: {mode: warn, interval: 1m, retry_interval: 1m, max_attempts: 5, tool: {interval: 2m, retry_interval: 2m}}\n"
        "tools: [{name: t, nodes: workers, max_attempts: 9}]\n"
        "ssh: [{nodes: node-1}]\n"
    )
    tool, other = fleet.resource("node-1/tool/t").policy, fleet.resource("node-2/tool/t").policy
    assert (tool.mode, tool.interval, tool.retry_interval, tool.max_attempts) == (Mode.WARN, 120.0, 180.0, 9)
    assert (other.retry_interval, other.max_attempts) == (120.0, 9)
    ssh = fleet.resource("node-1/ssh/control").policy
    assert (ssh.interval, ssh.retry_interval, ssh.max_attempts) == (60.0, 180.0, 7)


def test_permissions_given_as_mode_leave_the_treatment_alone(fleet: Fleet) -> None:
    """Mode is permissions where it is octal, and treatment where it is a word."""
    fleet.write(
        "defaults: {mode: warn}\nwrappers:\n"
        '  - {name: a, nodes: node-1, dest: ~/a, content: x, mode: "755"}\n'
        "  - {name: b, nodes: node-1, dest: ~/b, content: x, mode: ignore, permissions: '0600'}\n"
    )
    a, b = fleet.resource("node-1/wrapper/a"), fleet.resource("node-1/wrapper/b")
    assert (a.fields["mode"], a.policy.mode) == ("0755", Mode.WARN)
    assert (b.fields["mode"], b.policy.mode) == ("0600", Mode.IGNORE)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("5m", 300),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("2d", 172800),
        ("0.5h", 1800),
        ("45", None),
        ("", None),
    ],
)
def test_durations(fleet: Fleet, text: str, seconds: float | None) -> None:
    """Numbers with units; plain numbers only where YAML reads a number."""
    fleet.write(f"tools: [{{name: t, nodes: node-1, interval: '{text}'}}]\n")
    if seconds is None:
        with pytest.raises(ConfigurationError):
            fleet.load()
    else:
        assert fleet.resource("node-1/tool/t").policy.interval == seconds


def test_a_plain_number_is_seconds(fleet: Fleet) -> None:
    """Without quotes."""
    fleet.write("tools: [{name: t, nodes: node-1, interval: 45}]\n")
    assert fleet.resource("node-1/tool/t").policy.interval == 45.0


def test_suspension_without_zone_is_utc(fleet: Fleet) -> None:
    """A date is its beginning."""
    fleet.write("tools: [{name: t, nodes: node-1, suspend: {reason: wait, owner: me, until: 2030-01-02}}]\n")
    found = fleet.resource("node-1/tool/t").policy.suspend
    assert found is not None
    assert (found.reason, found.owner, found.until) == ("wait", "me", datetime(2030, 1, 2, tzinfo=UTC))
    fleet.write("tools: [{name: t, nodes: node-1, suspend: {reason: wait, until: 2030-01-02 03:04:05}}]\n")
    found = fleet.resource("node-1/tool/t").policy.suspend
    assert found is not None
    assert found.until == datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_ignored_fields_are_not_declared_any_more(fleet: Fleet) -> None:
    """What is not among the fields is neither compared nor handed to the role."""
    fleet.write('wrappers: [{name: w, nodes: node-1, dest: ~/w, content: x, mode: "0755", ignore: [mode]}]\n')
    resource = fleet.resource("node-1/wrapper/w")
    assert "mode" not in resource.fields
    facts = {"type": "file", "mode": "0600", "content": resource.fields["content"]}
    assert diff({resource.id: resource}, {resource.id: Observation(resource.id, facts)}) == {}


def test_values_are_never_templated(fleet: Fleet) -> None:
    """Braces, quotes, newlines and other scripts stay what they are."""
    text = "{{ 7 * 7 }} {% if x %} ${HOME} \"'\\ -n \u00e9\u4e2d\U0001f600\n"
    fleet.write(f"wrappers: [{{name: w, nodes: node-1, dest: ~/w, content: {json.dumps(text)}}}]\n")
    assert base64.b64decode(fleet.resource("node-1/wrapper/w").args["body"]).decode() == text


def test_templates_see_the_nodes_variables_only(fleet: Fleet) -> None:
    """Rendered per node, with one newline at the end kept."""
    fleet.variables("node-1", "agent: architect\n")
    fleet.variables("node-2", "agent: '{{ inventory_hostname }}-x'\n")
    fleet.write("agent={{ agent }} on {{ inventory_hostname }} {{ group_names | join(',') }}\n", "t.j2")
    fleet.write("wrappers: [{name: w, nodes: workers, dest: ~/w, template: t.j2}]\n")
    bodies = [base64.b64decode(r.args["body"]).decode() for r in fleet.load().resources.values()]
    assert bodies == ["agent=architect on node-1 workers\n", "agent=node-2-x on node-2 workers\n"]


def test_merge_keys_and_anchors_are_understood(fleet: Fleet) -> None:
    """What is given beside << wins."""
    fleet.write(
        "tools:\n  - &base {name: a, nodes: node-1, version: '1.0', interval: 1m}\n"
        "  - {<<: *base, name: b}\n  - {name: c, <<: [*base, {version: '2.0'}]}\n"
    )
    found = fleet.load().resources
    assert found[rid("node-1/tool/b")].policy.interval == 60.0
    assert found[rid("node-1/tool/c")].fields["version"] == "1.0"


def test_merges_may_be_nested(fleet: Fleet) -> None:
    """A mapping that was itself merged from another."""
    fleet.write(
        "tools:\n  - &a {name: a, nodes: node-1, interval: 1m}\n  - &b {<<: *a, name: b, max_attempts: 5}\n"
        "  - {<<: *b, name: c}\n"
    )
    policy = fleet.resource("node-1/tool/c").policy
    assert (policy.interval, policy.max_attempts) == (60.0, 5)


def test_dependency_may_name_this_node_or_another(fleet: Fleet) -> None:
    """KIND/NAME or NODE/KIND/NAME."""
    fleet.write(
        "tools:\n  - {name: a, nodes: workers}\n  - {name: b, nodes: node-1, depends_on: [tool/a, node-2/tool/a]}\n"
    )
    assert fleet.resource("node-1/tool/b").depends_on == (rid("node-1/tool/a"), rid("node-2/tool/a"))


def test_digest_changes_with_the_declaration_only(fleet: Fleet) -> None:
    """By it, intended changes are told from corrective ones."""
    fleet.write("x\n", "f")
    entry = "wrappers: [{name: w, nodes: node-1, dest: ~/w, src: f, interval: %s}]\n"
    fleet.write(entry % "1m")
    first = fleet.resource("node-1/wrapper/w").digest
    fleet.write(entry % "2m")
    assert fleet.resource("node-1/wrapper/w").digest == first
    fleet.write("y\n", "f")
    assert fleet.resource("node-1/wrapper/w").digest != first


def test_bytes_of_a_source_file_arrive_unchanged(fleet: Fleet) -> None:
    """Binary, without a newline at the end, with Windows line ends."""
    body = bytes(range(256)) + b"\r\n{{ x }}"
    fleet.write(body, "files/w")
    fleet.write("wrappers: [{name: w, nodes: node-1, dest: ~/w, src: files/w}]\n")
    assert base64.b64decode(fleet.resource("node-1/wrapper/w").args["body"]) == body


def test_empty_files_are_declared_like_any_other(fleet: Fleet) -> None:
    """No content is content."""
    fleet.write("", "empty")
    fleet.write(
        "wrappers: [{name: w, nodes: node-1, dest: ~/w, content: ''}]\n"
        "services: [{name: s, nodes: node-1, unit: empty}]\n"
    )
    assert fleet.resource("node-1/wrapper/w").args["body"] == ""
    service = fleet.resource("node-1/service/s")
    assert (service.args["body"], service.paths_written) == ("", frozenset({"/etc/systemd/system/s.service"}))


def test_scope_keeps_only_nodes_and_kinds_asked_for(fleet: Fleet) -> None:
    """What --limit and --kind leave."""
    fleet.write("tools: [{name: t, nodes: all}]\nssh: [{nodes: all}]\n")
    desired = fleet.load()
    assert set(desired.of(["mac"], ["tool"]).resources) == {rid("mac/tool/t")}
    assert len(desired.of(["mac", "node-1"]).resources) == 4


def test_protected_paths_always_include_our_own_list(fleet: Fleet) -> None:
    """A fleet adds to it and cannot take away."""
    fleet.write("protected: [~/.netrc]\n")
    assert fleet.load().protected == ("~/.ssh/config", "nodes.json", "projects.json", "~/.netrc")


# --- secrets ----------------------------------------------------------------------------------------

SECRET_TEXT = "hunter2 and more"


def secret_fleet(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrapper whose content is a secret of the environment."""
    monkeypatch.setenv("TOKEN", SECRET_TEXT)
    fleet.write("wrappers: [{name: w, nodes: node-1, dest: ~/w, content: {$env: TOKEN}}]\n")


def test_references_are_resolved(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret from the environment or a file; a variable of the node, also inside a list or a mapping."""
    monkeypatch.setenv("TOKEN", SECRET_TEXT)
    fleet.variables("node-1", "tool: {wanted: '>=2.0', args: [-V]}\n")
    fleet.write("from a file\n\n", "s.txt")
    fleet.write(
        "wrappers:\n  - {name: a, nodes: node-1, dest: ~/a, content: {$env: TOKEN}}\n"
        "  - {name: b, nodes: node-1, dest: ~/b, content: {$file: s.txt}}\n"
        "tools: [{name: t, nodes: node-1, version: {$var: tool.wanted}, version_args: {$var: tool.args}}]\n"
    )
    assert base64.b64decode(fleet.resource("node-1/wrapper/a").args["body"]).decode() == SECRET_TEXT
    assert base64.b64decode(fleet.resource("node-1/wrapper/b").args["body"]) == b"from a file\n"
    tool = fleet.resource("node-1/tool/t")
    assert (tool.fields["version"], tool.args["version_args"], tool.secret) == (">=2.0", ["-V"], False)


def test_drift_of_a_secret_shows_neither_side(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the value, not its digest, not a text diff."""
    secret_fleet(fleet, monkeypatch)
    resource = fleet.resource("node-1/wrapper/w")
    facts = {"type": "file", "content": "0" * 64, "text": "old " + SECRET_TEXT}
    found = diff({resource.id: resource}, {resource.id: Observation(resource.id, facts)})[resource.id]
    assert resource.secret
    assert [(change.desired, change.observed, change.diff) for change in found.changes] == [
        (SECRET, SECRET, "")
    ]
    assert SECRET_TEXT not in repr(found)
    assert resource.fields["content"] not in repr(found)


def test_validate_and_explain_never_print_a_secret(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """In text and in JSON."""
    secret_fleet(fleet, monkeypatch)
    digest = fleet.resource("node-1/wrapper/w").fields["content"]
    Store(fleet.directory / "r.db").close()
    for words in (["validate"], ["validate", "-o", "json"], ["explain", "node-1/wrapper/w", "--db", "r.db"]):
        said = reconcile(*words)
        assert said.code == 0
        assert SECRET_TEXT not in said.out + said.err
        assert digest not in said.out + said.err
    document = reconcile("explain", "node-1/wrapper/w", "--db", "r.db", "-o", "json").json()
    assert document["desired"] == SECRET


def test_mistake_in_a_secret_value_does_not_print_it(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error message quotes what it found, unless it came from a reference."""
    monkeypatch.setenv("TOKEN", SECRET_TEXT)
    for field in ("version", "interval", "mode", "command"):
        fleet.write(f"tools: [{{name: t, nodes: node-1, {field}: {{$env: TOKEN}}}}]\n")
        for output in ("text", "json"):
            said = reconcile("validate", "-o", output)
            assert said.code == 1
            assert SECRET_TEXT not in said.out + said.err


def test_permission_to_escalate_makes_another_declaration(fleet: Fleet) -> None:
    """What failed for the lack of it is tried at once; a comment or another policy makes none."""
    entry = "wrappers: [{name: w, nodes: node-1, dest: /etc/w, content: x%s}]\n"
    digests = []
    for more in ("", ", allow_become: true", ", max_attempts: 9"):
        fleet.write(entry % more)
        digests.append(fleet.resource("node-1/wrapper/w").digest)
    assert digests[0] == digests[2] != digests[1]
