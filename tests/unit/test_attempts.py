"""Attempts, back-off, quarantine, suspension, windows: when something is tried, and when it is left alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler import runner, windows
from reconciler.alerts import Alerts
from reconciler.attempts import JITTER, REARM, REARM_CAP, after_failure, delay, is_due, loop_pause
from reconciler.model import (
    Action,
    Limits,
    Mode,
    OpenAttempt,
    Policy,
    Repairs,
    Report,
    Resource,
    RunError,
    Suspension,
    Window,
)
from reconciler.plan import covers
from reconciler.store import Store
from tests.unit.support import Fleet, reconcile, rid, wrapper
from tests.unit.test_loop import World, world

KEY = "node-1/wrapper/w"
NOW = datetime(2026, 3, 4, 5, 6, tzinfo=UTC)


def codes(report: Report) -> dict[str, str]:
    """Why each skipped resource was skipped."""
    return {str(skip.id): skip.code for skip in report.plan.skips}


def stubborn(store: Store, *resources: Resource) -> World:
    """Resources that no repair helps, and somebody who is told."""
    fleet = world(store, *(resources or (wrapper(),)))
    fleet.converger.stubborn = set(fleet.resources)
    fleet.bell = Alerts(store, None)
    return fleet


# --- the times --------------------------------------------------------------------------------------


def test_waits_double_up_to_a_cap() -> None:
    """Each failure doubles the wait, from the declared one."""
    policy = Policy(retry_interval=60, max_attempts=100)
    assert [delay(policy, n) for n in (1, 2)] == [60, 120]
    assert delay(Policy(retry_interval=3000, max_attempts=100), 2) == 3600


def test_after_the_last_attempt_it_is_tried_slowly_but_not_never() -> None:
    """Hours, up to a day; also after three failures in a row, whatever is declared."""
    assert [delay(Policy(max_attempts=2), n) for n in (2, 3, 4)] == [REARM, 2 * REARM, 4 * REARM]
    assert delay(Policy(max_attempts=2), 50) == REARM_CAP
    assert delay(Policy(max_attempts=100), 3) == REARM


@given(st.integers(1, 200), st.floats(0, 1, exclude_max=True), st.floats(1, 1e5), st.integers(1, 100))
def test_waits_stay_within_bounds(failures: int, spread: float, base: float, most: int) -> None:
    """Never sooner than without jitter, never much later, never for ever; exhausted exactly when it says so."""
    resource = wrapper(policy=Policy(retry_interval=base, max_attempts=most))
    before = Repairs(attempts=failures - 1, digest=resource.digest)
    after = after_failure(before, resource, NOW, spread)
    assert after.next_attempt is not None
    wait = (after.next_attempt - NOW).total_seconds()
    plain = delay(resource.policy, failures)
    assert plain - 1e-3 <= wait <= plain * (1 + JITTER) + 1e-3
    assert wait <= max(REARM_CAP, base) * (1 + JITTER)
    assert after.exhausted == (failures >= most)
    assert not is_due(after, resource, NOW)
    assert is_due(after, resource, after.next_attempt)
    assert is_due(after, replace(resource, digest="another"), NOW)


def test_clock_that_was_set_back_keeps_nobody_waiting() -> None:
    """A last attempt in the future never was."""
    after = after_failure(Repairs(), wrapper(), NOW, 0)
    assert not is_due(after, wrapper(), NOW + timedelta(seconds=1))
    assert is_due(after, wrapper(), NOW - timedelta(hours=1))


# --- attempts over passes ---------------------------------------------------------------------------


def test_failed_repair_waits_for_its_next_attempt(store: Store) -> None:
    """The pass in between says when, ends with 3, and does nothing."""
    fleet = stubborn(store)
    fleet.run()
    report = fleet.run(retry=False)
    assert (report.exit_code, codes(report)) == (3, {KEY: "BackOff"})
    assert "next attempt at 20" in report.plan.skips[0].reason
    assert len(fleet.converger.rounds) == 1


def test_somebody_is_told_once_after_the_last_attempt(store: Store) -> None:
    """Not after the first; not again after the third; resolved when it is fixed."""
    fleet = stubborn(store)
    told = []
    for _ in range(4):
        fleet.run()
        told.append([alert["reason"] for alert in Alerts(store, None).open()])
    assert told == [[], ["RepairFailed"], ["RepairFailed"], ["RepairFailed"]]
    assert codes(fleet.run(retry=False)) == {KEY: "AttemptsExhausted"}
    fleet.converger.stubborn = set()
    fleet.run()
    assert Alerts(store, None).open() == []
    assert len(Alerts(store, None).listed(resolved=True)) == 1


def test_new_declaration_is_tried_at_once(store: Store) -> None:
    """And its attempts count from one."""
    fleet = stubborn(store)
    for _ in range(3):
        fleet.run()
    fleet.resources[rid(KEY)] = replace(fleet.resources[rid(KEY)], digest="d2")
    fleet.run(retry=False)
    assert store.events(limit=1)[0]["fix_attempts"] == 1


def test_success_begins_anew(store: Store) -> None:
    """The next failure waits as shortly as the first."""
    fleet = stubborn(store)
    fleet.run()
    fleet.converger.stubborn = set()
    fleet.run()
    assert store.history(Limits(), datetime.now(UTC))[rid(KEY)].attempts == 0


def test_one_that_waits_does_not_hold_up_the_others(store: Store) -> None:
    """Each has its own time."""
    fleet = world(store, wrapper("node-1/wrapper/a"), wrapper("node-1/wrapper/b"))
    fleet.converger.stubborn = {rid("node-1/wrapper/a")}
    fleet.run()
    fleet.observer.contents[rid("node-1/wrapper/b")] = "old"
    assert codes(fleet.run(retry=False)) == {"node-1/wrapper/a": "BackOff"}
    assert fleet.converger.rounds[-1] == ["node-1/wrapper/b"]


# --- quarantine -------------------------------------------------------------------------------------


def test_what_is_changed_back_again_and_again_is_left_alone(store: Store) -> None:
    """After as many corrections as allowed, with one alert; resumed by word, or by a new declaration."""
    fleet = world(store, wrapper(), contents={KEY: "new"})
    fleet.limits, fleet.bell = Limits(max_corrections=3), Alerts(store, None)
    fleet.run()
    for _ in range(5):
        fleet.observer.contents[rid(KEY)] = "old"
        report = fleet.run()
    assert codes(report) == {KEY: "Flapping"}
    assert len(fleet.converger.rounds) == 3
    assert [alert["reason"] for alert in Alerts(store, None).open()] == ["Flapping"]
    store.forget_repairs(rid(KEY), counted_from=datetime.now(UTC) + timedelta(seconds=1))
    assert fleet.run().exit_code == 0
    assert Alerts(store, None).open() == []


def test_intended_changes_are_no_flapping(store: Store) -> None:
    """Somebody who commits often."""
    fleet = world(store, wrapper())
    fleet.limits = Limits(max_corrections=2)
    for number in range(6):
        fleet.resources[rid(KEY)] = replace(fleet.resources[rid(KEY)], digest=f"d{number}")
        fleet.observer.contents[rid(KEY)] = "old"
        assert fleet.run().exit_code == 0


# --- what people say --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["node-1", "node-1/wrapper", KEY, "*/wrapper/w", "node-*", "*"])
def test_suspended_from_the_command_line(store: Store, target: str) -> None:
    """Seen, told, and left alone, with by whom and why."""
    fleet = world(store, wrapper())
    store.suspend(target, Suspension("exam week", "dana", datetime.now(UTC) + timedelta(hours=1)))
    report = fleet.run()
    assert codes(report) == {KEY: "Suspended"}
    assert "by dana" in report.plan.skips[0].reason
    assert "exam week" in report.plan.skips[0].reason
    assert fleet.events(KEY) == ["detected"]
    store.resume(target)
    assert fleet.run().exit_code == 0


def test_suspension_ends_by_itself(store: Store) -> None:
    """At its time."""
    fleet = world(store, wrapper())
    store.suspend(KEY, Suspension("a moment", "", datetime.now(UTC) - timedelta(seconds=1)))
    assert fleet.run().exit_code == 0


@pytest.mark.parametrize(
    "target", ["node-2", "node-1/tool", "node-1/wrapper/v", "node-1/wrapper/w/x", "node"]
)
def test_targets_cover_what_they_say(target: str) -> None:
    """And nothing else."""
    assert not covers(target, rid(KEY))


def test_only_warned_about_is_told_as_routine(store: Store) -> None:
    """Mode warn: an alert that can wait, resolved when somebody has seen to it."""
    fleet = world(store, wrapper(policy=Policy(mode=Mode.WARN)))
    fleet.bell = Alerts(store, None)
    fleet.run()
    assert [(alert["reason"], alert["level"]) for alert in Alerts(store, None).open()] == [
        ("OnlyWarned", "P2")
    ]
    fleet.observer.contents[rid(KEY)] = "new"
    fleet.run()
    assert Alerts(store, None).open() == []


# --- windows ----------------------------------------------------------------------------------------

NIGHT = Window("0 2 * * *", 3 * 3600, "Europe/Berlin")


@pytest.mark.parametrize(
    ("moment", "is_open"),
    [
        ("2026-01-10T00:59:59+00:00", False),  # 01:59:59 in Berlin
        ("2026-01-10T01:00:00+00:00", True),
        ("2026-01-10T03:59:59+00:00", True),
        ("2026-01-10T04:00:00+00:00", False),
        ("2026-07-10T00:00:00+00:00", True),  # summer time: 02:00 there
        ("2026-07-10T03:00:00+00:00", False),
        ("2026-03-29T01:30:00+00:00", True),  # the night when 02:00 does not exist: 03:30 there
    ],
)
def test_window_by_its_own_clock(moment: str, is_open: bool) -> None:  # noqa: FBT001 - a case
    """Summer and winter."""
    assert windows.is_open(NIGHT, datetime.fromisoformat(moment)) is is_open


def test_outside_its_window_nothing_begins(store: Store) -> None:
    """It is drift that is known, no failure: exit code 2, with the time when it opens."""
    soon = datetime.now(UTC) + timedelta(hours=3)
    shut = Window(f"0 {soon.hour} * * *", 60)
    fleet = world(store, wrapper(policy=Policy(window=shut)), wrapper("node-1/wrapper/other"))
    report = fleet.run()
    assert (report.exit_code, codes(report)) == (2, {KEY: "OutsideWindow"})
    assert f"opens at {soon:%Y-%m-%d %H}:00" in report.plan.skips[0].reason
    assert fleet.converger.rounds == [["node-1/wrapper/other"]]
    open_now = Window("* * * * *", 3600)
    fleet.resources[rid(KEY)] = wrapper(policy=Policy(window=open_now))
    assert fleet.run().exit_code == 0


@pytest.mark.parametrize("wrong", ["61 * * * *", "x", "* * *", "0 0 30 2 *"])
def test_windows_that_make_no_sense_are_named(wrong: str) -> None:
    """With the field at fault."""
    found = windows.problem(Window(wrong, 60))
    assert found is not None
    assert found[0] == "cron"
    assert windows.problem(replace(NIGHT, timezone="Mars/Olympus")) is not None
    assert windows.problem(NIGHT) is None


# --- carrying on with what a pass that died had begun -------------------------------------------------


def begun(store: Store, resource: Resource, **given: object) -> None:
    """An attempt that has no end on record."""
    attempt = OpenAttempt(resource.id, "run-0", 1, resource.digest)
    store.begin_attempts([replace(attempt, **given)])  # type: ignore[arg-type]


def test_interrupted_attempt_that_did_its_work_is_fixed_without_doing_it_again(store: Store) -> None:
    """Nothing is run."""
    fleet = world(store, wrapper(), contents={KEY: "new"})
    begun(store, fleet.resources[rid(KEY)])
    report = fleet.run()
    assert [(outcome.status, outcome.number) for outcome in report.outcomes] == [("fixed", 1)]
    assert fleet.converger.rounds == []
    assert fleet.events(KEY) == ["fixed"]
    assert store.open_attempts() == []


def test_interrupted_attempt_is_finished_under_its_own_name(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backup is the one from before anything was changed, and it is not begun a second time."""
    fleet = world(store, wrapper())
    begun(store, fleet.resources[rid(KEY)])
    names: list[tuple[str, bool]] = []
    repair = fleet.converger.repair

    def noted(actions: Sequence[Action], *more: Any) -> Any:
        names.extend((action.attempt, action.resumed) for action in actions)
        return repair(actions, *more)

    monkeypatch.setattr(fleet.converger, "repair", noted)
    fleet.run()
    assert names == [("run-0", True)]
    assert fleet.events(KEY) == ["fixed"]
    assert store.open_attempts() == []


