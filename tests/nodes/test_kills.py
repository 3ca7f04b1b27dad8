"""Controllers that are ended, stopped or doubled at any moment: one applies, nothing is lost, nothing done twice.

RECONCILER_ROUNDS says how often a pass is ended at a random moment (`make faults`: 50 times).
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.lab import Node
from tests.nodes.conftest import Pool
from tests.nodes.fleet import Fleet
from tests.nodes.safety import (
    alert_files,
    check_quiet,
    check_settled,
    ended,
    freeze,
    go,
    is_waiting,
    leftovers,
    prepare_slow,
    query,
    report_of,
    settings,
    slow,
    stories,
    text,
    thaw,
    wait_for,
    wrapper,
)
from tests.nodes.test_fleet import everything

ROUNDS = int(os.environ.get("RECONCILER_ROUNDS", "8"))
DRIFT = (
    "systemctl --user stop task-watcher",
    "rm -f ~/odd.txt",
    "rm -f ~/.local/bin/mm",
    "echo drifted > ~/task-wrapper.sh",
    "rm -f ~/dispatch.db*",
)
# Before its handler is in place, SIGTERM ends a process as usual; after its work, nothing is left to end.
ENDS = {signal.SIGTERM: {143, -signal.SIGTERM, 0}, signal.SIGKILL: {-signal.SIGKILL, 0}}


def test_ended_at_random_moments(nodes: Pool, fleet: Fleet) -> None:
    """Whatever was under way, the next pass brings all to the desired state; the seed is in the output."""
    chance = random.Random(os.environ.get("RECONCILER_SEED", "20261121"))
    taken = nodes(3)
    # What is drifted on purpose so often would be quarantined.
    state = {**everything(fleet), "limits": {"max_corrections": 1000}, "defaults": {"retry_interval": "1s"}}
    fleet.declare(state)
    began = time.monotonic()
    assert fleet.once().code == 0
    length = min(time.monotonic() - began, 12)
    for number in range(ROUNDS):
        for node in chance.sample(taken, chance.choice((2, 3))):
            node.run("; ".join(chance.sample(DRIFT, chance.choice((1, 2, 3)))), user="agent", check=False)
        how = chance.choice((signal.SIGTERM, signal.SIGKILL))
        process = fleet.start("--once", "--output", "json")
        time.sleep(chance.uniform(0, length))
        process.send_signal(how)
        code, out, err = ended(process)
        assert code in ENDS[how], (number, how, code, out, err)
        assert "Traceback" not in err, (number, err)
        wait_for(lambda: not fleet.ansible(), "Ansible ended with its controller", 30)
        answer = fleet.once("--retry")
        assert answer.code == 0, (number, how, answer.out, answer.err)
        assert set(answer.outcomes.values()) <= {"fixed"}, answer.out
    check_quiet(fleet)
    assert alert_files(fleet) == [], "nothing failed for good"
    for node in taken:
        assert leftovers(node) == []
    assert not list(fleet.directory.glob("state.db.lease-*")), "locks of the dead are removed"


def test_two_passes_at_once(nodes: Pool, fleet: Fleet) -> None:
    """The second one says who is at it, ends with 1, and touches neither the store nor a node."""
    (node,) = nodes(1)
    prepare_slow(node)
    fleet.declare({"wrappers": [slow()]})
    process = fleet.start("--once", "--output", "json")
    wait_for(is_waiting(node), "the slow step began")
    events = fleet.events()
    before = node.tree("/home/agent")
    refused = fleet.once()
    assert refused.code == 1
    assert f"process {process.pid}" in refused.report["problems"][0]["message"]
    assert (fleet.events(), node.tree("/home/agent")) == (events, before)
    assert fleet.check().code == 2, "looking is allowed"
    go(node)
    code, out, err = ended(process)
    assert code == 0, out + err
    assert stories(fleet) == {"node-1/wrapper/w": ["detected", "fixing", "fixed"]}
    assert len(node.run("ls ~/.local/state/reconciler/journal", user="agent").stdout.split()) == 1
    check_quiet(fleet)


@pytest.fixture
def stopped() -> Iterator[list[int]]:
    """Processes that are woken in the end, whatever the test does."""
    pids: list[int] = []
    yield pids
    thaw(pids)


def declared(content: str) -> dict[str, Any]:
    """Two files: the first one's step takes long, so that the second one is still to come."""
    return {"wrappers": [slow("a", content=content), wrapper("b", content=content)]}


