"""What the heartbeat program makes of what it read: dependencies, progress and rounds; and its own small tools."""

from __future__ import annotations

import datetime as dt
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.heartbeat_support import (
    UUID,
    Account,
    card,
    claimed,
    codes,
    ids,
    iso,
    issue,
    linked,
    program,
    warning,
)

HEART = program()


@pytest.fixture
def home(account: Path) -> Account:
    """An account with one agent that starts turns."""
    found = Account(account)
    found.declare()
    return found


def rounds(home: Account, state: dict[str, Any], name: str) -> int:
    """How many turns were started on a task."""
    assert home.home.is_dir()
    return int(state["memory"].get(name, {"rounds": 0})["rounds"])


# --- dependencies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        ("done", "turn"),
        ("running", "waiting"),
        ("todo", "waiting"),
        ("blocked", "waiting"),
        ("review", "waiting"),
    ],
)
def test_a_task_waits_for_its_dependency(home: Account, state: str, outcome: str) -> None:
    """Whoever does that; done is done and nothing else is."""
    home.cards(card("c1", metadata=linked("c2")), card("c2", status=state, agentId="designer"))
    assert home.see()["outcome"] == outcome
    if outcome == "turn":
        home.ended()  # it goes on after the beat
    assert bool(home.calls("openclaw agent")) == (outcome == "turn")


def test_dependencies_reach_over_all_sources(home: Account) -> None:
    """A card waits for an issue, an issue for a box, a box for a card; by id, identifier, title, in fields or in words."""
    home.cards(card("c1", notes="Some text\n- Depends on: MUL-i1\n"), card("c9", status="done", agentId="x"))
    home.issues(issue("i1", depends_on=["write the text"]), issue("i2", blocked_by=[{"id": "c9"}]))
    home.todo("- [ ] Write the text\n- [ ] Publish (depends on: C1)\n")
    waiting = {task["title"]: task["waiting"] for task in home.look()["tasks"]}
    assert waiting == {
        "Card c1": True,
        "Issue i1": True,
        "Issue i2": False,
        "Write the text": False,
        "Publish": True,
    }
    home.todo("- [x] Write the text\n- [ ] Publish (depends on: C1)\n")
    waiting = {task["title"]: task["waiting"] for task in home.look()["tasks"]}
    assert waiting == {"Card c1": True, "Issue i1": False, "Issue i2": False, "Publish": True}


@pytest.mark.parametrize(
    "given", [{"status": "cancelled"}, {"status": "todo", "metadata": {"archivedAt": 1}}]
)
def test_a_cancelled_dependency_is_told_and_never_guessed(home: Account, given: dict[str, Any]) -> None:
    """Neither started nor forgotten; an archived card that was never done is as good as cancelled."""
    home.cards(card("c1", metadata=linked("c2")), card("c2", **given))
    state = home.see()
    assert state["outcome"] == "waiting"
    assert warning(state, "DependencyCancelled")["tasks"] == ["c1", "c2"]


def test_a_dependency_that_no_list_names_is_asked_for(home: Account) -> None:
    """Issues that are done are not listed any more."""
    home.issues(issue("i1", depends_on=["i0"]), issue("i2", depends_on=["gone"]))
    (home.stand_ins / "issue-i0.json").write_text(json.dumps(issue("i0", status="done")))
    state = home.see()
    assert {task["id"]: task["waiting"] for task in state["tasks"]} == {"i1": False, "i2": True}
    assert warning(state, "DependencyUnknown")["tasks"] == ["i2", "gone"]
    home.see()
    assert len(home.calls("issue get i0")) == 1


def test_circles_are_found_and_named(home: Account) -> None:
    """Over sources; each once; those outside that wait for one are not in it."""
    home.cards(
        card("c1", metadata=linked("i1")), card("c2", metadata=linked("c1")), card("c3", metadata=linked("c3")),
        card("c4", metadata=linked("c5")), card("c5", status="done", metadata=linked("c4")),
    )  # fmt: skip
    home.issues(issue("i1", depends_on=["c1"]))
    state = home.look()
    circles = [item for item in state["warnings"] if item["code"] == "Cycle"]
    assert sorted(sorted(item["tasks"]) for item in circles) == [["c1", "i1"], ["c3"]]
    assert "c1 -> i1 -> c1" in circles[0]["detail"] or "i1 -> c1 -> i1" in circles[0]["detail"]
    assert {task["id"] for task in state["tasks"] if not task["waiting"]} == {"c4"}


@given(st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=3), max_size=10))
def test_circles_are_those_that_a_plain_search_finds(graph: dict[int, list[int]]) -> None:
    """A task is in a circle when it can be reached from itself."""
    facts = {str(node): (str(node), "open", [str(to) for to in graph[node]]) for node in graph}

    def reach(start: int) -> set[int]:
        seen: set[int] = set()
        work = [to for to in graph[start] if to in graph]
        while work:
            node = work.pop()
            if node not in seen:
                seen.add(node)
                work += [to for to in graph[node] if to in graph]
        return seen

    found = HEART.cycles(facts, sorted(facts))
    assert {name for circle in found for name in circle} == {
        str(node) for node in graph if node in reach(node)
    }
    assert len([name for circle in found for name in circle]) == len(
        {name for circle in found for name in circle}
    )


