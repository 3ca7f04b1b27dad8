"""Guard rails, each with somebody who tries to get over it: on real nodes, with whole passes."""

import json
import sys
from typing import Any

import pytest

from tests.lab import Node
from tests.nodes import packages
from tests.nodes.conftest import Pool
from tests.nodes.fleet import Fleet
from tests.nodes.safety import (
    AGENT,
    alert_files,
    check_quiet,
    check_settled,
    last_event,
    query,
    settings,
    stories,
    text,
    wrapper,
)

ONCE = {"defaults": {"max_attempts": 1}}


@pytest.mark.parametrize("insists", [False, True], ids=["plain", "ansible_become-in-the-inventory"])
def test_no_privilege_without_allow_become(
    nodes: Pool,
    fleet: Fleet,
    tmp_path: Any,
    insists: bool,  # noqa: FBT001
) -> None:
    """Also where the inventory says that Ansible is to become root: only the declaration counts."""
    (node,) = nodes(1)
    if insists:
        variables = {node.name: {**nodes.lab.host_vars(node), "ansible_become": True}}
        nodes.lab.write_inventory(variables, {"fleet": [node.name]})
    node.write("/srv/packages/mm.deb", packages.deb(tmp_path, "mm", "2.1").read_bytes())
    fleet.file("x.service", "[Service]\nExecStart=/bin/sleep infinity\n")
    fleet.declare(
        {
            **ONCE,
            "wrappers": [wrapper("etc", dest="/etc/fleet.conf"), wrapper("cron", dest="/etc/cron.d/fleet")],
            "services": [
                {"name": "x", "nodes": "all", "unit": "files/x.service"},
                {"name": "cron", "nodes": "all", "state": "stopped"},
            ],
            "tools": [{"name": "mm", "nodes": "all", "install": {"apt": "/srv/packages/mm.deb"}}],
        }
    )
    before = node.tree("/etc", "/usr/local", "/opt", "/var/lib/dpkg", "/root")
    answer = fleet.once()
    assert answer.code == 3, answer.out
    assert "fixed" not in answer.outcomes.values(), answer.out
    assert {"node-1/wrapper/etc", "node-1/wrapper/cron", "node-1/tool/mm"} <= set(answer.outcomes)
    assert node.tree("/etc", "/usr/local", "/opt", "/var/lib/dpkg", "/root") == before
    assert node.run("systemctl is-active x", check=False).stdout.strip() == "inactive"
    check_settled(fleet)


SWAP = "#!/bin/sh\nmv ~/door ~/door.away && ln -s ~/.ssh ~/door\n"


