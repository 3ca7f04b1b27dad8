"""Plain ansible-playbook on real nodes: the same roles and desired state, without the reconciler's loop."""

import base64
import os
import re
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import Node
from tests.nodes.conftest import Pool
from tests.nodes.fleet import WATCHER, Fleet, trees

ROOT = Path(__file__).parents[2]
RECAP = re.compile(
    r"^(\S+) +: ok=(\d+) +changed=(\d+) +unreachable=(\d+) +failed=(\d+) .*rescued=(\d+)", re.MULTILINE
)
SCRIPT = "#!/bin/sh\nexec sleep 1000000\n"
SECRET = "{{ lookup('pipe', 'id') }} hunter2"
ODD = {
    "template": "{{ 7 * 7 }} {% raw %} {# no comment #} ${HOME} $(id)\n",
    "quotes": "'one' \"two\" `three` \\four\n",
    "lines": "\n\nx\r\ny\n\n",
    "unicode": "größer ☃ \u202e \U0001f600",
    "dash": "-n",
    "empty": "",
    "number": "0755",
    "yaml": "yes: [no, ~]\n---\n!vault |\n",
}


@dataclass(frozen=True)
class Played:
    """How one run of site.yml ended."""

    code: int
    out: str

    def of(self, node: Node) -> dict[str, int]:
        """One node's counts."""
        rows = {row[0]: list(map(int, row[1:])) for row in RECAP.findall(self.out)}
        assert node.name in rows, self.out
        return dict(zip(("ok", "changed", "unreachable", "failed", "rescued"), rows[node.name], strict=True))

    @property
    def changed(self) -> int:
        """How many tasks changed something, on all nodes."""
        return sum(int(row[2]) for row in RECAP.findall(self.out))


def environment(fleet: Fleet) -> dict[str, str]:
    return {
        **os.environ,
        "RECONCILER_DESIRED": str(fleet.desired),
        "XDG_RUNTIME_DIR": str(fleet.runtime),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(fleet.runtime / "reconciler-ssh"),
        "ANSIBLE_NOCOLOR": "1",
        "NO_COLOR": "1",
        "AGENT_TOKEN": SECRET,
    }


def play(fleet: Fleet, *arguments: str) -> Played:
    """`ansible-playbook playbooks/site.yml` as a person runs it: in the checkout, with its ansible.cfg."""
    program = Path(sys.executable).with_name("ansible-playbook")
    argv = [str(program), "-i", str(fleet.inventory), "playbooks/site.yml", *arguments]
    done = subprocess.run(
        argv, cwd=ROOT, env=environment(fleet), capture_output=True, text=True, timeout=300, check=False
    )
    return Played(done.returncode, done.stdout + done.stderr)


