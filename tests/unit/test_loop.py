"""A whole pass with fakes at the door: who is asked, what is done, in which order, and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from reconciler.desired.load import Desired
from reconciler.loop import Pass, Wishes
from reconciler.model import (
    Action,
    ExitCode,
    Limits,
    Mode,
    NodeState,
    Observation,
    Observed,
    Outcome,
    Policy,
    Report,
    Resource,
    ResourceId,
    Status,
    Suspension,
)
from reconciler.record import Context, Recorder
from reconciler.report import as_json
from reconciler.store import Store
from reconciler.telling import Bell
from tests.unit.support import FILE, rid, wrapper

NOW = datetime.now(UTC)


@dataclass
class FakeObserver:
    """Nodes as a dictionary of contents; a node in ``silent`` does not answer, a resource in ``broken`` has no facts."""

    contents: dict[ResourceId, str]
    silent: set[str] = field(default_factory=set)
    broken: set[ResourceId] = field(default_factory=set)

    def observe(self, resources: Iterable[Resource], *, fresh: bool = False) -> Observed:
        """What the nodes hold now."""
        asked = list(resources)
        assert not fresh
        nodes = {
            r.id.node: NodeState(r.id.node, r.id.node not in self.silent, "no route", "", 0.1) for r in asked
        }
        return Observed(nodes, {r.id: self._look(r.id) for r in asked})

    def _look(self, found: ResourceId) -> Observation:
        if found.node in self.silent:
            return Observation(found, None, "no route")
        if found in self.broken:
            return Observation(found, None, "the probe failed")
        return Observation(found, {**FILE, "content": self.contents[found]})


@dataclass
class FakeConverger:
    """Fixes what it is told to, except what is in ``stubborn``; ``spoils`` names what a repair breaks again."""

    observer: FakeObserver
    stubborn: set[ResourceId] = field(default_factory=set)
    spoils: dict[ResourceId, ResourceId] = field(default_factory=dict)
    rounds: list[list[str]] = field(default_factory=list)

    def repair(
        self,
        actions: Sequence[Action],
        resources: Mapping[ResourceId, Resource],
        before: Observed,
    ) -> tuple[list[Outcome], Observed]:
        """One outcome per action, and a new look at the nodes concerned."""
        assert before.nodes
        self.rounds.append([str(action.id) for action in actions])
        outcomes = []
        for action in actions:
            fixed = action.id not in self.stubborn
            if fixed:
                self.observer.contents[action.id] = "new"
            if action.id in self.spoils:
                self.observer.contents[self.spoils[action.id]] = "old"
            status = Status.FIXED if fixed else Status.ROLLED_BACK
            detail = "" if fixed else "it does not hold"
            outcomes.append(Outcome(action.id, status, detail, action.changes, number=action.number))
        nodes = {action.id.node for action in actions}
        return outcomes, self.observer.observe([r for r in resources.values() if r.id.node in nodes])


@dataclass
class World:
    """A fleet of fakes and a real store."""

    store: Store
    resources: dict[ResourceId, Resource]
    observer: FakeObserver
    converger: FakeConverger
    limits: Limits = field(default_factory=Limits)
    bell: Bell | None = None

    def run(self, **wishes: Any) -> Report:
        """One pass. Every one is a retry, so that none has to wait, unless ``retry`` says otherwise."""
        desired = Desired(self.resources, (), self.limits)
        recorder = Recorder(self.store, desired, Context("run-1", "abc123"), self.bell)
        fleet = len({rid.node for rid in self.resources})
        wanted = Wishes(**{"retry": True, "fleet": fleet, **wishes})
        made: Any = Pass(desired, self.observer, self.converger, recorder, wanted)  # type: ignore[arg-type]
        report: Report = made.run()
        return report

    def events(self, key: str) -> list[str]:
        """Statuses of one resource's events, oldest first."""
        return [row["status"] for row in reversed(self.store.events(issue_key=key))]


