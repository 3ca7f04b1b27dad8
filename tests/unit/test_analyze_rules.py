"""The built-in rules: always an answer, the same one for the same facts, whatever the kind."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.analyze.rules import cause_of, judge
from reconciler.model import Change, ResourceId
from tests.unit.analyzers import question

CHANGE = (Change("content", "new", "old"),)


def plain(**given: Any) -> Any:
    return judge(question(**{"changes": CHANGE, "needs_plan": False, **given}))


def test_ordinary_drift_is_routine() -> None:
    found = plain()
    assert (found.severity, found.backend, found.prevention, found.commands) == (2, "rules", "", ())
    assert found.root_cause == "The machine is not as declared in content."
    assert "shipped" in found.plan


def test_drift_that_comes_back_after_a_fix_was_made_by_somebody() -> None:
    assert plain(history=({"status": "fixed", "timestamp": "2026-01-01"},)).root_cause.startswith(
        "Something other than"
    )


@pytest.mark.parametrize(
    ("reason", "cause", "severity"),
    [
        ("database is locked", "locked", 3),
        ("OSError: [Errno 28] No space left on device", "no space", 4),
        ("Permission denied (publickey)", "permission", 3),
        ("npm: command not found", "not found", 3),
        ("npm install timed out after 600 s", "timed out", 3),
        ("Read-only file system", "read-only", 5),
        ("Cannot allocate memory", "memory", 4),
        ("apt needs privilege: set allow_become for this resource", "privilege", 3),
        ("sha256 mismatch", "checksum", 4),
        ("connection refused", "unreachable", 3),
        ("bash: syntax error", "syntax", 3),
        ("it ended with 1", "crashed", 3),
        ("no space left; database is locked", "no space", 4),
        ("blocked by the weather", "", 2),
        ("", "", 2),
    ],
)
def test_words_of_the_reason_tell_the_cause(reason: str, cause: str, severity: int) -> None:
    """Whole words, and what explains the others first."""
    asked = question(changes=CHANGE, needs_plan=False, reason=reason)
    assert (cause_of(asked), judge(asked).severity) == (cause, severity)
    if cause:
        assert reason in judge(asked).root_cause


def test_what_only_a_person_can_end_is_not_routine() -> None:
    changes = (
        Change("type", "INTEGER", "TEXT", fixable=False, note="the type of a column is never changed"),
    )
    found = plain(changes=changes)
    assert found.severity == 3
    assert found.plan == "Only a person can: the type of a column is never changed."
    assert plain(needs_plan=True).severity == 3


def test_many_fields_stay_one_sentence() -> None:
    changes = tuple(Change(f"f{number}", 1, 2) for number in range(9))
    assert plain(changes=changes).root_cause == "The machine is not as declared in f0, f1, f2 and 6 more."


def events(status: str, *moments: datetime, **more: Any) -> list[dict[str, Any]]:
    return [{"timestamp": moment.isoformat() + "+00:00", "status": status, **more} for moment in moments]


MIDNIGHT = datetime(2026, 3, 1, 0, 5)  # noqa: DTZ001 - the zone is written where it is needed


def test_the_third_time_says_how_to_prevent_it_and_weighs_more() -> None:
    assert plain(recurrence=2).prevention == ""
    found = plain(recurrence=3)
    assert (found.severity, "content differed" in found.prevention) == (3, True)
    assert "No pattern in time" in found.prevention


@pytest.mark.parametrize("minutes", [(0, 0, 0), (0, 10, -20), (0, -9, 20)])
def test_the_same_time_of_day_points_to_a_timer(minutes: tuple[int, ...]) -> None:
    """Also round midnight."""
    moments = [MIDNIGHT + timedelta(days=day, minutes=apart) for day, apart in enumerate(minutes)]
    found = plain(recurrence=3, history=tuple(reversed(events("detected", *moments))))
    assert "at about 00:05 UTC" in found.prevention
    assert "timer" in found.prevention


def test_three_times_on_one_day_are_no_time_of_day() -> None:
    moments = [MIDNIGHT + timedelta(minutes=5 * n) for n in range(3)]
    assert "at about" not in plain(recurrence=3, history=tuple(events("detected", *moments))).prevention


def test_soon_after_each_fix_points_to_a_program_that_owns_it() -> None:
    starts = [MIDNIGHT + timedelta(hours=7 * n) for n in range(3)]
    fixed = events("fixed", *[start - timedelta(minutes=4) for start in starts[1:]])
    history = (*events("detected", *starts), *fixed)
    assert "within minutes after each fix" in plain(recurrence=3, history=history).prevention
    late = events("fixed", *[start - timedelta(hours=3) for start in starts[1:]])
    assert (
        "within minutes" not in plain(recurrence=3, history=(*events("detected", *starts), *late)).prevention
    )


def test_a_reason_that_repeats_is_named_redacted() -> None:
    history = events("failed", *[MIDNIGHT] * 3, reason="password=hunter2 is wrong")
    found = plain(recurrence=4, history=tuple(history)).prevention
    assert "Each time it was told: password=(secret) is wrong." in found


def test_the_kind_makes_no_difference() -> None:
    """Rules work on changes and reasons."""
    for reason in ("", "database is locked"):
        answers = {
            judge(question(f"n/{kind}/x", reason=reason)) for kind in ("tool", "service", "a-new-kind")
        }
        assert len(answers) == 1


@given(
    st.text(max_size=300), st.integers(1, 50), st.booleans(),
    st.lists(st.fixed_dictionaries({"timestamp": st.datetimes().map(str) | st.text(max_size=5) | st.none(),
             "status": st.sampled_from(["detected", "fixed", "failed"]), "reason": st.text(max_size=20)}), max_size=12),
    st.lists(st.builds(Change, st.text(max_size=9), st.text(), st.none() | st.text(), st.booleans(), st.text()), max_size=4),
)  # fmt: skip
def test_there_is_always_an_answer(
    reason: str,
    recurrence: int,
    needs_plan: bool,  # noqa: FBT001 - a fact
    history: list[Any],
    changes: list[Change],
) -> None:
    """Within its limits, in one line, and the same again."""
    asked = question(
        reason=reason,
        recurrence=recurrence,
        needs_plan=needs_plan,
        history=tuple(history),
        changes=tuple(changes),
    )
    found = judge(asked)
    assert found == judge(asked)
    assert asked.id == ResourceId("node-1", "tool", "jq")
    assert 1 <= found.severity <= 5
    assert 0 < len(found.root_cause) <= 500
    assert found.root_cause.isprintable()
    assert bool(found.prevention) == (recurrence >= 3)
    assert (found.install, found.commands) == (None, ())