def reconcile(fleet: Fleet, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`reconcile` in the checkout, so that it reads the same ansible.cfg."""
    argv, _ = fleet.command(*arguments)
    return subprocess.run(
        argv, cwd=ROOT, env=environment(fleet), capture_output=True, text=True, timeout=300, check=False
    )


def declare_all_kinds(fleet: Fleet) -> None:
    """Every kind, with and without privilege, and a secret."""
    fleet.file("task-watcher.sh", SCRIPT)
    fleet.file("task-watcher.service", WATCHER)
    fleet.file("mm", "#!/bin/sh\necho mm 2.1.0\n")
    wrapper = {"nodes": "all", "permissions": "0755"}
    fleet.declare(
        {
            "ssh": [{"nodes": "all"}],
            "schema": [
                {
                    "name": "dispatch",
                    "nodes": "all",
                    "database": "~/dispatch.db",
                    "tables": {
                        "tasks": {"columns": {"id": "INTEGER PRIMARY KEY", "note": "TEXT DEFAULT '{{ x }}'"}}
                    },
                }
            ],
            "wrappers": [
                {**wrapper, "name": "watcher", "src": "files/task-watcher.sh", "dest": "~/task-watcher.sh"},
                {
                    **wrapper,
                    "name": "profile",
                    "content": "export AGENT=1\n",
                    "dest": "/etc/profile.d/agent.sh",
                    "owner": "root",
                    "allow_become": True,
                },
                {"name": "token", "nodes": "all", "content": {"$env": "AGENT_TOKEN"}, "dest": "~/.token"},
            ],
            "tools": [{"name": "mm", "nodes": "all", "version": ">=2", "install": {"file": "files/mm"}}],
            "services": [
                {
                    "name": "task-watcher",
                    "nodes": "all",
                    "scope": "user",
                    "unit": "files/task-watcher.service",
                    "enabled": True,
                    "restart_on": ["~/task-watcher.sh"],
                }
            ],
        }
    )


def drift(node: Node) -> None:
    """A fleet in use: something is old, something is missing."""
    node.write("/home/agent/task-watcher.sh", "#!/bin/sh\nexit 1\n", mode="0644", owner="agent")
    node.run("python3 -c 'import sqlite3; sqlite3.connect(\"/home/agent/dispatch.db\")"
             '.execute("CREATE TABLE tasks (id INTEGER PRIMARY KEY)")\'', user="agent")  # fmt: skip


def test_drifted_nodes_converge_and_a_second_run_changes_nothing(nodes: Pool, fleet: Fleet) -> None:
    """Check mode tells and leaves alone, converging converges, and `reconcile` then agrees."""
    both = nodes(2)
    declare_all_kinds(fleet)
    for node in both:
        drift(node)
    before = trees(both)
    check = play(fleet, "--check", "--diff")
    assert check.code == 0, check.out
    assert all(check.of(node)["changed"] == 6 for node in both), check.out
    assert trees(both) == before
    assert "-exit 1\n+exec sleep 1000000" in check.out
    assert "+ExecStart=/home/agent/task-watcher.sh" in check.out
    assert "hunter2" not in check.out

    converged = play(fleet, "-vvv")
    assert converged.code == 0, converged.out
    encoded = base64.b64encode(SECRET.encode()).decode()
    assert "hunter2" not in converged.out
    assert encoded not in converged.out
    for node in both:
        assert node.read("/home/agent/.token").decode() == SECRET
        assert node.run("/usr/bin/stat -c %a:%U /etc/profile.d/agent.sh").stdout.strip() == "755:root"
        assert node.run("~/.local/bin/mm", user="agent").stdout == "mm 2.1.0\n"
        assert node.run("systemctl --user is-active task-watcher", user="agent").stdout == "active\n"

    after = trees(both)
    assert [play(fleet).changed, play(fleet, "--check").changed] == [0, 0]
    assert trees(both) == after
    agreed = reconcile(fleet, "--once", "--check")
    assert agreed.returncode == 0, agreed.stdout + agreed.stderr


def test_what_reconcile_converged_is_converged_for_ansible(nodes: Pool, fleet: Fleet) -> None:
    both = nodes(2)
    declare_all_kinds(fleet)
    drift(both[0])
    done = reconcile(fleet, "--once")
    assert done.returncode == 0, done.stdout + done.stderr
    before = trees(both)
    again = play(fleet)
    assert (again.code, again.changed) == (0, 0), again.out
    assert trees(both) == before


def test_limit_and_tags_choose_nodes_and_kinds(nodes: Pool, fleet: Fleet) -> None:
    one, two = nodes(2)
    declare_all_kinds(fleet)
    untouched = trees([two])
    tools = play(fleet, "--limit", one.name, "--tags", "tool")
    assert (tools.code, tools.changed) == (0, 1), tools.out
    assert one.run("~/.local/bin/mm", user="agent").stdout == "mm 2.1.0\n"
    assert not one.tree("/home/agent/.token", "/home/agent/dispatch.db")
    rest = play(fleet, "--limit", one.name, "--skip-tags", "service,schema")
    assert (rest.code, rest.changed) == (0, 3), rest.out
    assert one.tree("/home/agent/.token")
    assert not one.tree("/home/agent/dispatch.db", "/home/agent/.config/systemd")
    assert trees([two]) == untouched


def test_what_fails_is_undone_and_named_and_stops_nothing_else(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    node.write("/home/agent/bad.sh", "echo old\n", mode="0751", owner="agent")
    fleet.declare(
        {
            "wrappers": [
                {
                    "name": "bad",
                    "nodes": "all",
                    "content": "if then\n",
                    "dest": "~/bad.sh",
                    "validate": "bash -n %s",
                },
                {"name": "good", "nodes": "all", "content": "x\n", "dest": "~/good"},
                {
                    "name": "later",
                    "nodes": "all",
                    "content": "",
                    "dest": "~/later",
                    "depends_on": ["wrapper/bad"],
                },
            ],
            "services": [
                {
                    "name": "dies",
                    "nodes": "all",
                    "scope": "user",
                    "run": {"command": ["/bin/false"]},
                },
                {
                    "name": "lives",
                    "nodes": "all",
                    "scope": "user",
                    "run": {"command": ["/bin/sleep", "1000000"]},
                },
            ],
        }
    )
    played = play(fleet)
    assert played.code == 2, played.out
    assert played.of(node)["failed"] == 1
    assert played.of(node)["rescued"] == 3
    final = played.out[played.out.index("TASK [Fail where") :]
    assert "node-1/wrapper/bad" in final
    assert "syntax error" in final
    assert "node-1/service/dies" in final
    assert "node-1/wrapper/later: waits for node-1/wrapper/bad" in final
    assert not node.tree("/home/agent/later")
    assert "good" not in final
    assert (
        node.run("stat -c %a ~/bad.sh; cat ~/bad.sh; cat ~/good", user="agent").stdout == "751\necho old\nx\n"
    )
    assert not node.tree("/home/agent/.config/systemd/user/dies.service")
    assert node.run("systemctl --user is-active lives", user="agent").stdout == "active\n"


def test_values_arrive_byte_for_byte(nodes: Pool, fleet: Fleet) -> None:
    """Whatever a value looks like, it is data: in contents, in names of files, in arguments of roles."""
    (node,) = nodes(1)
    places = {name: f"/home/agent/{name} {{{{ 7 * 7 }}}} 'ü'" for name in ODD}
    wrappers = [
        {
            "name": name,
            "nodes": "all",
            "content": text,
            "dest": places[name],
            "validate": "sh -c true '{{ 7 }}' %s",
        }
        for name, text in ODD.items()
    ]
    column = "TEXT DEFAULT '{{ 7 * 7 }} \"☃\"'"
    table = {"columns": {"id": "INTEGER", "{{ 7 * 7 }}": column}}
    schema = [{"name": "odd", "nodes": "all", "database": "~/{{ 7 }}.db", "tables": {"-n": table}}]
    fleet.declare({"wrappers": wrappers, "schema": schema})
    played = play(fleet)
    assert (played.code, played.changed) == (0, len(ODD) + 1), played.out
    assert {name: node.read(path).decode() for name, path in places.items()} == ODD
    copy = fleet.directory / "copy.db"
    copy.write_bytes(node.read("/home/agent/{{ 7 }}.db"))
    rows = sqlite3.connect(copy).execute('PRAGMA table_info("-n")').fetchall()
    assert [(row[1], row[4]) for row in rows] == [("id", None), ("{{ 7 * 7 }}", "'{{ 7 * 7 }} \"☃\"'")]
    assert play(fleet).changed == 0
    assert reconcile(fleet, "--once", "--check").returncode == 0


def test_an_invalid_desired_state_touches_nothing(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    fleet.declare({"wrappers": [{"name": "x", "nodes": "nobody", "content": "", "dest": "~/x"}]})
    before = trees([node])
    played = play(fleet)
    assert played.code != 0
    assert "desired state is invalid" in played.out
    assert "nobody" in played.out
    assert trees([node]) == before


@pytest.mark.parametrize("kind", ["tool", "wrapper"])
def test_a_role_refuses_what_is_no_resource_of_its_kind(nodes: Pool, fleet: Fleet, kind: str) -> None:
    """Argument specs are checked before anything is sent to a node."""
    (node,) = nodes(1)
    fleet.declare({"ssh": [{"nodes": "all"}]})
    playbook = fleet.directory / "wrong.yml"
    playbook.write_text(
        "- hosts: all\n  gather_facts: false\n  tasks:\n"
        f"    - ansible.builtin.include_role: {{name: {kind}}}\n"
        "      vars: {resource: {name: x, dets: /tmp/x}}\n"
    )
    program = Path(sys.executable).with_name("ansible-playbook")
    argv = [str(program), "-i", str(fleet.inventory), str(playbook)]
    done = subprocess.run(
        argv, cwd=ROOT, env=environment(fleet), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stdout
    assert "dets" in done.stdout
    assert not node.tree("/tmp/x")