def test_protected_paths_by_every_way(nodes: Pool, fleet: Fleet) -> None:
    """By name, through directories and links, upwards, and through a link that appears in the middle of the step."""
    (node,) = nodes(1)
    node.run(
        "echo mine > ~/.ssh/config; mkdir -p ~/fleet ~/door ~/keep; echo '{}' > ~/fleet/nodes.json; echo k > ~/keep/k;"
        " ln -s ~/.ssh ~/alias; ln -s ~/.ssh/config ~/link; ln ~/.ssh/config ~/hard",
        user="agent",
    )
    node.run("mkdir -p /srv/keep && chown agent /srv/keep")
    make = "import sqlite3; sqlite3.connect('/srv/keep/d.db').execute('create table t (id integer)')"
    node.run(
        f'python3 -c "{make}" && ln -s /srv/keep ~/kept && ln /srv/keep/d.db ~/hard.db',
        user="agent",
    )
    node.write(f"{AGENT}/swap.sh", SWAP, owner="agent")
    spelled = (
        "~/.ssh/config",
        "~/fleet/../.ssh/config",
        "~/fleet/nodes.json",
        "~/projects.json",
        "~/keep/k",
        "/srv/keep/x",
    )
    protected = ["~/keep/*", "/srv/keep"]
    fleet.declare(
        {"protected": protected, "wrappers": [wrapper(f"w{n}", dest=dest) for n, dest in enumerate(spelled)]}
    )
    refused = fleet.once()
    assert refused.code == 1
    messages = [row["message"] for row in refused.report["problems"]]
    assert sum("is protected" in message for message in messages) == len(spelled), messages
    ways = {
        "absolute": f"{AGENT}/.ssh/config",
        "through": "~/alias/config",
        "to": "~/link",
        "hard": "~/hard",
        "below": "~/kept/new/file",
    }
    entries = [wrapper(name, dest=dest) for name, dest in ways.items()]
    entries.append(wrapper("swapped", dest="~/door/config", validate=f"sh {AGENT}/swap.sh %s"))
    tables = {"t": {"columns": {"id": "INTEGER", "note": "TEXT"}}}
    schemas = [
        {"name": name, "nodes": "all", "database": path, "tables": tables}
        for name, path in {"kept": "~/kept/d.db", "hard-db": "~/hard.db"}.items()
    ]
    fleet.file("config", "#!/bin/sh\necho 1.0\n")
    tool = {"name": "config", "nodes": "all", "bin_dir": "~/.ssh", "install": {"file": "files/config"}}
    fleet.declare(
        {
            **ONCE,
            "protected": protected,
            "wrappers": entries,
            "schema": schemas,
            "tools": [tool],
        }
    )
    guarded = (f"{AGENT}/.ssh", f"{AGENT}/fleet", f"{AGENT}/keep", "/srv/keep")
    before = node.tree(*guarded)
    answer = fleet.once()
    assert answer.code == 3, answer.out
    assert [name for name, status in answer.outcomes.items() if status == "fixed"] == []
    assert len(answer.outcomes) == len(entries) + len(schemas) + 1
    details = {row["name"]: row["detail"] for row in answer.report["outcomes"]}
    unguarded = {name: detail for name, detail in details.items() if "protected" not in detail}
    assert unguarded == {}
    assert node.tree(*guarded) == before
    check_settled(fleet)


def tables_of(node: Node) -> str:
    ask = f"import sqlite3; print(sqlite3.connect('{AGENT}/s.db').execute('select sql from sqlite_master order by name').fetchall())"
    return node.run(f'python3 -c "{ask}"', user="agent").stdout


def test_nothing_of_a_database_is_ever_dropped_or_rewritten(nodes: Pool, fleet: Fleet) -> None:
    """Fewer columns or tables are no drift; another type is for a person."""
    (node,) = nodes(1)
    make = (
        f"import sqlite3; d = sqlite3.connect('{AGENT}/s.db'); d.execute('create table t (id INTEGER, note TEXT, more TEXT)');"
        " d.execute('create table u (id INTEGER)'); d.execute('create index i on t (note)')"
    )
    node.run(f'python3 -c "{make}"', user="agent")
    before = tables_of(node)

    def declare(**columns: str) -> None:
        tables = {"t": {"columns": columns}}
        fleet.declare(
            {**ONCE, "schema": [{"name": "s", "nodes": "all", "database": "~/s.db", "tables": tables}]}
        )

    declare(id="INTEGER")
    check_quiet(fleet)
    declare(id="INTEGER", note="INTEGER")
    answer = fleet.once()
    assert (answer.code, answer.outcomes) == (3, {}), answer.out
    assert "never rewritten" in answer.report["skipped"][0]["reason"]
    assert [row["reason"] for row in alert_files(fleet)] == ["NeedsPerson"]
    assert tables_of(node) == before
    # What can be added is added, and what cannot is left as it is.
    declare(id="INTEGER", note="INTEGER", new="TEXT")
    answer = fleet.once()
    assert (answer.code, answer.outcomes) == (3, {"node-1/schema/s": "failed"}), answer.out
    assert "more TEXT" in tables_of(node)
    assert "note TEXT" in tables_of(node)
    assert "new" in tables_of(node)
    check_settled(fleet)


def analyzer(fleet: Fleet, policy: str, answers: dict[str, list[list[str]]]) -> None:
    """A command that proposes commands, by the name of the tool that it is asked about."""
    script = fleet.directory / "analyzer.py"
    script.write_text(
        "import json, sys\n"
        "asked = sys.stdin.read()\n"
        f"for name, commands in {answers!r}.items():\n"
        "    if f'\"{name}\"' in asked:\n"
        "        found = {'severity': 3, 'root_cause': 'It is missing.', 'plan': '', 'install': None,\n"
        "                 'commands': commands, 'prevention': ''}\n"
        "        print(json.dumps(found))\n"
        "        break\n"
    )
    settings(
        fleet, f'[analysis]\npolicy = "{policy}"\ncommands = [{json.dumps([sys.executable, str(script)])}]\n'
    )


