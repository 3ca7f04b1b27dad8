"""Fourteen agents on three real nodes with real timers, in seconds instead of minutes: what is seen, what is done."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from reconciler.kinds.registry import kinds
from reconciler.store import Store
from sidecar import fake
from tests.lab import Node
from tests.nodes import heartbeats as h
from tests.nodes.conftest import Pool
from tests.nodes.fleet import Fleet
from tests.nodes.safety import wait_for
from tests.sidecar.harness import ADMIN, CHAT, Providers, SidecarProcess, backend

DEFAULTS = {"retry_interval": "1s", "max_attempts": 2}
LIMITS = {"max_corrections": 1000, "batch_size": "100%"}


def beats(node: Node, agent: str, after: float = 0.0) -> bool:
    """Whether a timer has made the agent beat after that moment."""
    return bool((h.state(node, agent).get("scheduled_beat") or 0) > after)


def declare(fleet: Fleet, entries: list[dict[str, Any]]) -> None:
    """Agents whose repairs are tried again at once."""
    fleet.declare({"defaults": DEFAULTS, "limits": LIMITS, "heartbeats": entries})


def ready(nodes: Pool, fleet: Fleet, **every: Any) -> tuple[list[Node], dict[str, Node]]:
    """Fourteen agents that beat by themselves: the nodes, and where each agent lives."""
    taken = nodes(3)
    h.prepare(taken)
    entries = h.agents(taken, **every)
    declare(fleet, entries)
    answer = fleet.once()
    assert answer.code == 0, answer.out + answer.err
    by_name = {node.name: node for node in taken}
    homes = {entry["agent"]: by_name[entry["nodes"]] for entry in entries}
    assert len(homes) == 14
    for agent, node in homes.items():
        wait_for(lambda node=node, agent=agent: beats(node, agent), f"{agent} beats", 120)
    return taken, homes


def test_fourteen_agents_beat_and_what_is_broken_is_put_right(nodes: Pool, fleet: Fleet) -> None:
    """A stopped timer, a deleted file, a broken program, a beat killed in the middle, an edited configuration."""
    _taken, homes = ready(nodes, fleet)
    first = homes["architect"].run("head -n 1 ~/.openclaw/workspace-architect/HEARTBEAT.md", user="agent")
    assert first.stdout.startswith("# 梁思筑")
    events = fleet.events()
    quiet = fleet.once()
    assert quiet.code == 0
    assert quiet.report["drifts"] == quiet.report["outcomes"] == []
    assert fleet.events() == events

    h.timer(homes["lawyer"], "lawyer", "disable", "--now")
    homes["designer"].run("rm ~/.openclaw/workspace-designer/HEARTBEAT.md", user="agent")
    homes["coo"].run("echo '{' > ~/.config/heartbeat/coo.json", user="agent")
    homes["cvexpert"].run("rm ~/.config/systemd/user/heartbeat-cvexpert.service", user="agent")
    kill = "echo slow > ~/.stand_ins/openclaw.mode; ~/.local/bin/heartbeat secretary --full & sleep 0.7; kill -9 $!; echo ok > ~/.stand_ins/openclaw.mode"
    homes["secretary"].run(kill, user="agent")
    assert h.state(homes["secretary"], "secretary")["agent"] == "secretary"  # whole, whenever it was killed
    began = time.time()
    answer = fleet.once()
    assert answer.code == 0, answer.out + answer.err
    broken = {"lawyer", "designer", "coo", "cvexpert"}
    assert broken <= {key.split("/")[2] for key in answer.outcomes}
    assert set(answer.outcomes.values()) == {"fixed"}
    for agent, node in homes.items():
        wait_for(lambda node=node, agent=agent: beats(node, agent, began), f"{agent} beats again", 120)
    for agent in broken:
        assert h.story(fleet, agent) == ["detected", "fixing", "fixed"] * 2


def test_a_late_beat_is_forced_and_then_the_service_restarted(nodes: Pool, fleet: Fleet) -> None:
    """The gateway is down: a full beat does not help, the restart does. A full disk is told with its own words."""
    taken, homes = ready(nodes, fleet)
    entries = h.agents(taken)
    for entry in entries:
        if entry["agent"] == "opengineer":  # all it has is on the board
            entry["sources"] = {
                "workboard": entry["sources"]["workboard"],
                "documents": None,
                "multica": None,
            }
    declare(fleet, entries)
    assert fleet.once().code == 0
    node = homes["opengineer"]
    before = len(h.story(fleet, "opengineer"))
    node.run("echo fail > ~/.stand_ins/openclaw.mode", user="agent")
    wait_for(lambda: h.state(node, "opengineer")["outcome"] == "degraded", "it sees nothing", 60)
    assert fleet.once().outcomes[f"{node.name}/heartbeat/opengineer"] == "rolled_back"
    assert node.run("cat ~/gateway", user="agent", check=False).stdout == ""
    answer = fleet.once("--retry")
    assert answer.outcomes[f"{node.name}/heartbeat/opengineer"] == "fixed", answer.out
    assert node.run("cat ~/gateway", user="agent").stdout == "started\n"
    assert h.story(fleet, "opengineer")[before:] == ["detected", "fixing", "rolled_back", "fixing", "fixed"]

    disk, agent = homes["designer"], "designer"
    mount = f"cd {h.HOME}/.local/state; cp -a heartbeat /tmp/saved; mount -t tmpfs -o size=256k,uid=1000,gid=1000,mode=0700 none heartbeat"
    disk.run(
        f"{mount}; cp -a /tmp/saved/. heartbeat/; dd if=/dev/zero of=heartbeat/full bs=4k 2>/dev/null; true"
    )
    full = time.time()
    wait_for(lambda: time.time() - h.state(disk, agent)["beat"] > 20, "it is late", 90)
    codes = [fleet.once("--retry").outcomes[f"{disk.name}/heartbeat/{agent}"] for _ in range(2)]
    assert set(codes) <= {"rolled_back", "failed"}
    (told,) = [row for row in h.alerts(fleet, "RepairFailed") if row["name"] == agent]
    assert "No space left" in told["detail"]
    disk.run(f"rm {h.HOME}/.local/state/heartbeat/full")
    wait_for(lambda: beats(disk, agent, full + 20), "there is room again", 90)
    fleet.once("--retry")
    assert [row for row in h.alerts(fleet) if row["name"] == agent and row["reason"] == "RepairFailed"] == []


def test_tasks_that_stand_still_are_taken_away_and_those_in_the_table_are_told(
    nodes: Pool, fleet: Fleet
) -> None:
    """Suspected, first, second and third time; rounds at the limit, a cycle: whom it is for hears of it, others do not."""
    with h.listening() as people:
        (fleet.directory / "reconciler.toml").write_text(
            people.settings(coo=["coo"], creator=["creator"], owner=["owner"], all=[])
        )
        taken, homes = ready(
            nodes, fleet, turn=["true"], rounds=3, suspected_after="30m", recover_after="45m"
        )
        node, agent = homes["cvexpert"], "cvexpert"
        others = [
            h.card("lawyer", "L-1", after=["L-2"]),
            h.card("lawyer", "L-2", after=["L-1"]),
            h.card("designer", "D-1"),
        ]
        for place in taken:
            h.board(place, h.card(agent, "S-1", working=1900), *others)

        def seen(name: str, since: float = 0) -> bool:
            last = h.state(node, agent)
            return last["beat"] > since and name in [item["id"] for item in last["in_progress"]]

        wait_for(lambda: seen("S-1"), "the card is seen", 60)
        assert fleet.once().outcomes[f"{node.name}/heartbeat/{agent}"] == "fixed"
        assert h.ledger(node, agent)["tasks"]["S-1"]["flagged"]
        assert not [
            row for row in h.alerts(fleet) if row["name"] == agent and row["reason"].startswith("Task")
        ]

        for number, (reason, audience) in enumerate(
            [
                (None, None),
                ("TaskReleased", {"coo", "creator"}),
                ("TaskBlocked", {"owner", "coo", "creator"}),
            ],
            start=1,
        ):
            # Claimed anew, in the node's past: more than 45 minutes have gone by without a sign. A beat between
            # the two finds it claimed after it was taken away, as it would be two hours later.
            for place in taken:
                h.board(
                    place, h.card(agent, "C-1", working=2800), h.card(agent, "S-1", working=1900), *others
                )
            shift(node, agent)
            moment = time.time()
            wait_for(lambda moment=moment: seen("C-1", moment), "it is seen again", 60)
            assert fleet.once("--retry").outcomes[f"{node.name}/heartbeat/{agent}"] == "fixed"
            entry = h.ledger(node, agent)["tasks"]["C-1"]
            assert (entry["timeouts"], entry["blocked"]) == (number, number == 3)
            told = {
                row["reason"]: row
                for row in h.alerts(fleet)
                if row["name"] == agent and "Task" in row["reason"]
            }
            assert (told.get(reason) is not None) == (reason is not None)
            assert reason is None or set(told[reason]["to"]) == audience
        calls = node.run("cat ~/.stand_ins/calls", user="agent").stdout.splitlines()
        assert calls.count("openclaw workboard release C-1") == 3

        paused = homes["designer"]
        wait_for(lambda: h.state(paused, "designer")["outcome"] == "paused", "its rounds are used up", 60)
        fleet.once("--retry")
        by_reason = {(row["name"], row["reason"]): row for row in h.alerts(fleet)}
        limit = by_reason["designer", "RoundsLimit"]
        assert "D-1" in limit["detail"]
        assert "remaining:" in limit["detail"]
        assert set(limit["to"]) == {"coo", "creator"}
        assert set(by_reason["lawyer", "Cycle"]["to"]) == {"creator"}
        wait_for(lambda: "TaskBlocked" in "".join(people.heard.get("owner", [])), "the owner hears of it", 30)
        owner = "".join(people.heard["owner"])
        assert "RoundsLimit" not in owner
        assert "Cycle" not in owner
        assert any("RoundsLimit" in text for text in people.heard["coo"])
        assert not any("Cycle" in text for text in people.heard["coo"])
        assert any("Cycle" in text for text in people.heard["creator"])


def shift(node: Node, agent: str) -> None:
    """Let two hours go by for what was taken away from an agent."""
    path = f"{h.HOME}/.local/state/heartbeat/{agent}.ledger.json"
    content = h.ledger(node, agent)
    for entry in content["tasks"].values():
        if entry.get("released"):
            entry["released"] -= 7200
    node.write(path, json.dumps(content), owner="agent", mode="0600")


def test_an_outage_of_the_providers_restarts_nobody_and_is_one_alert(
    nodes: Pool, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the word of a real sidecar whose providers answer 429. And when no timer fires anywhere, that is one, too."""
    providers = Providers()
    (tmp_path / "sidecar").mkdir()
    try:
        provider = providers.new(lambda _seen: fake.error(429))
        pools = [backend(pool, provider.url, pool=pool) for pool in ("primary", "fallback")]
        proxy = SidecarProcess(tmp_path / "sidecar", pools).start()
        try:
            monkeypatch.setenv("TOKEN_OF_THE_SIDECAR", ADMIN)
            (fleet.directory / "reconciler.toml").write_text(
                f'[sidecar]\nurl = "{proxy.url}"\ntoken = "$env:TOKEN_OF_THE_SIDECAR"\n'
            )
            check_outage(nodes, fleet, proxy)
        finally:
            proxy.stop()
    finally:
        providers.close()


