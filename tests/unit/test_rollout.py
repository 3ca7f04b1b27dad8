"""How far a change spreads at once: canary, batches, the guard over a whole pass."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.alerts import Alerts
from reconciler.model import Limits, Report, Resource, share
from reconciler.store import Store
from tests.unit.support import rid, wrapper
from tests.unit.test_loop import World, world


def fleet_of(store: Store, count: int, **limits: Any) -> World:
    """The same file on many nodes."""
    found = world(store, *(wrapper(f"node-{number}/wrapper/w") for number in range(1, count + 1)))
    found.limits, found.bell = Limits(**limits), Alerts(store, None)
    return found


def sizes(fleet: World) -> list[int]:
    """How many were changed at once."""
    return [len(round_) for round_ in fleet.converger.rounds]


def codes(report: Report) -> set[str]:
    """Why what was skipped was skipped."""
    return {skip.code for skip in report.plan.skips}


def test_one_node_first_then_batches(store: Store) -> None:
    """All in one pass."""
    fleet = fleet_of(store, 10, batch_size="40%")
    assert fleet.run().exit_code == 0
    assert sizes(fleet) == [1, 4, 4, 1]


def test_three_nodes_take_two_batches(store: Store) -> None:
    """Each costs a run and a look."""
    fleet = fleet_of(store, 3)
    fleet.run()
    assert sizes(fleet) == [1, 2]


def test_failing_canary_stops_the_others(store: Store) -> None:
    """They say whose failure they wait for, and nothing was done to them."""
    fleet = fleet_of(store, 5)
    fleet.converger.stubborn = {rid("node-1/wrapper/w")}
    report = fleet.run()
    assert (report.exit_code, codes(report), sizes(fleet)) == (3, {"RolloutStopped"}, [1])
    assert all("it failed on node-1" in skip.reason for skip in report.plan.skips)


def test_node_that_keeps_failing_is_no_canary_again(store: Store) -> None:
    """Its own trouble must not stop the others for ever."""
    fleet = fleet_of(store, 4)
    fleet.converger.stubborn = {rid("node-1/wrapper/w")}
    fleet.run()
    fleet.run()
    assert fleet.converger.rounds[1] == ["node-2/wrapper/w"]
    assert list(fleet.observer.contents.values()).count("new") == 3


def test_three_failures_in_a_row_stop_the_rest(store: Store) -> None:
    """After a canary that went well."""
    fleet = fleet_of(store, 12, batch_size="3")
    fleet.converger.stubborn = {rid(f"node-{number}/wrapper/w") for number in range(2, 13)}
    report = fleet.run()
    assert sizes(fleet) == [1, 3]
    assert codes(report) == {"RolloutStopped"}
    assert "3 times in a row" in report.plan.skips[0].reason


def test_different_declarations_do_not_wait_for_each_other(store: Store) -> None:
    """Each has a canary of its own, all at once."""
    fleet = world(store, *(wrapper(f"node-{n}/wrapper/{name}") for n in (1, 2) for name in ("a", "b")))
    fleet.run()
    assert fleet.converger.rounds[0] == ["node-1/wrapper/a", "node-1/wrapper/b"]


def test_pass_that_would_change_too_much_stops_after_one_node(store: Store) -> None:
    """And stays stopped, with one alert, until somebody says otherwise."""
    fleet = fleet_of(store, 10, max_changed_nodes="30%")
    for _ in range(3):
        report = fleet.run()
        assert (report.exit_code, codes(report)) == (3, {"MassChange"})
        assert len(report.plan.skips) == 9
    assert fleet.converger.rounds == [["node-1/wrapper/w"]]
    (alert,) = Alerts(store, None).open()
    assert (alert["key"], alert["reason"], alert["severity"]) == ("fleet", "MassChange", 4)
    assert "--allow-mass-change" in alert["advice"]
    assert fleet.run(allow_mass_change=True).exit_code == 0
    assert Alerts(store, None).open() == []
    assert store.hold("mass-change") is None


def test_guard_lets_small_changes_through(store: Store) -> None:
    """Up to the limit, and however many resources."""
    fleet = world(store, *(wrapper(f"node-{n}/wrapper/{i}") for n in range(10) for i in range(3)))
    fleet.limits = Limits(max_changed_nodes="30%")
    for name in [key for key in fleet.resources if int(key.node[-1]) > 2]:
        fleet.observer.contents[name] = "new"
    assert fleet.run().exit_code == 0


def test_held_declaration_that_is_replaced_gets_another_canary(store: Store) -> None:
    """The mended commit is tried on one node, too."""
    fleet = fleet_of(store, 10, max_changed_nodes="3")
    fleet.run()
    for key in list(fleet.resources):
        fleet.resources[key] = wrapper(str(key), digest="d2")
        fleet.observer.contents[key] = "old"
    fleet.run()
    assert fleet.converger.rounds == [["node-1/wrapper/w"], ["node-1/wrapper/w"]]


def test_check_foretells_the_hold_and_leaves_no_trace(store: Store) -> None:
    """Only looked at."""
    fleet = fleet_of(store, 10, max_changed_nodes="30%")
    report = fleet.run(check=True)
    assert len(report.plan.actions) == 1
    assert codes(report) == {"MassChange"}
    assert store.hold("mass-change") is None


def test_limited_pass_neither_lifts_nor_escapes_the_hold(store: Store) -> None:
    """The fleet is everything declared, whatever the pass looks at."""
    fleet = fleet_of(store, 10, max_changed_nodes="30%")
    fleet.run()
    whole = dict(fleet.resources)
    some: dict[Any, Resource] = {key: whole[key] for key in list(whole)[:2]}
    fleet.resources = some
    report = fleet.run(limited=True, fleet=10)
    assert codes(report) == {"MassChange"}
    assert store.hold("mass-change") is not None


@pytest.mark.parametrize(
    ("text", "of", "expected"),
    [("30%", 10, 3), ("30%", 2, 1), ("100%", 7, 7), ("5", 3, 5), ("0%", 9, 1), ("1%", 50, 1)],
)
def test_shares(text: str, of: int, expected: int) -> None:
    """Rounded down, one at least."""
    assert share(text, of) == expected


@given(st.integers(1, 12), st.sets(st.integers(1, 12)), st.sampled_from(["10%", "50%", "100%", "1", "3"]))
def test_nobody_is_changed_twice_and_everybody_is_accounted_for(
    count: int, bad: set[int], batch: str
) -> None:
    """Whatever fails: each node is fixed, failed, or says why it was left alone; the canary goes alone."""
    store = Store(None)
    fleet = fleet_of(store, count, batch_size=batch)
    fleet.converger.stubborn = {rid(f"node-{number}/wrapper/w") for number in bad if number <= count}
    report = fleet.run()
    touched = [key for round_ in fleet.converger.rounds for key in round_]
    assert len(touched) == len(set(touched))
    assert len(fleet.converger.rounds[0]) == 1
    told = {str(outcome.id) for outcome in report.outcomes} | {str(skip.id) for skip in report.plan.skips}
    assert told == {str(key) for key in fleet.resources}
    store.close()