def epoch(node: Node) -> int:
    found = node.run("cat ~/.local/state/reconciler/epoch", user="agent", check=False).stdout
    return int(found or 0)


def begin_and_stop(
    fleet: Fleet, node: Node, *, children: bool, stopped: list[int]
) -> Callable[[], tuple[int, str, str]]:
    """A pass in the middle of its first step, stopped there; returns how to wait for its end."""
    prepare_slow(node)
    fleet.declare(declared("first\n"))
    process = fleet.start("--once", "--output", "json")
    wait_for(is_waiting(node), "the slow step began")
    stopped += freeze(process, children=children)
    return lambda: ended(process)


@pytest.mark.parametrize("children", [False, True], ids=["alone", "with-ansible"])
def test_stopped_controller_is_taken_over_and_changes_nothing_when_it_wakes(
    nodes: Pool,
    fleet: Fleet,
    stopped: list[int],
    children: bool,  # noqa: FBT001
) -> None:
    """Something else is declared meanwhile, so that a change by the stale one would be seen."""
    (node,) = nodes(1)
    settings(fleet, 'lease = "2s"\n')
    end_of_first = begin_and_stop(fleet, node, children=children, stopped=stopped)
    old = epoch(node)
    time.sleep(2.5)
    fleet.declare(declared("second\n"))
    second = fleet.start("--once", "--output", "json")
    wait_for(lambda: epoch(node) > old, "the node knows of the new epoch")
    go(node)
    code, out, err = ended(second)
    assert code == 0, out + err
    assert {row["status"] for row in report_of(out)["outcomes"]} == {"fixed"}
    events = fleet.events()
    thaw(stopped)
    stopped.clear()
    code, out, err = end_of_first()
    assert code == 3, out + err
    assert "another controller has taken over" in err
    assert "another controller has taken over" in report_of(out)["problems"][0]["message"]
    wait_for(lambda: not fleet.ansible(), "its Ansible ended with it", 30)
    assert (text(node, "/home/agent/a.sh"), text(node, "/home/agent/b.sh")) == ("second\n", "second\n")
    assert fleet.events() == events, "it has recorded nothing"
    for story in stories(fleet).values():
        assert story == ["detected", "fixing", "failed", "fixing", "fixed"]
    assert leftovers(node) == []
    check_quiet(fleet)


def test_two_databases_the_node_refuses_the_older_controller(
    nodes: Pool, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory, stopped: list[int]
) -> None:
    """Nothing but the node knows of both: a controller with a fresh database works, the one before it is refused."""
    (node,) = nodes(1)
    end_of_first = begin_and_stop(fleet, node, children=True, stopped=stopped)
    other = Fleet(tmp_path_factory.mktemp("other"), fleet.inventory)
    other.declare(declared("second\n"))
    time.sleep(1.1)  # epochs follow the clock by the second
    second = other.start("--once", "--output", "json")
    wait_for(lambda: query_or_none(other, "SELECT * FROM attempts"), "the other one has begun")
    go(node)
    code, out, err = ended(second)
    assert code == 0, out + err
    thaw(stopped)
    stopped.clear()
    code, out, err = end_of_first()
    assert code == 3, out + err
    details = {row["id"]: row["detail"] for row in report_of(out)["outcomes"]}
    assert "a newer controller" in details["node-1/wrapper/b"], details
    assert (text(node, "/home/agent/a.sh"), text(node, "/home/agent/b.sh")) == ("second\n", "second\n")
    assert other.once().code == 0
    check_settled(fleet)
    other.close()


def query_or_none(fleet: Fleet, sql: str) -> list[Any]:
    return query(fleet, sql) if fleet.db.exists() and query(fleet, "PRAGMA user_version")[0][0] > 3 else []
