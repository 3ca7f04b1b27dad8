"""How far a pass goes: canary, batches, the guard over mass changes, quarantine, suspension, windows, old backups."""

import subprocess
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.lab import Node
from tests.nodes import packages
from tests.nodes.conftest import Pool
from tests.nodes.fleet import Fleet
from tests.nodes.safety import (
    AGENT,
    alert_files,
    check_quiet,
    check_settled,
    query,
    stories,
    text,
    wrapper,
)

NEW = "new\n"


def has_new(taken: list[Node]) -> list[str]:
    return [node.name for node in taken if text(node) == NEW]


def skipped(report: dict[str, Any]) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in report["skipped"]}


def test_a_pass_that_would_change_too_much_stops_after_a_canary(nodes: Pool, fleet: Fleet) -> None:
    """Until somebody has looked; then in batches."""
    taken = nodes(4)
    fleet.declare({"limits": {"max_changed_nodes": "50%", "batch_size": "2"}, "wrappers": [wrapper()]})
    held = fleet.once()
    assert (held.code, held.outcomes) == (3, {"node-1/wrapper/w": "fixed"}), held.out
    assert all("--allow-mass-change" in reason for reason in skipped(held.report).values())
    assert [(row["key"], row["reason"]) for row in alert_files(fleet)] == [("fleet", "MassChange")]
    again = fleet.once()
    assert (again.code, again.outcomes) == (3, {}), "also the next pass, although it would change fewer nodes"
    assert has_new(taken) == ["node-1"]
    lifted = fleet.once("--allow-mass-change")
    assert lifted.code == 0, lifted.out
    assert len(has_new(taken)) == 4
    runs = [run["nodes"] for run in lifted.report["durations"]["runs"] if run["playbook"] == "converge.yml"]
    assert runs == [1, 2], "a canary of its own, then a batch"
    assert [row["status"] for row in alert_files(fleet)] == ["resolved"]
    check_quiet(fleet)


def test_a_failing_canary_stops_the_rest(nodes: Pool, fleet: Fleet) -> None:
    """A canary is the first node; where it is the node's own trouble, the next pass takes another one."""
    taken = nodes(3)
    for node in taken[1:]:
        node.run("touch ~/fine", user="agent")
    fleet.declare(
        {
            "defaults": {"retry_interval": "1h"},
            "wrappers": [wrapper(validate=f"test -e {AGENT}/fine -o -z %s")],
        }
    )
    answer = fleet.once()
    assert (answer.code, answer.outcomes) == (3, {"node-1/wrapper/w": "rolled_back"}), answer.out
    left = skipped(answer.report)
    assert set(left) == {"node-2/wrapper/w", "node-3/wrapper/w"}
    assert all("it failed on node-1" in reason for reason in left.values())
    assert has_new(taken) == []
    answer = fleet.once()
    assert (answer.code, set(answer.outcomes.values())) == (3, {"fixed"}), answer.out
    assert has_new(taken) == ["node-2", "node-3"]
    taken[0].run("touch ~/fine", user="agent")
    assert fleet.once("--retry").code == 0
    check_quiet(fleet)