def test_a_long_chain_is_no_problem() -> None:
    """Neither for the stack nor for the clock."""
    facts = {str(n): (str(n), "open", [str(n + 1)]) for n in range(20_000)}
    facts["20000"] = ("20000", "open", ["0"])
    began = time.process_time()
    (circle,) = HEART.cycles(facts, ["0"])
    assert len(circle) == 20_001
    assert time.process_time() - began < 5


def test_waiting_too_long_is_told(home: Account) -> None:
    """From when it was first seen to wait, over beats."""
    home.cards(card("c1", metadata=linked("c2")), card("c2", agentId="x"))
    assert "DependencyWait" not in codes(home.see())
    home.declare(dependency_wait=0.001)
    assert warning(home.see(), "DependencyWait")["tasks"] == ["c1"]


# --- progress ---------------------------------------------------------------------------------------


def test_age_and_progress_of_what_is_in_progress(home: Account) -> None:
    """From the claim, and from the item's own time."""
    home.cards(claimed("c1", minutes=100) | {"updatedAt": int((time.time() - 2400) * 1000)})
    home.issues(issue("i1", status="in_progress", updated_at=iso(time.time() - 60)), status="in_progress")
    home.declare(turn=None, task_limit=3600)
    state = home.see()
    first, second = (next(t for t in state["in_progress"] if t["id"] == name) for name in ("c1", "i1"))
    assert 5990 < first["age"] < 6100
    assert 2390 < first["stalled"] < 2500
    assert 50 < second["stalled"] < 160
    assert warning(state, "TaskTooLong")["tasks"] == warning(state, "Stalled")["tasks"] == ["c1"]


def stalled(home: Account) -> int:
    """For how long the one task in progress has not moved."""
    (found,) = home.look()["in_progress"]
    return int(found["stalled"])


def test_a_change_of_status_or_checklist_is_progress(home: Account) -> None:
    """Also where the item's own time says nothing of it; a new title is none."""
    old = {
        "status": "in_progress",
        "updated_at": iso(time.time() - 5000),
        "checklist": [{"text": "a", "done": False}],
    }
    home.issues(issue("i1", **old), status="in_progress")
    assert stalled(home) > 4900
    home.issues(issue("i1", **{**old, "title": "Another"}), status="in_progress")
    assert stalled(home) > 4900
    home.issues(issue("i1", **{**old, "checklist": [{"text": "a", "done": True}]}), status="in_progress")
    assert stalled(home) < 100
    home.issues(
        issue("i1", **{**old, "checklist": [{"text": "a", "done": True}], "status": "doing"}),
        status="in_progress",
    )
    assert stalled(home) < 100


def age_memory(home: Account, seconds: int) -> None:
    """As if the last beat had been that long ago."""
    state = home.state()
    for known in state["memory"].values():
        for key in ("moved", "began", "since"):
            known[key] = known[key] and known[key] - seconds
    home.file("json").write_text(json.dumps(state))


def test_a_box_in_progress_is_remembered(home: Account) -> None:
    """It has no time of its own: it moves when its text's boxes do."""
    home.todo("- [~] Write\n  - [ ] one\n")
    assert stalled(home) < 100
    age_memory(home, 4000)
    assert stalled(home) >= 4000
    home.todo("- [~] Write\n  - [x] one\n")
    assert stalled(home) < 100
    age_memory(home, 5000)
    home.todo("intro\n- [~] Write (P0)\n  > a note\n  - [x] one\n")
    assert stalled(home) >= 5000


def test_a_clock_that_is_ahead_hides_no_standstill(home: Account) -> None:
    """A time in the future is progress when it changes, once."""
    ahead = {"status": "in_progress", "updated_at": iso(time.time() + 30_000)}
    home.issues(issue("i1", **ahead), status="in_progress")
    assert stalled(home) < 100
    age_memory(home, 4000)
    assert stalled(home) >= 4000
    home.issues(issue("i1", **{**ahead, "updated_at": iso(time.time() + 31_000)}), status="in_progress")
    assert stalled(home) < 100


def test_what_a_silent_source_had_in_progress_stays(home: Account) -> None:
    """It ages on; when the source is back, nothing was forgotten; what is gone from a good list is gone."""
    old = {"status": "in_progress", "updated_at": iso(time.time() - 5000)}
    home.issues(issue("i1", **old), status="in_progress")
    first = home.look()
    home.mode("multica", "fail")
    state = home.look()
    (kept,) = state["in_progress"]
    assert kept["stalled"] >= first["in_progress"][0]["stalled"] > 4900
    assert kept["seen"] == first["beat"] < state["beat"]
    home.mode("multica", "ok")
    assert home.look()["in_progress"][0]["seen"] > kept["seen"]
    home.issues(status="in_progress")
    assert home.look()["in_progress"] == []


# --- rounds and turns -------------------------------------------------------------------------------


