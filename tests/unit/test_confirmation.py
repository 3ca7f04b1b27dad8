"""What could lock us out is done together with what makes it count, and confirmed with it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from reconciler.diff import diff
from reconciler.model import Action, Limits, Observation, Plan, Repairs, Resource, ResourceId
from reconciler.node import lib, writing
from reconciler.plan import Situation, plan
from reconciler.rollout import next_wave
from tests.unit.support import known, rid, wrapper

NOW = datetime(2026, 11, 21, tzinfo=UTC)
FILE = replace(wrapper(), paths_written=frozenset({"/etc/lock"}), confirm_within=5.0)
DAEMON = Resource(
    rid("node-1/service/ssh"), "C9", {"state": "running", "fresh": True}, {}, digest="d2",
    paths_read=frozenset({"/etc/lock"}),
)  # fmt: skip
RUNNING = {
    "state": "running",
    "stale": "",
    "enabled": "enabled",
    "masked": False,
    "result": "",
    "substate": "running",
}


def planned(*resources: Resource, **situation: Any) -> Plan:
    """The plan for a drifted file and a daemon that runs."""
    wanted = {resource.id: resource for resource in resources}
    seen = {
        found: known(resource) if found.kind == "wrapper" else Observation(found, RUNNING)
        for found, resource in wanted.items()
    }
    return plan(wanted, seen, diff(wanted, seen), Situation(now=NOW, started=NOW, **situation))


def wave(found: Plan) -> list[ResourceId]:
    return [action.id for action in next_wave(found, (), {}, Limits())]


def test_risky_file_goes_together_with_the_service_that_reads_it() -> None:
    """The restart shows what the file leads to."""
    found = planned(FILE, DAEMON)
    assert [action.writers for action in found.actions] == [frozenset(), frozenset({FILE.id})]
    assert wave(found) == [FILE.id, DAEMON.id]


def test_file_that_locks_nobody_out_comes_first_and_its_reader_later() -> None:
    """A reader whose file could not be written has nothing to do."""
    assert wave(planned(replace(FILE, confirm_within=0.0), DAEMON)) == [FILE.id]


def test_mere_dependant_waits_for_its_risky_dependency() -> None:
    """Only what makes the change count is done before it is confirmed."""
    other = replace(wrapper("node-1/wrapper/z"), depends_on=(FILE.id,))
    assert wave(planned(FILE, other)) == [FILE.id]


def test_reader_that_waits_for_something_else_too_is_not_hurried() -> None:
    """What it depends on besides has not been done."""
    first = Action(FILE.id, (), is_risky=True)
    slow = Action(rid("node-1/tool/t"), (), after=frozenset({FILE.id}))
    reader = Action(DAEMON.id, (), after=frozenset({FILE.id, slow.id}), writers=frozenset({FILE.id}))
    assert wave(Plan((first, slow, reader), ())) == [FILE.id]


def test_consequence_does_not_wait_for_a_back_off_of_its_own() -> None:
    """Otherwise the file would be tried again, and confirmed, without it."""
    later = Repairs(1, "d2", NOW - timedelta(seconds=1), NOW + timedelta(hours=1))
    found = planned(FILE, DAEMON, history={DAEMON.id: later})
    assert [action.id for action in found.actions] == [FILE.id, DAEMON.id]


@pytest.mark.parametrize("state", ["applying", "applied"])
def test_confirmed_attempt_is_not_undone(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose step died before it could say that it had made the change."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(writing, "lib", lib)
    writing.write_journal("wrapper", "w", "a1", state, {})
    writing.confirm("wrapper", "w", "a1")
    assert writing.read_journal("wrapper", "w", "a1")["state"] == "confirmed"


def test_attempt_that_nobody_carried_on_with_does_not_undo_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The declaration changed after the controller died: the node's watch over the first attempt has nothing to say."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(writing, "lib", lib)
    assert not writing.was_superseded("wrapper", "w", "a1")
    writing.write_journal("wrapper", "w", "a0", "confirmed", {})
    writing.write_journal("wrapper", "w", "a1", "applied", {})
    writing.write_journal("wrapper", "other", "a2", "confirmed", {})
    writing.write_journal("wrapper", "w", "a2", "applied", {})
    assert not writing.was_superseded("wrapper", "w", "a1"), (
        "what is not confirmed may have to be undone, too"
    )
    writing.confirm("wrapper", "w", "a2")
    assert writing.was_superseded("wrapper", "w", "a1")
    assert not writing.was_superseded("wrapper", "w", "a2")


def test_what_dead_processes_wrote_beside_is_removed_and_what_living_ones_do_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that was killed while it validated cannot clean up after itself."""
    monkeypatch.setattr(writing, "lib", lib)
    directory = tmp_path / "there"
    directory.mkdir()
    dead, living = directory / ".w.sh.4194305.new", directory / ".w.sh.1.new"
    for path in (dead, living, directory / ".other.4194305.new"):
        path.write_text("half")
    writing.write_atomically(str(directory / "w.sh"), b"whole")
    assert sorted(path.name for path in directory.iterdir()) == [".other.4194305.new", ".w.sh.1.new", "w.sh"]