def test_quarantine_suspension_and_window(nodes: Pool, fleet: Fleet) -> None:
    """One node, three files: one that something keeps changing back, one suspended, one outside its window."""
    (node,) = nodes(1)
    later = datetime.now(UTC) + timedelta(hours=6)
    closed = {"cron": f"{later.minute} {later.hour} * * *", "duration": "1h"}
    entries = [wrapper("w"), wrapper("s"), wrapper("late", window=closed)]
    limits = {"max_corrections": 2, "quarantine": "1h"}
    fleet.declare({"limits": limits, "wrappers": entries})
    said = fleet.run("suspend", "node-1/wrapper/s", "--reason", "looking into it", "--until", "2h")
    assert said.code == 0, said.err
    loop = 'while sleep 0.2; do [ "$(cat ~/w.sh 2>/dev/null)" = cron ] || echo cron > ~/w.sh; done'
    first = fleet.once()
    assert (first.code, first.outcomes) == (2, {"node-1/wrapper/w": "fixed"}), first.out
    left = skipped(first.report)
    assert "looking into it" in left["node-1/wrapper/s"]
    assert "outside its maintenance window" in left["node-1/wrapper/late"]
    assert (text(node, f"{AGENT}/s.sh"), text(node, f"{AGENT}/late.sh")) == ("", "")

    for _ in range(2):
        node.run("echo cron > ~/w.sh", user="agent")
        assert fleet.once().outcomes == {"node-1/wrapper/w": "fixed"}
    node.run(f"setsid sh -c '{loop}' >/dev/null 2>&1 </dev/null & sleep 0.5", user="agent")
    for _ in range(2):
        answer = fleet.once()
        assert (answer.code, answer.outcomes) == (3, {}), answer.out
        assert "something else is changing it" in skipped(answer.report)["node-1/wrapper/w"]
    assert text(node) == "cron\n"
    assert [(row["name"], row["reason"], row["status"]) for row in alert_files(fleet)] == [
        ("w", "Flapping", "open")
    ]
    node.run("pkill -f '[s]leep 0.2; do'", check=False)

    assert fleet.run("resume", "node-1/wrapper/w").code == 0
    assert fleet.run("resume", "node-1/wrapper/s").code == 0
    always = {"cron": "* * * * *", "duration": "1h"}
    fleet.declare({"limits": limits, "wrappers": [*entries[:2], wrapper("late", window=always)]})
    answer = fleet.once()
    assert answer.code == 0, answer.out
    assert answer.outcomes == {f"node-1/wrapper/{name}": "fixed" for name in ("w", "s", "late")}
    assert [row["status"] for row in alert_files(fleet)] == ["resolved"]
    check_quiet(fleet)


def test_old_backups_are_pruned_but_never_those_of_open_attempts(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    node.run("for name in a b; do echo original > ~/$name.sh; done", user="agent")
    tool = {"name": "mm", "nodes": "all", "version": ">=2.0", "install": {"file": "files/mm"}}

    def declare(content: str, version: str = "2.0") -> None:
        fleet.file("mm", packages.SCRIPT.format(name="mm", version=version))
        files = [wrapper("a", content="settled\n"), wrapper("b", content=content)]
        fleet.declare({"backup_retention_days": 2, "wrappers": files, "tools": [tool]})

    declare("first\n")
    assert fleet.once().code == 0
    declare("second\n")
    argv, env = fleet.command("--once", "--kind", "wrapper")
    killed = subprocess.run(
        argv, env={**env, "RECONCILER_FAILPOINT": "applied"}, cwd=fleet.directory, capture_output=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    (begun,) = [row[0] for row in query(fleet, "SELECT attempt FROM attempts")]
    assert len(backups(node)) == 3
    age(node, 1)
    declare("second\n", "2.1")
    assert fleet.once("--kind", "tool").code == 0
    assert len(backups(node)) == 3 + tool_backups(node), "not before their time"
    age(node, 3)
    declare("second\n", "2.2")
    assert fleet.once("--kind", "tool").code == 0
    assert backups(node) == [f"b.sh.{begun}.bak"]
    assert begun in journals(node)
    assert len(journals(node)) == 2
    answer = fleet.once()
    assert (answer.code, answer.outcomes) == (0, {"node-1/wrapper/b": "fixed"}), answer.out
    age(node, 3)
    declare("second\n", "2.3")
    assert fleet.once().code == 0
    assert backups(node) == []
    assert begun not in journals(node)
    assert text(node, f"{AGENT}/a.sh") == "settled\n"
    check_settled(fleet)
    assert stories(fleet)["node-1/wrapper/b"][-2:] == ["fixing", "fixed"]


def backups(node: Node) -> list[str]:
    return sorted(node.run("cd ~ && ls -d *.bak", user="agent", check=False).stdout.split())


def tool_backups(node: Node) -> int:
    """The tool's command is a link: it is remembered, not copied."""
    return len(node.run("ls ~/.local/bin/*.bak", user="agent", check=False).stdout.split())


def journals(node: Node) -> list[str]:
    return node.run("ls ~/.local/state/reconciler/journal", user="agent").stdout.split()


def age(node: Node, days: int) -> None:
    """As if everything had been done so long ago."""
    node.run(f"touch -d '{days} days ago' ~/.local/state/reconciler/journal/* ~/*.bak", user="agent")
