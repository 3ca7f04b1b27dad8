"""Faults in the middle of an apply, on real nodes: what was there is kept, what was begun is ended, people are told.

Clocks are stood in for: nodes share this machine's clock and nothing here may set it. Times in the store, in the
node's own records and of files are moved instead, which is all that a clock that jumped leaves behind.
"""

import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.lab import Node
from tests.nodes.conftest import Pool
from tests.nodes.fleet import Fleet, trees
from tests.nodes.safety import (
    AGENT,
    alert_files,
    check_quiet,
    check_settled,
    ended,
    go,
    is_waiting,
    last_event,
    leftovers,
    prepare_slow,
    query,
    report_of,
    slow,
    stories,
    text,
    wait_for,
    wrapper,
)

KEY = "node-1/wrapper/w"
QUICK = {"defaults": {"retry_interval": "1s", "max_attempts": 2}}


def drifted(node: Node) -> None:
    prepare_slow(node)
    node.write(f"{AGENT}/w.sh", "old\n", owner="agent")


@pytest.mark.parametrize("dies", [False, True], ids=["step-goes-on", "step-dies"])
def test_sshd_killed_with_its_sessions_in_the_middle(nodes: Pool, fleet: Fleet, dies: bool) -> None:  # noqa: FBT001
    """The pass says unknown and leaves the attempt open; a later one ends it, whatever became of the step."""
    (node,) = nodes(1)
    drifted(node)
    fleet.declare({"wrappers": [slow()]})
    process = fleet.start("--once", "--output", "json")
    wait_for(is_waiting(node), "the slow step began")
    node.cut()
    if dies:
        node.run("pkill -KILL -u agent python3; pkill -KILL -u agent -f slow.sh; true")
    code, out, err = ended(process)
    assert code == 4, out + err
    assert report_of(out)["outcomes"] == []
    assert stories(fleet) == {KEY: ["detected", "fixing"]}
    assert text(node) == "old\n"
    go(node)
    if not dies:
        wait_for(lambda: text(node) == "new\n", "the step went on without its session")
    node.uncut()
    answer = fleet.once()
    assert (answer.code, answer.outcomes) == (0, {KEY: "fixed"}), answer.out
    assert stories(fleet) == {KEY: ["detected", "fixing", "fixed"]}
    assert leftovers(node) == []
    assert text(node) == "new\n"
    check_quiet(fleet)


@pytest.mark.parametrize("late", [False, True], ids=["in-time", "after-the-pass-gave-up"])
def test_a_node_paused_in_the_middle_and_resumed(nodes: Pool, fleet: Fleet, late: bool) -> None:  # noqa: FBT001
    (node,) = nodes(1)
    drifted(node)
    fleet.declare({"wrappers": [slow()]})
    process = fleet.start("--once", "--output", "json")
    wait_for(is_waiting(node), "the slow step began")
    node.pause()
    try:
        if late:
            code, out, err = ended(process)
            assert code == 4, out + err
            assert "no answer" in out or "timed out" in out.lower(), out
            assert stories(fleet) == {KEY: ["detected", "fixing"]}
        else:
            time.sleep(3)
    finally:
        node.resume()
    go(node)
    if not late:
        code, out, err = ended(process)
        assert code == 0, out + err
    answer = fleet.once()
    assert answer.code == 0, answer.out
    assert stories(fleet) == {KEY: ["detected", "fixing", "fixed"]}
    assert (text(node), leftovers(node)) == ("new\n", [])
    check_quiet(fleet)


def fail_until_told(fleet: Fleet, reasons: dict[str, str]) -> None:
    """Both attempts of each are undone, the last one with one alert; the wait after it is kept."""
    expected = dict.fromkeys(reasons, "rolled_back")
    for attempt in (1, 2):
        answer = fleet.once("--retry")
        assert (answer.code, answer.outcomes) == (3, expected), answer.out
        for row in answer.report["outcomes"]:
            assert reasons[row["id"]] in row["detail"]
            assert "the undo failed" not in row["detail"]
        assert len(alert_files(fleet)) == (len(reasons) if attempt == 2 else 0)
    waits = fleet.once()
    assert (waits.code, waits.outcomes) == (3, {}), waits.out
    told = {row["key"]: row for row in alert_files(fleet)}
    assert set(told) == set(reasons)
    for key, row in told.items():
        assert (row["reason"], row["status"]) == ("RepairFailed", "open")
        assert reasons[key] in row["detail"]
    check_settled(fleet)


def mends(fleet: Fleet, keys: Iterable[str]) -> None:
    """Once the trouble is over, the next attempt succeeds and the alert is resolved."""
    answer = fleet.once("--retry")
    assert (answer.code, answer.outcomes) == (0, dict.fromkeys(keys, "fixed")), answer.out
    assert {row["status"] for row in alert_files(fleet)} == {"resolved"}
    check_quiet(fleet)