def world(store: Store, *resources: Resource, contents: Mapping[str, str] | None = None) -> World:
    """Every resource drifted unless ``contents`` says otherwise."""
    given = {rid(key): value for key, value in (contents or {}).items()}
    observer = FakeObserver({resource.id: given.get(resource.id, "old") for resource in resources})
    return World(store, {resource.id: resource for resource in resources}, observer, FakeConverger(observer))


def after(text: str, *dependencies: str, **given: Any) -> Resource:
    """A resource that waits for others."""
    return wrapper(text, depends_on=tuple(map(rid, dependencies)), **given)


def test_pass_without_drift_acts_on_nothing(store: Store) -> None:
    """Exit code 0, no event."""
    fleet = world(store, wrapper(), contents={"node-1/wrapper/w": "new"})
    report = fleet.run()
    assert report.exit_code is ExitCode.AS_DESIRED
    assert fleet.converger.rounds == []
    assert store.events() == []


def test_drift_is_fixed_and_recorded(store: Store) -> None:
    """detected, fixing, fixed; the next pass has nothing to do."""
    fleet = world(store, wrapper())
    assert fleet.run().exit_code is ExitCode.AS_DESIRED
    assert fleet.events("node-1/wrapper/w") == ["detected", "fixing", "fixed"]
    assert fleet.run().outcomes == ()
    assert len(store.events()) == 3


def test_unreachable_node_is_left_alone(store: Store) -> None:
    """Unknown is no drift: no action, no event; the others are served."""
    fleet = world(store, wrapper("node-1/wrapper/w"), wrapper("node-2/wrapper/w"))
    fleet.observer.silent = {"node-1"}
    report = fleet.run()
    assert report.exit_code is ExitCode.UNKNOWN
    assert fleet.converger.rounds == [["node-2/wrapper/w"]]
    assert fleet.events("node-1/wrapper/w") == []
    condition = store.condition("node-1/wrapper/w")
    assert condition is not None
    assert (condition["status"], condition["message"]) == ("Unknown", "no route")


def test_failed_probe_is_left_alone(store: Store) -> None:
    """The same for one resource of a node that answers."""
    fleet = world(store, wrapper("node-1/wrapper/v"), wrapper("node-1/wrapper/w"))
    fleet.observer.broken = {rid("node-1/wrapper/v")}
    assert fleet.run().exit_code is ExitCode.UNKNOWN
    assert fleet.converger.rounds == [["node-1/wrapper/w"]]


def test_check_never_acts_and_never_records(store: Store) -> None:
    """What drifted and what would be done; exit code 2."""
    fleet = world(store, wrapper())
    report = fleet.run(check=True)
    assert report.exit_code is ExitCode.DRIFT
    assert [str(action.id) for action in report.plan.actions] == ["node-1/wrapper/w"]
    assert fleet.converger.rounds == []
    assert store.events() == []
    assert store.conditions() == {}
    assert store.last_pass() is None


def test_check_without_drift_is_zero(store: Store) -> None:
    """Nothing would be done."""
    assert world(store, wrapper(), contents={"node-1/wrapper/w": "new"}).run(check=True).exit_code == 0


def test_what_cannot_be_fixed_is_three(store: Store) -> None:
    """The attempt was undone: honest about it."""
    fleet = world(store, wrapper())
    fleet.converger.stubborn = {rid("node-1/wrapper/w")}
    assert fleet.run().exit_code is ExitCode.NOT_FIXED
    assert fleet.events("node-1/wrapper/w") == ["detected", "fixing", "rolled_back"]
    assert len(fleet.converger.rounds) == 1


