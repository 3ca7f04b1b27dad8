"""A controller or a step of a heartbeat killed at any boundary: the next pass carries on, nothing is lost or done twice."""

import signal
import subprocess
import time
from typing import Any

import pytest

from reconciler.failpoints import NAMES
from tests.lab import Node
from tests.nodes import heartbeats as h
from tests.nodes.conftest import Pool
from tests.nodes.fleet import Fleet, trees
from tests.nodes.safety import wait_for

ON_NODE = ("saved", "backed-up", "applying", "changed", "applied")
UNDOING = ("undoing", "undone")
KEY = "node-1/heartbeat/architect"
INSTRUCTIONS = f"{h.HOME}/.openclaw/workspace-architect/HEARTBEAT.md"


def prepare(nodes: Pool, fleet: Fleet, *, good: bool = True) -> Node:
    """One agent whose HEARTBEAT.md somebody wrote; no timer fires by itself. What is not ``good`` cannot be repaired."""
    (node,) = nodes(1)
    h.prepare([node])
    entry = {**h.agents([node])[0], "every": "365d", "late_after": "365d", "service": None}
    if not good:
        entry["sources"] = {"workboard": {"list": ["false"]}, "multica": None, "documents": None}
    fleet.declare({"defaults": {"retry_interval": "1s"}, "heartbeats": [entry]})
    node.run(f"mkdir -p $(dirname {INSTRUCTIONS})", user="agent")
    node.write(INSTRUCTIONS, "# old\n", owner="agent")
    return node


def crash(fleet: Fleet, name: str) -> None:
    """Let the controller kill itself at one of its own failpoints."""
    argv, env = fleet.command("--once", "--output", "json")
    done = subprocess.run(
        argv, env={**env, "RECONCILER_FAILPOINT": name}, cwd=fleet.directory, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, (done.returncode, done.stdout, done.stderr)


def crash_inside(nodes: Pool, fleet: Fleet, node: Node, name: str) -> None:
    """Let the step stand still there, then kill the controller and the step."""
    armed = {"reconciler_environment": {"RECONCILER_FAILPOINT": f"node:{name}:heartbeat"}}
    plain: dict[str, Any] = dict(nodes.lab.host_vars(node))
    nodes.lab.write_inventory({node.name: {**plain, **armed}}, {"fleet": [node.name]})
    process = fleet.start("--once", "--output", "json")
    wait_for(
        lambda: node.run("cat ~/failpoint", user="agent", check=False).stdout, f"the step reaches {name}", 90
    )
    process.kill()
    process.communicate()
    node.run("kill -9 $(cat ~/failpoint); rm ~/failpoint", user="agent")
    nodes.lab.write_inventory({node.name: plain}, {"fleet": [node.name]})


def until_quiet(fleet: Fleet, node: Node, code: int) -> None:
    """Passes until one has nothing to act on; then one more, which must not touch anything."""
    for _ in range(5):
        answer = fleet.once("--retry") if code == 0 else fleet.once()
        if not answer.report["outcomes"]:
            break
        time.sleep(0 if code == 0 else 2.6)
    assert answer.report["outcomes"] == [], answer.out
    before = trees([node])
    last = fleet.once()
    assert (last.code, last.report["outcomes"]) == (code, []), last.out
    assert trees([node]) == before


def check(fleet: Fleet, node: Node, ended: str) -> None:
    """One ``detected``, one end for each attempt; what was there before is kept, and nothing half written lies about."""
    story = [row["status"] for row in fleet.events() if row["issue_key"] == KEY]
    assert story[0] == "detected"
    assert story.count("detected") == 1
    assert story[1::2] == ["fixing"] * len(story[1::2])
    assert len(story) % 2 == 1
    assert story[-1] == ended
    assert "# old" in node.run(f"cat {INSTRUCTIONS}.*.bak", user="agent").stdout
    assert node.run("find ~ -name '*.new' -o -name '*.part'", user="agent").stdout == ""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNDOING])
def test_controller_killed_at_its_own_boundaries(nodes: Pool, fleet: Fleet, name: str) -> None:
    """It converges, and nobody is told."""
    node = prepare(nodes, fleet)
    crash(fleet, name)
    until_quiet(fleet, node, 0)
    check(fleet, node, "fixed")
    assert node.read(INSTRUCTIONS).decode().startswith("# 梁思筑")
    assert h.alerts(fleet, "--all") == []


@pytest.mark.parametrize("name", ON_NODE)
def test_controller_and_step_killed_inside_a_step(nodes: Pool, fleet: Fleet, name: str) -> None:
    """The same."""
    node = prepare(nodes, fleet)
    crash_inside(nodes, fleet, node, name)
    until_quiet(fleet, node, 0)
    check(fleet, node, "fixed")
    assert h.alerts(fleet, "--all") == []


@pytest.mark.parametrize("name", UNDOING)
def test_controller_killed_while_it_undoes(nodes: Pool, fleet: Fleet, name: str) -> None:
    """A beat that cannot be made: files and timer are as before, and one alert says why."""
    node = prepare(nodes, fleet, good=False)
    crash(fleet, name)
    until_quiet(fleet, node, 3)
    check(fleet, node, "rolled_back")
    assert node.read(INSTRUCTIONS) == b"# old\n"
    assert node.run("test -e ~/.local/bin/heartbeat", user="agent", check=False).returncode == 1
    assert [row["reason"] for row in h.alerts(fleet) if row["name"] == "architect"].count("RepairFailed") == 1
