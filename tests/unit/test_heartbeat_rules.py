"""What is made of an agent's state and ledger: stages of tasks, when a beat is late, whom it is for. Tables."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest

from reconciler.kinds.heartbeat import notices, probe
from reconciler.model import ResourceId
from tests.unit.support import ROOT

NOW = 1_800_000_000.0
SETTINGS = {
    "label": "a",
    "late_after": 1800.0,
    "suspected_after": 1800.0,
    "recover_after": 2700.0,
    "tell": ["creator"],
}


@pytest.fixture(scope="module")
def steps() -> ModuleType:
    """The role's steps, for their pure parts."""
    path = ROOT / "roles" / "heartbeat" / "files" / "steps.py"
    spec = importlib.util.spec_from_file_location("heartbeat_steps", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def state(age: float = 60, **more: Any) -> dict[str, Any]:
    """What a beat wrote so many seconds ago."""
    return {"beat": NOW - age, "scheduled_beat": NOW - age, "outcome": "idle", **more}


def facts(seen: Any, known: Any = None, **args: Any) -> dict[str, Any]:
    """What the probe makes of a state file and a ledger."""
    files = {"config": {"path": "/nowhere/at/all"}}
    probe.lib = _Lib
    found: dict[str, Any] = probe.beat({"settings": SETTINGS, "files": files, **args}, seen, known, NOW)
    return {"agent": "architect", "label": "a", "late_after": 1800.0, "sizes": {}, **found}


class _Lib:
    """Of the node's library, what is needed here."""

    @staticmethod
    def expand(path: str) -> str:
        return path


@pytest.mark.parametrize(
    ("seen", "word"),
    [
        (state(60), "fresh"),
        (state(1800), "fresh"),
        (state(1801), "late: 30 min old"),
        (state(90_000), "late: 25 h old"),
        (state(200_000), "late: 2 d old"),
        (state(-30), "fresh"),
        (state(-61), "late: in the future"),
        (state(60, outcome="degraded"), "none of its task sources answers"),
        (state(60, outcome="turn-failed"), "the agent's turn cannot be started"),
        (state(60, outcome="misconfigured"), "the program refuses its configuration"),
        (state(60, outcome="conversation"), "fresh"),
        (None, "never"),
        ({"version": 1}, "never"),
        ("unreadable: no object", "unreadable: no object"),
    ],
)
def test_a_beat_is_fresh_or_says_what_is_wrong(seen: Any, word: str) -> None:
    """And only a fresh one is healthy."""
    found = facts(seen)
    assert (found["beat"], found["healthy"]) == (word, word == "fresh")


def task(still: float, **more: Any) -> dict[str, Any]:
    """A task in progress that has not moved for so many seconds at the last beat."""
    return {
        "id": "T",
        "title": "t",
        "source": "workboard",
        "started": NOW - 9000,
        "progress_at": NOW - 60 - still,
        **more,
    }


@pytest.mark.parametrize(
    ("still", "entry", "stage"),
    [
        (1799, {}, None),
        (1800, {}, "suspected"),
        (2699, {}, "suspected"),
        (2700, {}, "recover"),
        (2000, {"flagged": NOW - 100}, "flagged"),
        (2000, {"flagged": NOW - 5000}, "suspected"),  # it has moved since then
        (2800, {"flagged": NOW - 100}, "recover"),
        (2800, {"released": NOW - 500}, None),  # taken away since: it has all of its time
        (9000, {"released": NOW - 2800, "timeouts": 1}, "recover"),  # taken up again, and still nothing
        (9000, {"released": NOW - 2000, "flagged": NOW - 2500}, "suspected"),
        (2800, {"released": "rubbish", "flagged": None}, "recover"),
    ],
)
def test_stages_of_a_task(still: float, entry: dict[str, Any], stage: str | None) -> None:
    """Read off the state and the ledger alone."""
    found = facts(state(60, in_progress=[task(still)]), {"tasks": {"T": entry}})["stuck"]
    assert [item["stage"] for item in found] == ([stage] if stage else [])


def test_a_fixed_stage_is_no_drift() -> None:
    """What is flagged stays flagged, and nothing is done again."""
    declared = {"beat": "fresh", "tasks": "moving"}
    base = {"outage": False, "healthy": True, "beat": "fresh"}
    for stage, due in (("flagged", False), ("suspected", True), ("recover", True)):
        assert bool(probe.changes(declared, {**base, "stuck": [{"id": "T", "stage": stage}]})) == due


@pytest.mark.parametrize(
    ("entry", "reason", "to"),
    [
        ({"timeouts": 1, "released": NOW - 60}, None, None),
        ({"timeouts": 2, "released": NOW - 60}, "TaskReleased", ("coo", "creator")),
        ({"timeouts": 3, "released": NOW - 60, "blocked": True}, "TaskBlocked", ("owner", "coo", "creator")),
        ({"timeouts": 4, "released": NOW - 60, "blocked": True}, "TaskBlocked", ("owner", "coo", "creator")),
        (
            {"timeouts": 3, "released": NOW - 90_000, "blocked": True},
            None,
            None,
        ),  # a day ago: everybody knows
    ],
)
def test_first_nobody_then_the_coo_then_the_owner(entry: dict[str, Any], reason: str | None, to: Any) -> None:
    """As the ledger counts; those of the agent's class hear of it from the second time on."""
    found = notices.of(SETTINGS, facts(state(), {"tasks": {"T": entry}}))
    assert [(notice.reason, notice.to) for notice in found] == ([(reason, to)] if reason else [])


def test_a_task_that_was_taken_up_again_is_told_no_more() -> None:
    """Its agent works on it."""
    seen = state(60, in_progress=[task(100)])
    entry = {"timeouts": 2, "released": NOW - 5000}
    assert notices.of(SETTINGS, facts(seen, {"tasks": {"T": entry}})) == ()


def test_rounds_are_told_with_what_was_done_and_what_remains() -> None:
    """Before the limit and at it, in one notice per reason."""
    warnings = [
        {"code": "RoundsLimit", "detail": "T (t) had 50 of 50 turns and is paused", "tasks": ["T"]},
        {"code": "RoundsWarn", "detail": "U (u) had 41 of 50 turns", "tasks": ["U"]},
    ]
    listed = [{"id": "V", "title": "Write it"}, {"id": "W", "title": "Send it"}]
    seen = state(60, warnings=warnings, in_progress=[task(600, age=3600, stalled=600)], tasks=listed, open=2)
    warn, limit = sorted(notices.of(SETTINGS, facts(seen)), key=lambda notice: notice.severity)
    assert (warn.reason, limit.reason) == ("RoundsWarn", "RoundsLimit")
    assert limit.detail == (
        "T (t) had 50 of 50 turns and is paused, in progress for 60 min, last progress 10 min ago; "
        "remaining: 2 open (Write it, Send it)"
    )


@pytest.mark.parametrize(
    "code", ["Cycle", "DependencyCancelled", "DependencyWait", "TaskTooLong", "SourceDown", "TurnFailed"]
)
def test_what_the_program_warns_of_is_told_to_those_of_the_class(code: str) -> None:
    """And every reason is one that ends when its notice does."""
    (notice,) = notices.of(
        SETTINGS, facts(state(60, warnings=[{"code": code, "detail": "d", "tasks": []}] * 7))
    )
    assert (notice.reason, notice.to) == (code, ("creator",))
    assert notice.detail.endswith("and 2 more")
    assert code in notices.REASONS


def test_long_files_are_told() -> None:
    """Over 5 KB, whether a turn reads it as instructions or as documents."""
    seen = {**facts(state()), "sizes": {"HEARTBEAT.md": 5120, "AGENTS.md": 5121}}
    (notice,) = notices.of(SETTINGS, seen)
    assert (notice.reason, notice.detail) == ("FileTooLong", "AGENTS.md has 5121 bytes")


@pytest.mark.parametrize(
    ("beat", "forced", "restarted", "due"),
    [
        (2000, 0, 0, "beat"),  # late once
        (2000, 300, 0, "restart"),  # a beat was forced five minutes ago, and there is none since
        (2000, 300, 100, "nothing left"),
        (2000, 9000, 0, "beat"),  # that was another story
        (2000, 3000, 2900, "beat"),  # it helped: there was a beat since, and it is late again
        (None, 300, 0, "restart"),
        (60, 300, 0, "restart"),  # it beats, and is not healthy: what was forced did not help
        (60, 0, 0, "beat"),
        (60, 300, 100, "nothing left"),
        (60, 300, 5000, "restart"),
    ],
)
def test_what_is_due_for_an_agent_that_is_late(
    steps: ModuleType, beat: float | None, forced: float, restarted: float, due: str
) -> None:
    """By the node's own record, in seconds before now (0: never)."""
    ledger = {"forced_beat": forced and NOW - forced, "restarted": restarted and NOW - restarted}
    seen = None if beat is None else state(beat)
    assert steps.escalation(seen, ledger, SETTINGS, NOW) == due


def seen(scheduled: float | None, installed: float = 9000) -> dict[str, Any]:
    """An agent whose timer made it beat so many seconds ago."""
    return {"scheduled_age": scheduled, "installed": installed, "late_after": 1800.0}


@pytest.mark.parametrize(
    ("agents", "told"),
    [
        ([], False),
        ([seen(9000)], False),  # one agent is no fleet
        ([seen(9000), seen(None)], True),
        ([seen(9000), seen(60)], False),
        ([seen(None, 60), seen(None, 60)], False),  # installed a minute ago
        ([seen(9000), seen(9000), seen(None, 60)], True),
        ([seen(9000), seen(9000), seen(30, 60)], False),
    ],
)
def test_no_beat_anywhere_is_the_mechanism(agents: list[dict[str, Any]], *, told: bool) -> None:
    """Beats that were forced do not count: a timer has to have fired."""
    found = notices.common_cause({ResourceId(f"n{i}", "heartbeat", "a"): f for i, f in enumerate(agents)})
    assert (found is not None) == told
    assert found is None or (found.notice.reason, found.fields) == ("NoBeatAnywhere", {"beat"})


def test_samples_are_measured_and_what_is_not_known_has_none() -> None:
    """Five names; without a sidecar three, without a beat one."""
    sources = {"workboard": {"status": "ok", "count": 3}, "multica": {"status": "timeout", "count": None}}
    provider = {"outage": False, "client": {"rate_429": 0.25, "seconds": 1.5, "attempts": 8}}
    whole = facts(state(60, in_progress=[task(600, stalled=600)], sources=sources)) | {"provider": provider}
    assert {(s.name, s.labels.get("type"), s.value) for s in notices.samples("a", "n", whole)} == {
        ("agent_heartbeat_status", None, 1.0),
        ("agent_task_stagnation_seconds", None, 600.0),
        ("agent_workboard_pending", "workboard", 3.0),
        ("agent_429_error_rate", None, 0.25),
        ("agent_response_time_seconds", None, 1.5),
    }
    late = facts(state(9000)) | {"provider": {"outage": None, "client": None}}
    assert [(s.name, s.value) for s in notices.samples("a", "n", late)] == [
        ("agent_heartbeat_status", 0.0),
        ("agent_task_stagnation_seconds", 0.0),
    ]
    assert [s.name for s in notices.samples("a", "n", facts(None))] == ["agent_heartbeat_status"]
