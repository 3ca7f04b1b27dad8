"""Notices, common causes and what is told of the fleet: alerts that follow the facts, apart from repairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from reconciler.alerts import Alerts
from reconciler.kinds.heartbeat import Heartbeat
from reconciler.model import (
    Change,
    Limits,
    NodeState,
    Notice,
    Observation,
    Observed,
    Outcome,
    Plan,
    Repairs,
    Report,
    ResourceId,
    Skip,
    Status,
)
from reconciler.settings import Route
from reconciler.store import Store
from reconciler.telling import Teller
from tests.unit.support import Fleet, rid
from tests.unit.test_alerts import NOW

SAID = {"run": "r", "revision": ""}
FACTS: dict[str, Any] = {
    "agent": "a", "label": "a", "late_after": 60.0, "beat": "fresh", "healthy": True, "outage": False, "age": 5.0,
    "stuck": [], "released": [], "warnings": [], "sizes": {}, "scheduled_age": 5.0, "installed": 9000.0,
}  # fmt: skip
CYCLE = [{"code": "Cycle", "detail": "A waits for B and B for A", "tasks": []}]
LATE = {"beat": "late", "healthy": False, "scheduled_age": 900.0, "age": 900.0}


class World:
    """Agents, what their nodes say, and one teller per pass."""

    def __init__(self, store: Store, fleet: Fleet, agents: int = 2) -> None:
        text = "".join(
            f"  - {{agent: a{i}, nodes: node-1, class: development, workspace: ~/w{i}}}\n"
            for i in range(agents)
        )
        fleet.write("heartbeats:\n" + text)
        self.resources = dict(fleet.load().resources)
        self.facts = {found: dict(FACTS) for found in self.resources}
        self.alerts = Alerts(store, None, ())
        self.store = store

    def agent(self, number: int = 0) -> ResourceId:
        return rid(f"node-1/heartbeat/a{number}")

    def teller(self, fleet: Mapping[str, Notice | None] | None = None) -> Teller:
        return Teller(self.alerts, SAID, {}, Limits(), fleet or {})

    def observed(self, *, silent: bool = False) -> Observed:
        nodes = {"node-1": NodeState("node-1", not silent)}
        found = {
            key: Observation(key, None if silent else facts, "silent" if silent else "")
            for key, facts in self.facts.items()
        }
        return Observed(nodes, found)

    def tell(
        self, teller: Teller, *, status: str = "True", skips: tuple[Skip, ...] = (), silent: bool = False
    ) -> None:
        """The end of a pass in which every resource has this status."""
        rows = [
            {"issue_key": str(key), "status": status, "node": key.node, "kind": key.kind, "message": "",
             "since": "2999-01-01T00:00:00+00:00"}
            for key in self.resources
        ]  # fmt: skip
        report = Report(
            run_id="r", revision="", check=False, started=NOW, seconds=1.0, observed=self.observed(silent=silent),
            drifts={}, plan=Plan((), skips), outcomes=(), runs=(), resources=self.resources,
        )  # fmt: skip
        teller.tell(report, rows, ())

    def open(self) -> list[tuple[str, str]]:
        return sorted((row["name"] or row["key"], row["reason"]) for row in self.alerts.open())


@pytest.fixture
def world(store: Store, fleet: Fleet) -> World:
    return World(store, fleet)


def failed(found: ResourceId, *fields: str) -> Outcome:
    """An attempt that did not help, with what differed."""
    return Outcome(found, Status.FAILED, "still late", tuple(Change(name, 1, 2) for name in fields), 4)


def test_a_notice_lasts_as_long_as_the_facts_say_it(world: World) -> None:
    """Though the resource is as desired all the time, and a repair of something else ends nothing."""
    world.facts[world.agent()]["warnings"] = CYCLE
    world.tell(world.teller())
    assert world.open() == [("a0", "Cycle")]
    (row,) = world.alerts.open()
    assert row["to"] == ["coo", "creator"]
    world.teller().fixed(world.agent(), NOW)
    world.tell(world.teller())
    assert world.open() == [("a0", "Cycle")]
    world.facts[world.agent()]["warnings"] = []
    world.tell(world.teller())
    assert world.open() == []


def test_what_a_silent_node_said_last_is_neither_repeated_nor_over(world: World) -> None:
    """Nobody knows."""
    world.facts[world.agent()]["warnings"] = CYCLE
    world.tell(world.teller())
    world.tell(world.teller(), status="Unknown", silent=True)
    assert [name for name, reason in world.open() if reason == "Cycle"] == ["a0"]


def test_no_beat_anywhere_is_one_alert_and_none_per_agent(world: World) -> None:
    """An agent with more than its beat to complain of is told of all the same."""
    for facts in world.facts.values():
        facts.update(LATE)
    teller = world.teller()
    teller.looked(world.observed())
    exhausted = Repairs(attempts=2, exhausted=True)
    teller.failed(failed(world.agent(0), "beat"), exhausted)
    teller.failed(failed(world.agent(1), "beat", "file"), exhausted)
    world.tell(teller, status="False")
    assert world.open() == [("a1", "RepairFailed"), ("fleet", "NoBeatAnywhere")]


def test_when_timers_fire_again_it_is_over_and_who_is_still_late_is_told(world: World) -> None:
    """The last attempt of that agent failed while the cause that all shared was told in its place."""
    for facts in world.facts.values():
        facts.update(LATE)
    teller = world.teller()
    teller.looked(world.observed())
    world.tell(teller, status="False")
    world.facts[world.agent(1)] |= {"scheduled_age": 5.0}
    teller = world.teller()
    teller.looked(world.observed())
    skip = Skip(
        world.agent(0), "2 failed in a row", failed(world.agent(0), "beat").changes, code="AttemptsExhausted"
    )
    world.tell(teller, status="False", skips=(skip,))
    assert world.open() == [("a0", "RepairFailed")]
    world.tell(teller, status="False", skips=(skip,))
    (row,) = world.alerts.open()
    assert row["occurrences"] == 1


def test_a_look_at_a_part_says_nothing_of_all(world: World) -> None:
    """Neither that no beat comes from anywhere, nor that this is over."""
    for facts in world.facts.values():
        facts.update(LATE)
    whole = world.teller()
    whole.looked(world.observed())
    world.tell(whole, status="False")
    world.tell(world.teller(), status="False")
    assert ("fleet", "NoBeatAnywhere") in world.open()


def test_what_is_told_of_the_fleet_ends_when_it_is_known_to_be_over(world: World) -> None:
    """And stays while nobody knows."""
    notice = Notice("ProviderOutage", 4, "every provider rests", "wait")
    world.tell(world.teller({"ProviderOutage": notice}))
    assert world.open() == [("fleet", "ProviderOutage")]
    world.tell(world.teller({}))
    assert world.open() == [("fleet", "ProviderOutage")]
    world.tell(world.teller({"ProviderOutage": None}))
    assert world.open() == []


@pytest.mark.parametrize(
    ("to", "heard"),
    [((), True), (("coo",), True), (("owner", "coo"), True), (("owner",), False), (("ops",), False)],
)
def test_a_route_with_audiences_takes_only_theirs(world: World, to: tuple[str, ...], heard: bool) -> None:  # noqa: FBT001
    """And one without takes all."""
    world.facts[world.agent()]["warnings"] = CYCLE
    world.tell(world.teller())
    route = Route(name="r", url="json://127.0.0.1:1/", to=to)
    Alerts(world.store, None, (route,)).settle(NOW)
    titles = [row["title"] for row in world.alerts.undelivered()]
    assert bool(titles) == heard


def test_an_alert_for_nobody_in_particular_is_not_for_a_route_with_audiences(world: World) -> None:
    """That route is somebody's own."""
    world.tell(world.teller({"ProviderOutage": Notice("ProviderOutage", 4, "all rest")}))
    Alerts(world.store, None, (Route(name="r", url="json://127.0.0.1:1/", to=("coo",)),)).settle(NOW)
    assert world.alerts.undelivered() == []
    Alerts(world.store, None, (Route(name="s", url="json://127.0.0.1:1/"),)).settle(NOW)
    assert len(world.alerts.undelivered()) == 1


def test_every_notice_and_cause_of_a_kind_is_named_in_its_class(world: World) -> None:
    """Otherwise its alert would never end."""
    every = [{"code": code, "detail": "d", "tasks": []} for code in Heartbeat.NOTICES]
    told = {
        "released": [{"id": "T", "timeouts": 2}, {"id": "U", "timeouts": 3}],
        "sizes": {"AGENTS.md": 9999},
    }
    found = Heartbeat.notices(world.resources[world.agent()], {**FACTS, "warnings": every, **told})
    assert {notice.reason for notice in found} == set(Heartbeat.NOTICES)