def test_failure_goes_before_unknown_and_unknown_before_drift(store: Store) -> None:
    """Precedence 3, 4, 2, 0."""
    fleet = world(store, wrapper("node-1/wrapper/w"), wrapper("node-2/wrapper/w"), wrapper("mac/wrapper/w"))
    fleet.observer.silent = {"node-1"}
    assert fleet.run(check=True).exit_code is ExitCode.UNKNOWN
    fleet.converger.stubborn = {rid("node-2/wrapper/w")}
    assert fleet.run().exit_code is ExitCode.NOT_FIXED
    fleet.converger.stubborn = set()
    assert fleet.run().exit_code is ExitCode.UNKNOWN
    fleet.observer.silent = set()
    assert fleet.run().exit_code is ExitCode.AS_DESIRED


def test_dependants_have_their_turn_in_a_later_round(store: Store) -> None:
    """The order of the declaration does not matter."""
    chain = [
        after("node-1/wrapper/c", "node-1/wrapper/b"),
        after("node-1/wrapper/b", "node-2/wrapper/a"),
        wrapper("node-2/wrapper/a"),
        wrapper("node-2/wrapper/z"),
    ]
    fleet = world(store, *chain)
    assert fleet.run().exit_code is ExitCode.AS_DESIRED
    assert fleet.converger.rounds == [
        ["node-2/wrapper/a", "node-2/wrapper/z"],
        ["node-1/wrapper/b"],
        ["node-1/wrapper/c"],
    ]


@pytest.mark.parametrize("trouble", ["stubborn", "silent", "suspended", "warn"])
def test_dependant_waits_while_its_dependency_is_not_as_desired(store: Store, trouble: str) -> None:
    """Failed, unknown, suspended or only warned about: the dependant is not touched and says for whom it waits."""
    policy = Policy()
    if trouble == "suspended":
        policy = Policy(suspend=Suspension("holiday"))
    if trouble == "warn":
        policy = Policy(mode=Mode.WARN)
    fleet = world(
        store, wrapper("node-2/wrapper/a", policy=policy), after("node-1/wrapper/b", "node-2/wrapper/a")
    )
    fleet.converger.stubborn = {rid("node-2/wrapper/a")} if trouble == "stubborn" else set()
    fleet.observer.silent = {"node-2"} if trouble == "silent" else set()
    report = fleet.run()
    assert report.exit_code is ExitCode.NOT_FIXED
    assert ["node-1/wrapper/b"] not in fleet.converger.rounds
    (skip,) = [skip for skip in report.plan.skips if skip.id == rid("node-1/wrapper/b")]
    assert skip.reason.startswith("waits for node-2/wrapper/a")
    assert fleet.events("node-1/wrapper/b") == ["detected"]
    fleet.run()
    assert fleet.events("node-1/wrapper/b") == ["detected"]


def test_dependency_that_is_as_desired_keeps_nobody_waiting(store: Store) -> None:
    """Suspended or not."""
    dependency = wrapper("node-1/wrapper/a", policy=Policy(suspend=Suspension("holiday")))
    fleet = world(
        store, dependency, after("node-1/wrapper/b", "node-1/wrapper/a"), contents={"node-1/wrapper/a": "new"}
    )
    assert fleet.run().exit_code is ExitCode.AS_DESIRED
    assert fleet.converger.rounds == [["node-1/wrapper/b"]]


def test_warn_tells_once_and_touches_nothing(store: Store) -> None:
    """Exit code 2: 0 would say that all is as desired."""
    fleet = world(store, wrapper(policy=Policy(mode=Mode.WARN)))
    for _ in range(2):
        report = fleet.run()
        assert report.exit_code is ExitCode.DRIFT
        assert report.plan.skips[0].reason == "mode is warn"
    assert fleet.converger.rounds == []
    assert fleet.events("node-1/wrapper/w") == ["detected"]


def test_ignored_resource_is_not_even_looked_at(store: Store) -> None:
    """It appears nowhere in the report."""
    fleet = world(store, wrapper(policy=Policy(mode=Mode.IGNORE)))
    report = fleet.run()
    assert (report.observed.observations, report.drifts, report.exit_code) == ({}, {}, 0)


