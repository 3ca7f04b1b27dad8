"""What tests of safe convergence share: slow steps, stories of resources, and what has to hold in the end."""

import json
import os
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.lab import Node
from tests.nodes.fleet import Fleet

TERMINAL = {"fixed", "failed", "rolled_back"}
AGENT = "/home/agent"
# Stands in for anything that takes long in the middle of a step: it goes on when the test says so.
SLOW = "#!/bin/sh\ntouch ~/waiting\nwhile [ ! -e ~/go ]; do sleep 0.1; done\n"


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """What the condition gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"it never happened: {what}")


def wrapper(name: str = "w", **fields: Any) -> dict[str, Any]:
    """A managed file on all nodes."""
    given = {"name": name, "nodes": "all", "dest": f"~/{name}.sh", "content": "new\n"}
    return {**given, **fields}


def slow(name: str = "w", **fields: Any) -> dict[str, Any]:
    """One whose step stands still, with the new file written beside the old one, until ``go`` is said."""
    return wrapper(name, validate=f"sh {AGENT}/slow.sh %s", **fields)


def prepare_slow(node: Node) -> None:
    """The node's part of it."""
    node.write(f"{AGENT}/slow.sh", SLOW, owner="agent")
    node.run("rm -f ~/waiting ~/go", user="agent")


def is_waiting(node: Node) -> Callable[[], bool]:
    """Whether the slow step has begun there."""
    return lambda: node.run("test -e ~/waiting", user="agent", check=False).returncode == 0


def go(node: Node) -> None:
    """Let the slow step go on."""
    node.run("touch ~/go", user="agent")


def text(node: Node, path: str = f"{AGENT}/w.sh") -> str:
    """What stands in a file, or nothing."""
    return node.run(f"cat {path}", check=False).stdout


def leftovers(node: Node) -> list[str]:
    """Files that were written beside others and never put into their place."""
    where = f"{AGENT} /etc /usr/local /opt /root"
    names = "-name '*.new' -o -name '*.part'"
    return node.run(f"find {where} -xdev {names}", check=False).stdout.split()


def stories(fleet: Fleet) -> dict[str, list[str]]:
    """The statuses of every resource's events, in order."""
    found: dict[str, list[str]] = {}
    for row in sorted(fleet.events(), key=lambda row: row["id"]):
        found.setdefault(row["issue_key"], []).append(row["status"])
    return found


def last_event(fleet: Fleet, key: str) -> dict[str, Any]:
    """The newest event of a resource."""
    return max((row for row in fleet.events() if row["issue_key"] == key), key=lambda row: row["id"])


def alert_files(fleet: Fleet) -> list[dict[str, Any]]:
    """Alerts as programs see them."""
    return [json.loads(path.read_text()) for path in sorted((fleet.directory / "alerts").glob("*.json"))]


def query(fleet: Fleet, sql: str, *values: Any) -> list[Any]:
    """Look into the store, or change it where a test has to stand in for a clock."""
    with closing(sqlite3.connect(fleet.db, timeout=30)) as database, database:
        return database.execute(sql, values).fetchall()


def check_settled(fleet: Fleet) -> None:
    """Every attempt that began has exactly one end, none is open, and nobody was alerted twice of one thing."""
    for key, story in stories(fleet).items():
        begun = False
        for status in story:
            if status == "fixing":
                assert not begun, (key, story)
                begun = True
            elif status in TERMINAL and begun:
                begun = False
        assert not begun, (key, story)
    assert query(fleet, "SELECT issue_key FROM attempts") == []
    raised = Counter((row["key"], row["reason"]) for row in alert_files(fleet) if row["status"] == "open")
    assert all(count == 1 for count in raised.values()), raised


def check_quiet(fleet: Fleet) -> None:
    """A pass that finds all as desired."""
    answer = fleet.once()
    assert (answer.code, answer.report["drifts"], answer.report["outcomes"]) == (0, [], []), answer.out
    check_settled(fleet)


def settings(fleet: Fleet, content: str) -> None:
    """The settings file of the project."""
    (fleet.directory / "reconciler.toml").write_text(content)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code and output of a started pass."""
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def descendants(pid: int) -> list[int]:
    """Processes that this one started, theirs included, whatever session they are in."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        started = children.get(waiting.pop(), [])
        found += started
        waiting += started
    return found


def freeze(process: "subprocess.Popen[str]", *, children: bool) -> list[int]:
    """Stop a controller where it stands, with or without what it started; returns what was stopped."""
    pids = [process.pid, *(descendants(process.pid) if children else ())]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


def thaw(pids: list[int]) -> None:
    """Let them go on; children first, so that nobody finds them stopped."""
    for pid in reversed(pids):
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGCONT)


def report_of(out: str) -> Mapping[str, Any]:
    """The report that a started pass printed."""
    document: dict[str, Any] = json.loads(out)
    return document