def test_a_round_is_counted_for_every_turn(home: Account) -> None:
    """On the task that the turn is for; at the limit it is paused, the next task has its turn."""
    home.declare(rounds_max=5, rounds_warn=0.6)
    home.cards(card("c1", priority="high"), card("c2"))
    seen = []
    for _ in range(6):
        state = home.see()
        seen.append((state["turn"]["task"], rounds(home, state, "c1"), sorted(set(codes(state)))))
        home.ended()
    assert [entry[:2] for entry in seen] == [("c1", 1), ("c1", 2), ("c1", 3), ("c1", 4), ("c1", 5), ("c2", 5)]
    assert [entry[2] for entry in seen] == [[], [], [], ["RoundsWarn"], ["RoundsWarn"], ["RoundsLimit"]]
    home.cards(card("c1"))
    assert home.see("architect", "--full")["outcome"] == "paused"


def test_work_in_progress_comes_before_new_work(home: Account) -> None:
    """However urgent that is."""
    home.cards(card("c1", priority="urgent"), claimed("c2"))
    assert home.see()["turn"]["task"] == "c2"


@pytest.mark.parametrize("status", ["todo", "ready"])
def test_a_claimed_card_is_in_progress(home: Account, status: str) -> None:
    """A worker claims a card before it moves it."""
    home.cards({**claimed("c1", minutes=7), "status": status})
    (found,) = home.look()["in_progress"]
    assert 410 < found["age"] < 500


def test_rounds_start_anew_when_a_task_was_away(home: Account) -> None:
    """Blocked, done, or given to somebody else in between."""
    home.cards(card("c1"))
    assert rounds(home, home.see(), "c1") == 1
    home.cards(card("c1", status="blocked"))
    home.see("architect", "--full")
    home.cards(card("c1"))
    home.ended()
    assert rounds(home, home.see("architect", "--full"), "c1") == 1


@pytest.mark.parametrize("status", ["triage", "backlog", "scheduled", "review", "blocked", "done", "odd"])
def test_what_is_not_open_starts_no_turn(home: Account, status: str) -> None:
    """Only what is to be done, or being done."""
    home.cards(card("c1", status=status))
    state = home.see()
    assert (state["outcome"], state["tasks"]) == ("idle", [])


# --- tools ------------------------------------------------------------------------------------------

DATES = st.datetimes(dt.datetime.fromisoformat("1970-01-02"), dt.datetime.fromisoformat("2999-01-01"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e299, 1e299) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_its_json_is_json(value: Any) -> None:
    """Both ways."""
    assert json.loads(HEART.dumps(value)) == value
    assert HEART.loads(" " + json.dumps(value) + "\n") == value


@given(st.text(alphabet='{}[]",:0123456789.eE+-ntrufalsx\\ \n', max_size=60))
def test_what_is_no_json_is_an_error(text: str) -> None:
    """The same texts as the module json refuses, whatever its complaint; and never anything but ValueError."""
    try:
        expected = (True, json.loads(text, parse_constant=lambda _: None, strict=False))
    except (ValueError, RecursionError):
        expected = (False, None)
    try:
        found = (True, HEART.loads(text))
    except ValueError:
        found = (False, None)
    assert repr(found) == repr(expected)


@given(DATES, st.integers(-14 * 60, 14 * 60))
def test_times_are_what_the_calendar_says(when: dt.datetime, minutes: int) -> None:
    """With and without a zone, to the microsecond."""
    zone = dt.timezone(dt.timedelta(minutes=minutes))
    aware = when.replace(tzinfo=zone)
    assert HEART.moment(aware.isoformat()) == pytest.approx(aware.timestamp(), abs=1e-3)
    utc = when.replace(tzinfo=dt.UTC)
    assert (
        HEART.moment(when.isoformat())
        == HEART.moment(when.isoformat() + "Z")
        == pytest.approx(utc.timestamp(), abs=1e-3)
    )
    assert (
        HEART.moment(when.date().isoformat())
        == dt.datetime(when.year, when.month, when.day, tzinfo=dt.UTC).timestamp()
    )


@pytest.mark.parametrize(
    "given", ["", "soon", None, [], True, "2026-13-01", "2026", "99999-01-01", "2026-01-01Tx"]
)
def test_what_is_no_time_is_none(given: Any) -> None:
    """And no exception."""
    assert HEART.moment(given) is None


def test_milliseconds_are_seen_to_be_such() -> None:
    """OpenClaw counts in those."""
    assert HEART.moment(1_770_000_000_123) == HEART.moment(1_770_000_000.123)


@given(st.text())
def test_any_text_is_a_document(text: str) -> None:
    """Boxes or none, but no exception, and no two of one id."""
    found = HEART.boxes("TODO.md", text + "\n- [ ] " + text)
    assert len(set(ids(found))) == len(found)


def test_the_names_of_an_agent(home: Account) -> None:
    """Its id, its Multica id and its label, whatever their case."""
    for number, owner in enumerate(("Architect", UUID.upper(), "梁思筑", "designer")):
        home.cards(card(f"c{number}", agentId=owner))
        assert bool(home.look()["tasks"]) == (owner != "designer")