@pytest.mark.parametrize("gone", ["changed", "undeclared", "ignored"])
def test_interrupted_attempt_that_nobody_wants_any_more_is_closed(store: Store, gone: str) -> None:
    """With an event that says what became of it."""
    fleet = world(store, wrapper(), wrapper("node-1/wrapper/other"))
    begun(store, fleet.resources[rid(KEY)])
    if gone == "changed":
        fleet.resources[rid(KEY)] = wrapper(digest="d2")
    elif gone == "ignored":
        fleet.resources[rid(KEY)] = wrapper(policy=Policy(mode=Mode.IGNORE))
    else:
        del fleet.resources[rid(KEY)]
    fleet.run()
    assert fleet.events(KEY)[0] == "failed"
    assert fleet.events(KEY)[1:] == (["detected", "fixing", "fixed"] if gone == "changed" else [])
    assert store.open_attempts() == []


def test_interrupted_attempt_on_a_silent_node_stays_open(store: Store) -> None:
    """Until it answers."""
    fleet = world(store, wrapper())
    begun(store, fleet.resources[rid(KEY)])
    fleet.observer.silent = {"node-1"}
    fleet.run()
    assert len(store.open_attempts()) == 1
    fleet.observer.silent = set()
    fleet.run()
    assert store.open_attempts() == []