RUINOUS = {
    "one": [["rm", "-rf", "~/precious"]],
    "two": [["sh", "-c", "rm -rf ~/precious"]],
    "three": [["mkdir", "-p", f"{AGENT}/made"], ["sudo", "rm", "-r", f"{AGENT}/precious"]],
    "four": [["touch", f"{AGENT}/.ssh/config"]],
}


@pytest.mark.parametrize("policy", ["suggest", "allowlisted", "full"])
def test_what_an_analyzer_invents_does_not_run(nodes: Pool, fleet: Fleet, policy: str) -> None:
    """Under suggest and allowlisted no command does; full refuses these, and the rest of the same plan."""
    (node,) = nodes(1)
    node.run("mkdir ~/precious && touch ~/precious/file", user="agent")
    analyzer(fleet, policy, RUINOUS)
    fleet.declare({"tools": [{"name": name, "nodes": "all"} for name in RUINOUS]})
    before = node.tree(AGENT)
    for _ in range(2):
        answer = fleet.once()
        assert (answer.code, answer.outcomes) == (3, {}), answer.out
    assert node.tree(AGENT) == before
    assert query(fleet, "SELECT * FROM proposals") == []
    told = {row["name"]: row["advice"] for row in alert_files(fleet)}
    assert set(told) == set(RUINOUS)
    assert all("(not run)" in advice for advice in told.values()), told
    for row in fleet.events():
        if row["status"] == "detected":
            assert row["details"]["analysis"]["backend"] != "rules", row
            assert row["details"]["analysis"]["refused"], row
    assert {tuple(story) for story in stories(fleet).values()} == {("detected", "failed")}


def test_what_an_analyzer_proposes_runs_where_the_policy_allows_it(nodes: Pool, fleet: Fleet) -> None:
    """In the next pass, verified and recorded without secrets; what does not help is undone."""
    (node,) = nodes(1)
    for name, version in (("mm", "2.1"), ("nn", "1.0")):
        node.write(f"/srv/tools/{name}", packages.SCRIPT.format(name=name, version=version), mode="0755")
    node.write("/srv/tools/notes", "token=ghp_0123456789abcdefghij\n")
    make, read = ["mkdir", "-p", "~/.local/bin"], ["cat", "/srv/tools/notes"]
    copies = {name: ["cp", "-n", f"/srv/tools/{name}", f"~/.local/bin/{name}"] for name in ("mm", "nn")}
    analyzer(fleet, "full", {name: [make, copy, read] for name, copy in copies.items()})
    tools = [{"name": name, "nodes": "all", "version": ">=2.0"} for name in copies]
    fleet.declare({**ONCE, "tools": tools})
    first = fleet.once()
    assert (first.code, first.outcomes) == (3, {}), first.out
    assert all("(runs in the next pass)" in row["advice"] for row in alert_files(fleet))
    assert text(node, f"{AGENT}/.local/bin/mm") == ""
    second = fleet.once()
    assert second.outcomes == {"node-1/tool/mm": "fixed", "node-1/tool/nn": "rolled_back"}, second.out
    said = last_event(fleet, "node-1/tool/mm")["details"]["reason"]
    assert "proposed commands ran" in said
    assert "(secret)" in said
    assert "ghp_" not in json.dumps(fleet.events())
    assert "ghp_" not in second.out
    assert node.run("~/.local/bin/mm", user="agent").stdout == "mm 2.1\n"
    assert text(node, f"{AGENT}/.local/bin/nn") == ""
    states = {(row["name"], row["reason"]): row["status"] for row in alert_files(fleet)}
    assert states[("mm", "NeedsPerson")] == "resolved"
    assert states[("nn", "RepairFailed")] == "open"
    check_settled(fleet)
