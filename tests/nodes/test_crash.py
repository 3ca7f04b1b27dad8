"""A controller killed at any boundary, for every kind: the next pass carries on, and nothing is lost or done twice.

Each case kills the controller at one failpoint (its own, or one inside a step on the node, where the step dies with
it), then lets passes run until all is quiet.
"""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from reconciler.failpoints import NAMES
from tests.lab import Lab, Node
from tests.nodes import packages
from tests.nodes.conftest import Pool
from tests.nodes.fleet import Answer, Fleet, trees

TERMINAL = {"fixed", "failed", "rolled_back"}
ON_NODE = ("saved", "backed-up", "applying", "changed", "applied")
ON_NODE_UNDOING = ("restoring", "restored", "rolled-back")
UNDOING = ("undoing", "undone")
AGENT = "/home/agent"
COUNT = "#!/bin/bash\necho once >> ~/{name}.log\n{more}"
UNIT = """\
[Service]
ExecStartPre=/bin/sh -c 'echo once >> {home}/service.log'
ExecStart=/bin/sh -c '{command}'
[Install]
WantedBy=default.target
"""


@dataclass
class Case:
    """One resource of each kind, each on a node of its own, all of them drifted; ``good`` ones can be repaired."""

    fleet: Fleet
    lab: Lab
    nodes: list[Node]
    good: bool = True

    def declare(self) -> None:
        """The desired state; a repair that cannot hold where the case is about the undo."""
        command = "exec sleep infinity" if self.good else "exit 3"
        self.fleet.file("x.service", UNIT.format(home=AGENT, command=command))
        self.fleet.file("w.sh", "#!/bin/sh\n# new\n")
        self.fleet.file("mm", packages.SCRIPT.format(name="mm", version="2.1" if self.good else "1.9"))
        columns = {"id": "INTEGER PRIMARY KEY", "note": "TEXT"}
        self.fleet.declare(
            {
                "defaults": {"retry_interval": "1s"},
                "ssh": [{"nodes": "all"}],
                "schema": [{"name": "s", "nodes": "node-2", "database": "~/s.db", "tables": {"t": {"columns": columns}}}],
                "tools": [{"name": "mm", "nodes": "node-3", "version": ">=2.0", "install": {"file": "files/mm"}}],
                "wrappers": [{"name": "w", "nodes": "node-1", "src": "files/w.sh", "dest": "~/w.sh",
                              "validate": "sh /home/agent/count.sh %s"}],
                "services": [{"name": "x", "nodes": "node-4", "scope": "user", "unit": "files/x.service",
                              "enabled": True, "settle": 0.3}],
            }
        )  # fmt: skip

    def drift(self) -> None:
        """Something old in each place, worth a backup."""
        wrapper, schema, tool, service = self.nodes
        for node in self.nodes:
            node.run("rm -f ~/failpoint ~/*.log", user="agent")
        wrapper.write(
            f"{AGENT}/count.sh",
            COUNT.format(name="wrapper", more="" if self.good else "exit 4\n"),
            owner="agent",
        )
        wrapper.write(f"{AGENT}/w.sh", "#!/bin/sh\n# old\n", owner="agent")
        script = "import sqlite3; d = sqlite3.connect('/home/agent/s.db'); d.execute('create table t (id integer primary key)');"
        schema.run(f"python3 -c \"{script} d.execute('insert into t values (7)'); d.commit()\"", user="agent")
        tool.run(
            "mkdir -p ~/.local/bin && echo old > ~/.local/bin/mm && chmod +x ~/.local/bin/mm", user="agent"
        )
        service.run("mkdir -p ~/.config/systemd/user", user="agent")
        service.write(
            f"{AGENT}/.config/systemd/user/x.service", "[Service]\nExecStart=/bin/true\n", owner="agent"
        )

    def arm(self, points: dict[str, str] | None) -> None:
        """Failpoints inside steps, by node; None disarms them."""
        variables: dict[str, Any] = {}
        for node in self.nodes:
            variables[node.name] = dict(self.lab.host_vars(node))
            if points:
                variables[node.name]["reconciler_environment"] = {"RECONCILER_FAILPOINT": points[node.name]}
        self.lab.write_inventory(variables, {"fleet": [node.name for node in self.nodes]})

    def crash_at_node(self, name: str, kinds: dict[str, str], waits: set[str]) -> None:
        """Let every step that gets so far stand still there, then kill the controller and the steps."""
        self.arm({node.name: f"node:{name}:{kinds[node.name]}" for node in self.nodes})
        process = self.fleet.start("--once", "--output", "json")
        deadline = time.monotonic() + 60
        stopped: set[str] = set()
        while stopped != waits and time.monotonic() < deadline and process.poll() is None:
            stopped = {
                node.name
                for node in self.nodes
                if node.run("cat ~/failpoint", user="agent", check=False).stdout
            }
            time.sleep(0.05)
        assert stopped == waits, (
            stopped,
            process.poll(),
            process.communicate() if process.poll() is not None else "",
        )
        process.kill()
        process.communicate()
        for node in self.nodes:
            if node.name in waits:
                node.run("kill -9 $(cat ~/failpoint); rm ~/failpoint", user="agent")
        self.arm(None)

    def crash(self, name: str) -> None:
        """Let the controller kill itself at one of its own failpoints."""
        argv, env = self.fleet.command("--once", "--output", "json")
        done = subprocess.run(
            argv, env={**env, "RECONCILER_FAILPOINT": name}, cwd=self.fleet.directory, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, (done.returncode, done.stdout, done.stderr)

    def until_quiet(self, code: int) -> list[Answer]:
        """Passes until one has nothing to act on; then one more, which must not touch anything."""
        answers = []
        for _ in range(4):
            # What failed is due again by then; a pass that comes too early has nothing to do either.
            time.sleep(0 if self.good else 2.6)
            answers.append(self.fleet.once("--retry") if self.good else self.fleet.once())
            if not answers[-1].report["outcomes"]:
                break
        assert answers[-1].report["outcomes"] == [], answers[-1].out
        before = trees(self.nodes)
        last = self.fleet.once()
        assert (last.code, last.report["outcomes"]) == (code, []), last.out
        assert trees(self.nodes) == before
        return answers

    def check_story(self, *, ended: str) -> None:
        """One ``detected`` per resource, exactly one end per attempt, none left open."""
        stories: dict[str, list[str]] = {}
        for row in self.fleet.events():
            stories.setdefault(row["issue_key"], []).append(row["status"])
        for key in (
            "node-1/wrapper/w",
            "node-3/tool/mm",
            "node-4/service/x",
            *(["node-2/schema/s"] if self.good else []),
        ):
            story = stories[key]
            assert story[0] == "detected", (key, story)
            assert story.count("detected") == 1, (key, story)
            attempts = story[1:]
            assert attempts[0::2] == ["fixing"] * len(attempts[0::2]), (key, story)
            assert all(status in TERMINAL for status in attempts[1::2]), (key, story)
            assert len(attempts) % 2 == 0, (key, story)
            assert story[-1] == ended, (key, story)

    def check_told(self, *, times: int) -> None:
        """So many alerts for each resource, over all passes."""
        files = sorted((self.fleet.directory / "alerts").glob("*.json"))
        told = Counter(json.loads(path.read_text())["key"] for path in files)
        keys = ("node-1/wrapper/w", "node-3/tool/mm", "node-4/service/x")
        assert dict(told) == (dict.fromkeys(keys, times) if times else {}), [
            path.read_text() for path in files
        ]

    def check_nothing_lost(self) -> None:
        """What was there before is in a backup on the node, whole; nothing half written lies about."""
        wrapper, schema, _tool, service = self.nodes
        copies = wrapper.run("cat ~/w.sh.*.bak", user="agent").stdout
        assert "# old" in copies
        units = service.run("cat ~/.config/systemd/user/x.service.*.bak", user="agent").stdout
        assert "/bin/true" in units
        script = "import sqlite3,glob; print([sqlite3.connect(p).execute('select id from t').fetchall() for p in glob.glob('/home/agent/s.db.*.bak')])"
        assert "[(7,)]" in schema.run(f'python3 -c "{script}"', user="agent").stdout
        assert schema.run("python3 -c \"import sqlite3; print(sqlite3.connect('/home/agent/s.db').execute('select id from t').fetchall())\"", user="agent").stdout.strip() == "[(7,)]"  # fmt: skip
        for node in self.nodes:
            left = node.run("find ~ -name '*.new' -o -name '*.part'", user="agent").stdout
            assert left == "", (node.name, left)

    def check_done_once(self) -> None:
        """Each change was made once: the file validated once, the tool installed once, the service started once."""
        wrapper, _schema, tool, service = self.nodes
        assert wrapper.run("cat ~/wrapper.log", user="agent").stdout.split() == ["once"]
        assert len(tool.run("ls ~/.local/share/reconciler/tools/mm", user="agent").stdout.split()) == 1
        assert service.run("cat ~/service.log", user="agent").stdout.split() == ["once"]


@pytest.fixture
def case(nodes: Pool, fleet: Fleet) -> Callable[..., Case]:
    """A case over four clean nodes."""

    def make(*, good: bool = True) -> Case:
        made = Case(fleet, nodes.lab, nodes(4), good)
        made.declare()
        made.drift()
        return made

    return make


KINDS = {"node-1": "wrapper", "node-2": "schema", "node-3": "tool", "node-4": "service"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNDOING])
def test_controller_killed_at_its_own_boundaries(case: Callable[..., Case], name: str) -> None:
    """With dead control sockets, too, which the pass replaces."""
    made = case()
    made.fleet.check()
    for master in made.fleet.masters():
        os.kill(master, signal.SIGKILL)
    made.crash(name)
    made.until_quiet(0)
    made.check_story(ended="fixed")
    made.check_nothing_lost()
    made.check_done_once()
    made.check_told(times=0)
    assert len(made.fleet.masters()) == 4


