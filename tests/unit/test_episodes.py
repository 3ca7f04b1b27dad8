"""Episodes and times to repair: pure over events, then over a real store."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from reconciler.episodes import episodes, episodes_since, repairs, took
from reconciler.model import Event, ResourceId, Status
from reconciler.store import Store

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
KEY = "node-1/tool/mm"


def event(status: str, after: float, attempts: int = 0, key: str = KEY, **said: Any) -> dict[str, Any]:
    """One row, so many seconds after noon."""
    moment = (NOON + timedelta(seconds=after)).isoformat(timespec="milliseconds")
    row = {"issue_key": key, "status": status, "timestamp": moment, "fix_attempts": attempts}
    return {**row, "cause": None, "reason": None, **said}


def test_an_episode_lasts_from_the_detection_to_the_fix() -> None:
    """Through failures; each is counted."""
    rows = [
        event("detected", 0, cause="corrective"),
        event("rolled_back", 5, 1),
        event("failed", 65, 2, reason="npm"),
        event("fixed", 125.5, 3),
    ]
    (found,) = episodes(rows, set())
    assert (found.seconds, found.state, found.attempts, found.failed) == (125.5, "fixed", 3, 2)
    assert (found.cause, found.reason) == ("corrective", "npm")


def test_what_has_no_end_is_open_or_given_up() -> None:
    """As the conditions say; a new detection ends the old episode without a time."""
    rows = [event("detected", 0), event("detected", 60), event("detected", 70, key="node-2/tool/mm")]
    found = episodes(rows, {KEY})
    assert [(e.id.node, e.state, e.seconds) for e in found] == [
        ("node-1", "over", None),
        ("node-1", "open", None),
        ("node-2", "over", None),
    ]


def test_an_end_without_a_beginning_is_none() -> None:
    """Its detection was pruned, or lies before what was asked for."""
    assert episodes([event("fixed", 0, 1), event("failed", 1, 1)], set()) == []


def test_times_to_repair_are_those_of_what_was_repaired() -> None:
    """Mean, median, 95 percent, longest by nearest rank; open ones apart."""
    rows = []
    for number in range(1, 21):
        key = f"node-{number}/tool/mm"
        rows += [event("detected", 0, key=key), event("fixed", number, 1, key=key)]
    rows.append(event("detected", 0, key="node-1/ssh/control"))
    ssh, tool = repairs(episodes(rows, {"node-1/ssh/control"}))
    assert (tool.kind, tool.count, tool.open) == ("tool", 20, 0)
    assert (tool.mean, tool.median, tool.p95, tool.longest) == (10.5, 10, 19, 20)
    assert (ssh.count, ssh.open, ssh.mean, ssh.median, ssh.p95, ssh.longest) == (0, 1, None, None, None, None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0.04, "0.0 s"), (9.96, "10.0 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"),
        (7200, "2 h"), (273_600, "3 d 4 h"),
    ],
)  # fmt: skip
def test_lengths_are_said_for_people(seconds: float | None, text: str) -> None:
    """Two units at most."""
    assert took(seconds) == text


def record(store: Store, status: Status, moment: datetime, key: str = KEY) -> None:
    """An event of then."""
    store.record(
        [Event(ResourceId.parse(key), "C4", status, 2, {}, int(status is not Status.DETECTED), moment)]
    )


def test_rows_of_others_belong_to_no_episode() -> None:
    """Times and keys that are none; a time without a zone is UTC."""
    rows = [
        {**event("detected", 0), "timestamp": "yesterday"},
        {**event("detected", 0), "issue_key": "their own"},
        {**event("detected", 0), "timestamp": event("detected", 0)["timestamp"][:19]},
        {**event("fixed", 1, 1), "timestamp": ""},
        event("fixed", 2, 1),
    ]
    (found,) = episodes(rows, set())
    assert (found.seconds, found.attempts) == (2.0, 1)


def test_episodes_of_a_time_are_those_that_reach_into_it(store: Store) -> None:
    """Begun before and ended within: whole. Begun and ended before: not at all."""
    now = datetime.now(UTC)
    record(store, Status.DETECTED, now - timedelta(days=9))
    record(store, Status.FIXED, now - timedelta(days=8))
    record(store, Status.DETECTED, now - timedelta(hours=30))
    record(store, Status.FIXED, now - timedelta(hours=1))
    record(store, Status.DETECTED, now - timedelta(days=20), "node-9/tool/gone")
    (found,) = episodes_since(store, now - timedelta(days=1))
    assert found.seconds == pytest.approx(29 * 3600)
    assert len(episodes_since(store, now - timedelta(days=30))) == 3