# What keeps a file from being replaced: how it is brought about, how it ends, and what it is called.
TROUBLE = {
    "backup": ("head -c 600000 /dev/zero > {at}/filler", "rm {at}/filler", "No space left"),
    "new-file": (
        "head -c 600000 /dev/zero > {at}/filler; truncate -s -60000 {at}/filler",
        "rm {at}/filler",
        "No space left",
    ),
    "read-only": ("mount -o remount,ro {at}", "mount -o remount,rw {at}", "Read-only file system"),
    "theirs": ("chown -R root: {at}; chmod 0755 {at}", "chown -R agent: {at}", "Permission denied"),
}


def test_places_that_cannot_be_written(nodes: Pool, fleet: Fleet) -> None:
    """No room for the backup or for the new file, read-only, somebody else's: old files stay as they are."""
    (node,) = nodes(1)
    for name, (trouble, _end, _reason) in TROUBLE.items():
        at = f"/srv/{name}"
        node.run(f"mkdir {at} && mount -t tmpfs -o size=512k,mode=0755,uid=1000,gid=1000 tmpfs {at}")
        node.write(f"{at}/w", "o" * 20_000, owner="agent", mode="0644")
        node.run(f"{trouble.format(at=at)}; true")
    places = [f"/srv/{name}" for name in TROUBLE]
    before = node.tree(*places)
    entries = [wrapper(name, dest=f"/srv/{name}/w", content="n" * 100_000) for name in TROUBLE]
    fleet.declare({**QUICK, "wrappers": entries})
    reasons = {f"node-1/wrapper/{name}": reason for name, (_trouble, _end, reason) in TROUBLE.items()}
    fail_until_told(fleet, reasons)
    after = node.tree(*places)
    for at in places:
        assert after[f"{at}/w"] == before[f"{at}/w"]
    assert {path for path in after if not path.endswith(".bak")} == set(before)
    for name, (_trouble, end, _reason) in TROUBLE.items():
        node.run(end.format(at=f"/srv/{name}"))
    mends(fleet, reasons)
    assert {node.tree(at)[f"{at}/w"].mode for at in places} == {"0644"}
    assert node.run("find /srv -name '*.new' -o -name '*.part'").stdout == ""