def test_suspension_ends_by_itself(store: Store) -> None:
    """After its expiry the resource is put right."""
    past = wrapper(
        "node-1/wrapper/p", policy=Policy(suspend=Suspension("was", until=datetime(2020, 1, 1, tzinfo=UTC)))
    )
    future = wrapper(
        "node-1/wrapper/f", policy=Policy(suspend=Suspension("is", until=datetime(2999, 1, 1, tzinfo=UTC)))
    )
    fleet = world(store, past, future)
    report = fleet.run()
    assert fleet.converger.rounds == [["node-1/wrapper/p"]]
    assert report.plan.skips[0].reason == "suspended until 2999-01-01 00:00 UTC: is"


def test_resource_that_is_spoilt_by_another_repair_is_no_success(store: Store) -> None:
    """Fixed, then changed back within the pass: exit code 3, never 0."""
    fleet = world(store, wrapper("node-1/wrapper/a"), after("node-1/wrapper/b", "node-1/wrapper/a"))
    fleet.converger.spoils = {rid("node-1/wrapper/b"): rid("node-1/wrapper/a")}
    report = fleet.run()
    assert report.exit_code is ExitCode.NOT_FIXED
    assert len(fleet.converger.rounds) == 2
    assert [(str(skip.id), skip.reason) for skip in report.plan.skips] == [
        ("node-1/wrapper/a", "it was fixed and drifted again within the pass")
    ]


def test_long_chain_is_done_in_one_pass(store: Store) -> None:
    """One after another, however long."""
    chain = [wrapper("node-1/wrapper/w0")]
    chain += [after(f"node-1/wrapper/w{n}", f"node-1/wrapper/w{n - 1}") for n in range(1, 25)]
    fleet = world(store, *chain)
    assert fleet.run().exit_code is ExitCode.AS_DESIRED
    assert fleet.converger.rounds == [[f"node-1/wrapper/w{n}"] for n in range(25)]


def test_nothing_has_two_attempts_in_one_pass(store: Store) -> None:
    """However stubborn."""
    fleet = world(
        store,
        wrapper("node-1/wrapper/a"),
        wrapper("node-1/wrapper/b"),
        after("node-1/wrapper/c", "node-1/wrapper/b"),
    )
    fleet.converger.stubborn = {rid("node-1/wrapper/a")}
    fleet.run()
    assert sum("node-1/wrapper/a" in round_ for round_ in fleet.converger.rounds) == 1
    assert len(fleet.converger.rounds) == 2


def test_report_as_json_has_the_promised_shape(store: Store) -> None:
    """Run id, revision, nodes, drifts with both values per field, outcomes, counts, durations."""
    fleet = world(store, wrapper("node-1/wrapper/w"), wrapper("node-2/wrapper/w"))
    fleet.observer.silent = {"node-2"}
    document = as_json(fleet.run())
    assert (document["run_id"], document["revision"], document["exit_code"], document["check"]) == (
        "run-1",
        "abc123",
        4,
        False,
    )
    assert document["nodes"]["node-2"] == {
        "reachable": False,
        "reason": "no route",
        "transport": None,
        "seconds": 0.1,
    }
    assert document["drifts"] == [
        {
            "id": "node-1/wrapper/w",
            "node": "node-1",
            "kind": "wrapper",
            "name": "w",
            "check_type": "C2",
            "changes": [{"field": "content", "desired": "new", "observed": "old"}],
        }
    ]
    assert document["outcomes"][0]["status"] == "fixed"
    assert document["unknown"][0]["reason"] == "no route"
    assert document["counts"] == {
        "nodes": 2,
        "nodes_unreachable": 1,
        "resources": 2,
        "as_desired": 0,
        "drifted": 1,
        "fixed": 1,
        "failed": 0,
        "rolled_back": 0,
        "skipped": 0,
        "unknown": 1,
    }
    assert document["durations"]["total"] >= 0