# --- nodes that do not answer -------------------------------------------------------------------------


def test_silent_node_is_told_of_once_and_once_when_it_is_back(store: Store) -> None:
    """After it lasted long enough; ten passes make one alert."""
    fleet = world(store, wrapper(), wrapper("node-2/wrapper/w"))
    fleet.bell, fleet.limits = Alerts(store, None), Limits(unknown_alert_after=0)
    fleet.observer.silent = {"node-1"}
    for _ in range(10):
        fleet.run()
    (alert,) = Alerts(store, None).open()
    assert (alert["key"], alert["reason"], alert["occurrences"]) == ("node-1", "NodeUnknown", 10)
    fleet.observer.silent = set()
    fleet.run()
    assert Alerts(store, None).open() == []
    assert len(Alerts(store, None).listed(resolved=True)) == 1


def test_node_that_is_silent_for_a_moment_alarms_nobody(store: Store) -> None:
    """Less than the time allowed."""
    fleet = world(store, wrapper())
    fleet.bell, fleet.observer.silent = Alerts(store, None), {"node-1"}
    fleet.run()
    assert Alerts(store, None).open() == []


# --- the loop's own failures --------------------------------------------------------------------------


def test_loop_that_cannot_run_waits_longer_and_then_ends(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three in a row make it wait; ten end it, for whoever supervises it."""
    fleet.write("wrappers: [{name: w, nodes: node-1, dest: ~/w, content: x}]\n")
    passes = []

    def broken(*_given: object, **_more: object) -> None:
        passes.append(1)
        raise RunError("observe.yml: the interpreter is gone")

    monkeypatch.setattr(runner, "run", broken)
    monkeypatch.setattr(runner.Workspace, "start_ahead", lambda *_given: None)
    said = reconcile(
        "--db", "r.db", env={"RECONCILER_INTERVAL": "0.01s", "RECONCILER_HTTP__ENABLED": "false"}
    )
    assert (said.code, len(passes)) == (3, 10)
    assert "ending, for a supervisor to start anew" in said.err
    assert [loop_pause(10, failures) for failures in (0, 1, 2, 3, 4, 9)] == [10, 10, 10, 20, 40, 160]


class EnoughError(Exception):
    """The test has seen enough."""


def test_invalid_desired_state_is_waited_out(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often: somebody will mend it, and starting anew would not."""
    fleet.write("wrappers: 7\n")
    seen = []
    monkeypatch.setattr(runner.Workspace, "start_ahead", lambda *_given: seen.append(1))

    def wait(_event: object, _seconds: float) -> None:
        if len(seen) > 15:
            raise EnoughError
        time.sleep(0.01)

    monkeypatch.setattr(threading.Event, "wait", wait)
    with pytest.raises(EnoughError):
        reconcile("--db", "r.db", env={"RECONCILER_INTERVAL": "0.01s", "RECONCILER_HTTP__ENABLED": "false"})
    assert len(seen) >= 16
