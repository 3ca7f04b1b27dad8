"""Whole passes over real nodes: all is repaired, nothing is touched twice, nothing is said that is not so."""

import re
from typing import Any

import pytest

from tests.nodes import packages
from tests.nodes.conftest import Pool
from tests.nodes.fleet import WATCHER, Fleet, trees

ODD = '{{ lookup("pipe", "id") }} {% raw %}\n-n "quoted" \'single\' $HOME `id` \\n é 梁思筑 \U0001f600\ttab\n\n  trailing '
COLUMNS = {"id": "INTEGER PRIMARY KEY", "project": "TEXT", "status": "TEXT NOT NULL DEFAULT 'pending'",
           "note": "TEXT DEFAULT '{{ é \"x\" }} %s\n-n'"}  # fmt: skip


def everything(fleet: Fleet, *, version: str = "2.1") -> dict[str, Any]:
    """A desired state with every kind on every node."""
    fleet.file("task-wrapper.sh", '#!/bin/bash\necho "{{ not a template }}"\n')
    fleet.file("task-watcher.sh", "#!/bin/bash\nexec sleep infinity\n")
    fleet.file("task-watcher.service", WATCHER)
    fleet.file("mm", packages.SCRIPT.format(name="mm", version=version))
    tables = {"tasks": {"columns": COLUMNS, "indexes": {"by_status": {"columns": ["status"]}}}}
    return {
        "ssh": [{"nodes": "all"}],
        "schema": [{"name": "dispatch", "nodes": "all", "database": "~/dispatch.db", "tables": tables}],
        "tools": [{"name": "mm", "nodes": "all", "version": ">=2.0", "install": {"file": "files/mm"}}],
        "wrappers": [
            {"name": "task-wrapper", "nodes": "all", "src": "files/task-wrapper.sh", "dest": "~/task-wrapper.sh",
             "mode": "0755", "validate": "bash -n %s"},
            {"name": "watcher", "nodes": "all", "src": "files/task-watcher.sh", "dest": "~/task-watcher.sh", "mode": "0755"},
            {"name": "odd", "nodes": "all", "content": ODD, "dest": "~/odd.txt"},
        ],
        "services": [
            {"name": "task-watcher", "nodes": "all", "scope": "user", "unit": "files/task-watcher.service",
             "enabled": True, "restart_on": ["~/task-watcher.sh"], "settle": 0.5},
        ],
    }  # fmt: skip


def test_drift_of_every_kind_on_20_nodes_is_repaired_in_one_pass(nodes: Pool, fleet: Fleet) -> None:
    """And the second pass finds nothing, changes nothing, writes no event and only looks."""
    taken = nodes(20)
    fleet.declare(everything(fleet))
    fleet.once()  # from nothing
    taken[0].run("systemctl --user stop task-watcher", user="agent")
    taken[1].write("/home/agent/task-wrapper.sh", "echo last month's\n", owner="agent")
    taken[2].run("sqlite3 /dev/null 2>/dev/null; python3 -c \"import sqlite3,os; os.chdir('/home/agent'); os.remove('dispatch.db');"
                 " sqlite3.connect('dispatch.db').execute('create table tasks (id INTEGER PRIMARY KEY, project TEXT)')\"", user="agent")  # fmt: skip
    taken[3].run("rm ~/.local/bin/mm", user="agent")
    taken[4].run("echo '#!/bin/sh' > ~/.local/bin/mm", user="agent")
    taken[5].run("chmod 0600 ~/task-wrapper.sh", user="agent")
    taken[6].run(
        "systemctl --user disable task-watcher; echo '# edited' >> ~/.config/systemd/user/task-watcher.service",
        user="agent",
    )
    taken[7].run("systemctl --user mask --force task-watcher", user="agent", check=False)
    taken[8].run("touch ~/task-watcher.sh", user="agent")
    taken[9].run("rm ~/odd.txt ~/task-watcher.sh", user="agent")
    before = fleet.check().report
    answer = fleet.once()
    assert answer.code == 0, answer.out + answer.err
    repaired = {(row["node"], row["kind"]) for row in answer.report["outcomes"]}
    expected = {("node-1", "service"), ("node-2", "wrapper"), ("node-3", "schema"), ("node-4", "tool"), ("node-5", "tool"),
                ("node-6", "wrapper"), ("node-7", "service"), ("node-9", "service"), ("node-10", "wrapper")}  # fmt: skip
    assert expected <= repaired
    assert set(answer.outcomes.values()) == {"fixed"}
    assert {row["id"] for row in before["planned"]} == set(answer.outcomes)
    assert taken[9].read("/home/agent/odd.txt") == ODD.encode()

    quiet_before, events_before = trees(taken), fleet.events()
    second = fleet.once()
    assert second.code == 0
    assert second.report["drifts"] == second.report["outcomes"] == []
    assert [run["playbook"] for run in second.report["durations"]["runs"]] == ["observe.yml"]
    assert trees(taken) == quiet_before
    assert fleet.events() == events_before