@pytest.mark.parametrize("name", ON_NODE)
def test_controller_and_steps_killed_inside_a_step(case: Callable[..., Case], name: str) -> None:
    """On every node in the middle of its own kind's step."""
    made = case()
    made.crash_at_node(name, KINDS, set(KINDS))
    made.until_quiet(0)
    made.check_story(ended="fixed")
    made.check_nothing_lost()
    made.check_done_once()
    made.check_told(times=0)


@pytest.mark.parametrize("name", ["applied", "verified", *UNDOING, "ended"])
def test_controller_killed_while_it_undoes(case: Callable[..., Case], name: str) -> None:
    """Repairs that do not hold: whatever happens, they are undone, tried once more, and then told."""
    made = case(good=False)
    made.crash(name)
    made.until_quiet(3)
    made.check_story(ended="rolled_back")
    check_undone(made)


@pytest.mark.parametrize("name", ON_NODE_UNDOING)
def test_controller_and_steps_killed_inside_an_undo(case: Callable[..., Case], name: str) -> None:
    """The undo goes on where it was."""
    made = case(good=False)
    made.crash_at_node(name, KINDS, set(KINDS) - {"node-2"})
    made.until_quiet(3)
    made.check_story(ended="rolled_back")
    check_undone(made)


def check_undone(made: Case) -> None:
    """As before, and no more than two attempts each."""
    wrapper, _schema, tool, service = made.nodes
    assert "# old" in wrapper.run("cat ~/w.sh", user="agent").stdout
    assert tool.run("cat ~/.local/bin/mm", user="agent").stdout == "old\n"
    assert "/bin/true" in service.run("cat ~/.config/systemd/user/x.service", user="agent").stdout
    made.check_told(times=1)
    begun = Counter(row["issue_key"] for row in made.fleet.events() if row["status"] == "fixing")
    assert begun["node-1/wrapper/w"] == begun["node-3/tool/mm"] == begun["node-4/service/x"] == 2