def check_outage(nodes: Pool, fleet: Fleet, proxy: SidecarProcess) -> None:
    """Before, during and after."""
    taken, homes = ready(nodes, fleet)
    key = proxy.admin("POST", "/clients", {"name": "architect"}).json()["key"]
    headers = {"authorization": f"Bearer {key}"}
    backends = lambda: proxy.admin("GET", "/backends").json()["backends"]  # noqa: E731
    for _ in range(20):
        if {row["status"] for row in backends()} == {"cooling"}:
            break
        httpx.post(f"{proxy.url}/v1/chat/completions", json=CHAT, headers=headers, timeout=60)
    assert {row["status"] for row in backends()} == {"cooling"}
    there = [agent for agent, node in homes.items() if node is taken[0]]
    forced = {agent: h.ledger(taken[0], agent)["forced_beat"] for agent in there}
    for agent in there:
        h.timer(taken[0], agent, "stop")
    wait_for(lambda: all(late(taken[0], agent) for agent in there), "five agents are late", 90)
    answer = fleet.once()
    changed = {change["field"] for row in answer.report["drifts"] for change in row["changes"]}
    assert changed == {"schedule"}, answer.out
    assert {agent: h.ledger(taken[0], agent)["forced_beat"] for agent in there} == forced
    assert taken[0].run("cat ~/gateway", user="agent", check=False).stdout == ""
    (told,) = h.alerts(fleet)
    assert (told["key"], told["reason"]) == ("fleet", "ProviderOutage")
    rows = Store(fleet.db).conditions().values()
    samples = [
        s
        for row in rows
        for s in kinds()[row["kind"]].samples(row["name"], row["node"], row["details"]["observed"])
    ]
    rate = [s.value for s in samples if s.name == "agent_429_error_rate"]
    assert rate == [1.0]
    assert len([s for s in samples if s.name == "agent_heartbeat_status"]) == 14

    proxy.admin("POST", "/backends/primary/clear", {})
    for agent, node in homes.items():
        h.timer(node, agent, "stop")
    wait_for(lambda: all(late(node, agent) for agent, node in homes.items()), "no agent beats", 120)
    answer = fleet.once()
    assert {row["reason"] for row in h.alerts(fleet)} == {"NoBeatAnywhere"}, answer.out
    began = time.time()
    for agent, node in homes.items():
        wait_for(lambda node=node, agent=agent: beats(node, agent, began), f"{agent} beats again", 120)
    assert fleet.once().code == 0
    assert h.alerts(fleet) == []


def late(node: Node, agent: str) -> bool:
    """Whether its last beat is older than it may be."""
    return bool(time.time() - h.state(node, agent)["beat"] > 16)