def test_dead_and_hanging_nodes_are_unknown_and_disturb_nobody(nodes: Pool, fleet: Fleet) -> None:
    taken = nodes(20)
    fleet.declare(everything(fleet))
    taken[3].cut()
    taken[11].pause()
    try:
        answer = fleet.once()
    finally:
        taken[3].uncut()
        taken[11].resume()
    report = answer.report
    assert answer.code == 4, answer.err
    assert {row["node"] for row in report["unknown"]} == {"node-4", "node-12"}
    assert "refused" in report["nodes"]["node-4"]["reason"]
    assert (
        "timed out" in report["nodes"]["node-12"]["reason"]
        or "no answer" in report["nodes"]["node-12"]["reason"]
    )
    assert {row["node"] for row in report["outcomes"]} == {node.name for node in taken} - {
        "node-4",
        "node-12",
    }
    assert set(answer.outcomes.values()) == {"fixed"}
    # Both got their second chance, and only they did.
    assert [run["nodes"] for run in report["durations"]["runs"] if run["playbook"] == "observe.yml"][:2] == [
        20,
        2,
    ]
    assert all(row["issue_key"].split("/")[0] not in ("node-4", "node-12") for row in fleet.events())


def test_what_cannot_be_fixed_is_undone_and_everything_else_is_repaired(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    state = everything(fleet)
    fleet.declare(state)
    assert fleet.once().code == 0
    node.write("/home/agent/task-wrapper.sh", "echo old\n", mode="0700", owner="agent")
    node.write("/home/agent/extra.conf", "old\n", owner="agent")
    fleet.file("task-wrapper.sh", "#!/bin/bash\nif then fi (\n")  # fails bash -n
    broken = WATCHER.replace("/home/agent/task-watcher.sh", "/bin/false")
    fleet.file("task-watcher.service", broken)
    state["tools"].append({"name": "nowhere", "nodes": "all", "install": {"npm": "/no/such/package.tgz"}})
    state["tools"].append(
        {"name": "badsum", "nodes": "all", "install": {"url": "file:///etc/hostname", "sha256": "0" * 64}}
    )
    state["wrappers"].append({"name": "extra", "nodes": "all", "content": "new\n", "dest": "~/extra.conf"})
    fleet.declare(state)
    before = node.tree(
        "/home/agent", without=("/home/agent/.local", "/home/agent/.npm", "/home/agent/extra.conf")
    )
    answer = fleet.once()
    assert answer.code == 3, answer.err
    ended = answer.outcomes
    assert ended["node-1/wrapper/extra"] == "fixed"
    for name in ("wrapper/task-wrapper", "tool/nowhere", "tool/badsum", "service/task-watcher"):
        assert ended[f"node-1/{name}"] == "rolled_back", answer.out
    details = {row["id"]: row["detail"] for row in answer.report["outcomes"]}
    assert "bash -n" in details["node-1/wrapper/task-wrapper"]
    assert (
        "does not stay up" in details["node-1/service/task-watcher"]
        or "failed" in details["node-1/service/task-watcher"]
    )
    assert "SHA-256" in details["node-1/tool/badsum"]
    assert node.read("/home/agent/task-wrapper.sh") == b"echo old\n"
    assert node.read("/home/agent/.config/systemd/user/task-watcher.service") == WATCHER.encode()
    assert node.run("systemctl --user is-active task-watcher", user="agent").stdout.strip() == "active"
    after = node.tree(
        "/home/agent", without=("/home/agent/.local", "/home/agent/.npm", "/home/agent/extra.conf")
    )
    differing = {
        path
        for path in {**before, **after}
        if before.get(path) != after.get(path) and not path.endswith(".bak")
    }
    content = {
        p
        for p in differing
        if before.get(p) is None or after.get(p) is None or before[p].sha256 != after[p].sha256
    }
    assert content == set()


def test_check_changes_nothing_and_foretells_exactly_what_a_pass_does(nodes: Pool, fleet: Fleet) -> None:
    taken = nodes(2)
    fleet.declare(everything(fleet))
    fleet.once()
    # A script that a service reads, a file nobody reads, and a tool: the restart is a consequence.
    fleet.file("task-watcher.sh", "#!/bin/bash\n# newer\nexec sleep infinity\n")
    fleet.file("mm", packages.SCRIPT.format(name="mm", version="2.2"))
    taken[1].run("rm ~/odd.txt", user="agent")
    before = trees(taken)
    foretold = fleet.check()
    assert foretold.code == 2
    assert trees(taken) == before
    assert fleet.events() == [
        row
        for row in fleet.events()
        if row["status"] != "detected" or row["details"]["run"] != foretold.report["run_id"]
    ]
    done = fleet.once()
    assert done.code == 0

    def essence(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
        return {(row["id"], change["field"]) for row in rows for change in row["changes"]}

    assert essence(foretold.report["planned"]) == essence(done.report["outcomes"])
    assert ("node-1/service/task-watcher", "fresh") in essence(done.report["outcomes"])
    assert fleet.check().code == 0


def test_restricting_a_pass_leaves_the_rest_alone(nodes: Pool, fleet: Fleet) -> None:
    nodes(2)
    fleet.declare(everything(fleet))
    answer = fleet.once("--limit", "node-2", "--kind", "wrapper,tool")
    assert answer.code == 0
    assert {(row["node"], row["kind"]) for row in answer.report["outcomes"]} == {
        ("node-2", "wrapper"),
        ("node-2", "tool"),
    }
    refused = fleet.once("--limit", "nod-2")
    assert refused.code == 1
    assert "did you mean" in refused.report["problems"][0]["hint"]


def test_a_node_without_python_is_unknown_with_the_reason(nodes: Pool, fleet: Fleet) -> None:
    taken = nodes(2)
    fleet.declare(everything(fleet))
    taken[0].run(
        "mv /usr/bin/python3 /usr/bin/python3.hidden && mv /usr/bin/python3.11 /usr/bin/hidden-python"
    )
    answer = fleet.once("--kind", "wrapper")
    assert answer.code == 4
    reasons = {row["node"]: row["reason"] for row in answer.report["unknown"]}
    assert set(reasons) == {"node-1"}
    assert "no Python on the node" in reasons["node-1"]
    assert set(answer.outcomes.values()) == {"fixed"}


def test_a_probe_that_raises_is_unknown_and_disturbs_no_other(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    node.write(
        "/home/agent/dispatch.db",
        "this is no database, but long enough to be read as one" * 100,
        owner="agent",
    )
    fleet.declare(everything(fleet))
    answer = fleet.once()
    assert answer.code == 4
    (unknown,) = answer.report["unknown"]
    assert unknown["id"] == "node-1/schema/dispatch"
    assert "not a database" in unknown["reason"]
    assert set(answer.outcomes.values()) == {"fixed"}
    assert len(answer.outcomes) == 5


def test_what_is_overwritten_stands_beside_it_as_it_was(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    node.write("/home/agent/task-wrapper.sh", "echo last month's\n", mode="0700", owner="agent")
    script = "import sqlite3; d = sqlite3.connect('/home/agent/dispatch.db'); d.execute('pragma journal_mode=wal');"
    script += " d.execute('create table tasks (id INTEGER PRIMARY KEY, project TEXT)');"
    script += (
        " d.execute(\"insert into tasks (project) values ('kept')\"); d.commit(); import os; os._exit(0)"
    )
    node.run("python3 -", user="agent", stdin=script)
    fleet.declare(everything(fleet))
    assert fleet.once().code == 0
    (backup,) = [path for path in node.tree("/home/agent") if path.startswith("/home/agent/task-wrapper.sh.")]
    assert node.read(backup) == b"echo last month's\n"
    assert node.tree(backup)[backup].mode == "0700"
    (copy,) = [
        path
        for path in node.tree("/home/agent")
        if path.startswith("/home/agent/dispatch.db.") and path.endswith(".bak")
    ]
    look = f"import sqlite3; d = sqlite3.connect('{copy}'); print(d.execute('select project from tasks').fetchall(),"
    look += " [r[1] for r in d.execute('pragma table_info(tasks)')])"
    assert node.run("python3 -", stdin=look).stdout.strip() == "[('kept',)] ['id', 'project']"


def test_a_warned_resource_is_told_and_left_alone(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    state = everything(fleet)
    fleet.declare(
        {
            "defaults": {"mode": "warn", "tool": {"mode": "enforce"}},
            "tools": state["tools"],
            "wrappers": state["wrappers"][1:],
        }
    )
    answer = fleet.once()
    assert answer.code == 2
    assert set(answer.outcomes) == {"node-1/tool/mm"}
    assert "/home/agent/odd.txt" not in node.tree("/home/agent")
    told = [row for row in fleet.events() if row["issue_key"] == "node-1/wrapper/odd"]
    assert [row["status"] for row in told] == ["detected"]
    fleet.once()
    assert len([row for row in fleet.events() if row["issue_key"] == "node-1/wrapper/odd"]) == 1


def test_an_unknown_host_key_is_never_accepted(nodes: Pool, fleet: Fleet) -> None:
    """ansible-runner would switch the check off; a machine in between could then pass for a node."""
    nodes(1)
    known = fleet.directory / "known_hosts"
    known.touch()
    text = fleet.inventory.read_text()
    strict = re.sub(r"UserKnownHostsFile=\S+", f"UserKnownHostsFile={known}", text)
    fleet.inventory = fleet.directory / "inventory.yml"
    fleet.inventory.write_text(strict.replace("StrictHostKeyChecking=yes", "StrictHostKeyChecking=ask"))
    fleet.declare(everything(fleet))
    answer = fleet.once()
    assert answer.code == 4
    assert "Host key verification failed" in answer.report["nodes"]["node-1"]["reason"]
    assert "log in once by hand" in answer.report["nodes"]["node-1"]["reason"]
    assert known.read_text() == ""


def test_a_noisy_and_slow_login_does_not_confuse_anybody(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    node.write("/home/agent/.bashrc", "echo Welcome to {node}; echo '{}' >&2; sleep 0.3\n", owner="agent")
    fleet.declare(everything(fleet))
    assert fleet.once("--kind", "wrapper").code == 0
    assert fleet.check("--kind", "wrapper").code == 0


def test_system_units_need_the_permission_to_escalate(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    unit = WATCHER.replace("/home/agent/task-watcher.sh", "/bin/sleep infinity").replace(
        "default.target", "multi-user.target"
    )
    fleet.file("system.service", unit)
    service = {
        "name": "system-watcher",
        "nodes": "all",
        "unit": "files/system.service",
        "enabled": True,
        "settle": 0.3,
    }
    fleet.declare({"services": [service]})
    refused = fleet.once()
    assert refused.code == 3
    assert "ermission denied" in refused.report["outcomes"][0]["detail"]
    fleet.declare({"services": [{**service, "allow_become": True}]})
    assert fleet.once().code == 0
    assert node.run("systemctl is-active system-watcher").stdout.strip() == "active"
    assert node.run("systemctl is-enabled system-watcher").stdout.strip() == "enabled"
    assert fleet.once().report["drifts"] == []


def test_what_only_root_may_read_is_looked_at_with_privilege_and_the_rest_without(
    nodes: Pool, fleet: Fleet
) -> None:
    (node,) = nodes(1)
    secret = {"name": "secret", "nodes": "all", "content": "k\n", "dest": "/etc/agent/key", "mode": "0600"}
    plain = {"name": "plain", "nodes": "all", "content": "p\n", "dest": "~/plain"}
    node.run("mkdir -m 0700 /etc/agent && touch /etc/agent/key && chmod 0600 /etc/agent/key")
    fleet.declare({"wrappers": [secret, plain]})
    refused = fleet.once()
    assert refused.code == 4
    assert "ermission denied" in refused.report["unknown"][0]["reason"]
    fleet.declare({"wrappers": [{**secret, "allow_become": True, "owner": "root"}, plain]})
    assert fleet.once().outcomes == {"node-1/wrapper/secret": "fixed"}
    assert node.read("/etc/agent/key") == b"k\n"
    assert node.tree("/home/agent/plain")["/home/agent/plain"].uid == 1000
    assert fleet.once().report["drifts"] == []


@pytest.mark.parametrize("writer", ["nodes.json", "~/.ssh/config", "~/link/config"])
def test_protected_paths_are_never_written(nodes: Pool, fleet: Fleet, writer: str) -> None:
    """By their name, by their path, and through a link that only the node knows."""
    (node,) = nodes(1)
    node.run("mkdir -p ~/.ssh && echo 'Host precious' > ~/.ssh/config && ln -s .ssh ~/link", user="agent")
    dest = writer if writer.startswith("~") else f"~/{writer}"
    fleet.declare({"wrappers": [{"name": "intruder", "nodes": "all", "content": "x", "dest": dest}]})
    answer = fleet.once()
    if writer == "~/link/config":
        assert answer.code == 3
        assert "protected" in answer.report["outcomes"][0]["detail"]
    else:
        assert answer.code == 1
        assert "protected" in answer.report["problems"][0]["message"]
    assert node.read("/home/agent/.ssh/config") == b"Host precious\n"
    assert "/home/agent/nodes.json" not in node.tree("/home/agent")