def test_what_may_not_even_be_read_is_unknown(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    node.run(f"echo theirs > {AGENT}/w.sh && chmod 0600 {AGENT}/w.sh")
    fleet.declare({**QUICK, "wrappers": [wrapper()]})
    answer = fleet.once()
    assert (answer.code, answer.outcomes, fleet.events()) == (4, {}, []), answer.out
    assert "Permission denied" in answer.report["unknown"][0]["reason"]
    assert text(node) == "theirs\n"


def test_no_room_for_the_nodes_own_records(nodes: Pool, fleet: Fleet) -> None:
    """What cannot be put on record is not begun."""
    (node,) = nodes(1)
    drifted(node)
    state = f"{AGENT}/.local/state"
    node.run(f"mkdir -p {state}", user="agent")
    node.run(f"mount -t tmpfs -o size=64k,mode=0777 tmpfs {state}")
    node.run(f"head -c 100000 /dev/zero > {state}/filler; true", user="agent")
    fleet.declare({**QUICK, "wrappers": [wrapper()]})
    before = node.tree(AGENT, "/etc")
    fail_until_told(fleet, {KEY: "No space left"})
    after = node.tree(AGENT, "/etc")
    assert {path: entry for path, entry in after.items() if not path.startswith(state)} == {
        path: entry for path, entry in before.items() if not path.startswith(state)
    }
    node.run(f"rm {state}/filler")
    mends(fleet, [KEY])


LOCK = (
    "import sqlite3, sys, time; d = sqlite3.connect('{path}', isolation_level=None); d.execute('BEGIN IMMEDIATE');"
    " open('{path}.held', 'w').close(); time.sleep({seconds}); d.execute('ROLLBACK')"
)


def held_by_a_writer(node: Node, name: str, seconds: int) -> None:
    path = f"{AGENT}/{name}.db"
    make = "import sqlite3; sqlite3.connect('{path}').execute('create table t (id integer)')"
    node.run(f'python3 -c "{make.format(path=path)}"', user="agent")
    locking = LOCK.format(path=path, seconds=seconds)
    node.run(f'setsid python3 -c "{locking}" >/dev/null 2>&1 </dev/null &', user="agent")
    wait_for(
        lambda: node.run(f"test -e {path}.held", check=False).returncode == 0, "the writer holds the lock"
    )


def columns(node: Node, name: str) -> str:
    ask = f"import sqlite3; print([r[1] for r in sqlite3.connect('{AGENT}/{name}.db').execute('pragma table_info(t)')])"
    return node.run(f'python3 -c "{ask}"', user="agent").stdout.strip()


def test_a_database_that_a_writer_holds(nodes: Pool, fleet: Fleet) -> None:
    """For a while: waited for. For longer: failed, nothing half done, and repaired once it is free."""
    (node,) = nodes(1)
    held_by_a_writer(node, "short", 8)
    held_by_a_writer(node, "long", 3600)
    tables = {"t": {"columns": {"id": "INTEGER", "note": "TEXT", "more": "TEXT"}}}
    schemas: list[dict[str, Any]] = [
        {"name": name, "nodes": "all", "database": f"~/{name}.db", "tables": tables}
        for name in ("short", "long")
    ]
    fleet.declare({**QUICK, "schema": schemas})
    answer = fleet.once()
    assert answer.code == 3, answer.out
    assert answer.outcomes == {"node-1/schema/short": "fixed", "node-1/schema/long": "failed"}, answer.out
    assert "locked" in last_event(fleet, "node-1/schema/long")["details"]["reason"]
    assert columns(node, "short") == "['id', 'note', 'more']"
    assert columns(node, "long") == "['id']"
    node.run("pkill -f '[l]ong.db.held'")
    mended = fleet.once("--retry")
    assert (mended.code, mended.outcomes) == (0, {"node-1/schema/long": "fixed"}), mended.out
    assert columns(node, "long") == "['id', 'note', 'more']"
    assert leftovers(node) == []
    check_quiet(fleet)


def test_the_controllers_clock_jumps_an_hour_both_ways(nodes: Pool, fleet: Fleet) -> None:
    """What waits is tried at most once too often; nothing waits for a time that a wrong clock gave."""
    (node,) = nodes(1)
    drifted(node)
    fleet.declare(
        {
            "defaults": {"retry_interval": "10m", "max_attempts": 9},
            "wrappers": [wrapper(validate="test -e /home/agent/go -o -z %s")],
        }
    )
    assert fleet.once().outcomes == {KEY: "rolled_back"}
    assert fleet.once().outcomes == {}, "it waits"
    move(fleet, timedelta(hours=1))  # the clock has been set back: the last attempt lies in the future
    assert fleet.once().outcomes == {KEY: "rolled_back"}
    assert fleet.once().outcomes == {}, "it waits again, by the clock that holds now"
    move(fleet, timedelta(hours=-1))  # set forward
    assert fleet.once().outcomes == {KEY: "rolled_back"}
    go(node)
    # An epoch that was given while the clock was ahead: everybody's grows from there.
    ahead = int(time.time()) + 3600
    query(fleet, "UPDATE lease SET epoch = ?", ahead)
    node.run(f"echo {ahead} > ~/.local/state/reconciler/epoch", user="agent")
    move(fleet, timedelta(hours=1))
    mended = fleet.once()
    assert (mended.code, mended.outcomes) == (0, {KEY: "fixed"}), mended.out
    assert int(node.run("cat ~/.local/state/reconciler/epoch", user="agent").stdout) == ahead + 1
    check_quiet(fleet)


def move(fleet: Fleet, by: timedelta) -> None:
    """Move what the store knows of attempts."""
    for column in ("last_attempt", "next_attempt"):
        for key, moment in query(fleet, f"SELECT issue_key, {column} FROM repairs"):
            if moment:
                moved = datetime.fromisoformat(moment).astimezone(UTC) + by
                query(fleet, f"UPDATE repairs SET {column} = ? WHERE issue_key = ?", moved.isoformat(), key)


@pytest.mark.parametrize("jump", ["-1 hour", "+1 hour"])
def test_a_nodes_clock_jumps_an_hour(nodes: Pool, fleet: Fleet, jump: str) -> None:
    """Everything that was written there is an hour older or lies an hour in the future: that alone is no drift."""
    (node,) = nodes(1)
    drifted(node)
    fleet.file("x.service", "[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=default.target\n")
    service = {"name": "x", "nodes": "all", "scope": "user", "unit": "files/x.service", "enabled": True, "settle": 0.3,
               "restart_on": ["~/w.sh"]}  # fmt: skip
    fleet.declare({"wrappers": [wrapper()], "services": [service]})
    assert fleet.once().code == 0
    node.run(f"touch -d '{jump}' ~/w.sh ~/w.sh.*.bak ~/.config/systemd/user/x.service $(find ~/.local/state/reconciler);"
             " systemctl --user daemon-reload; systemctl --user restart x", user="agent")  # fmt: skip
    for _ in range(2):
        check_quiet(fleet)
    before = trees([node])
    fleet.declare({"wrappers": [wrapper(content="newer\n")], "services": [service]})
    answer = fleet.once()
    assert answer.code == 0, answer.out
    assert set(answer.outcomes) == {KEY, "node-1/service/x"}
    kept = {path for path in trees([node])["node-1"] if path.endswith(".bak")}
    assert {path for path in before["node-1"] if path.endswith(".bak")} < kept, "no backup was pruned"
    check_quiet(fleet)


def test_a_node_that_is_cut_off_for_ten_passes_is_told_of_once(nodes: Pool, fleet: Fleet) -> None:
    taken = nodes(2)
    fleet.declare({"limits": {"unknown_alert_after": "0s"}, "wrappers": [wrapper()]})
    assert fleet.once().code == 0
    events = fleet.events()
    taken[1].cut()
    for _ in range(10):
        answer = fleet.once()
        assert answer.code == 4, answer.out
        assert [(row["key"], row["reason"], row["status"]) for row in alert_files(fleet)] == [
            ("node-2", "NodeUnknown", "open")
        ]
    assert fleet.events() == events
    taken[1].uncut()
    for _ in range(2):
        check_quiet(fleet)
    (told,) = alert_files(fleet)
    assert (told["status"], told["occurrences"]) == ("resolved", 10)
