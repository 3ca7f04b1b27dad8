"""`reconcile suspend` and `resume`: what people say, and every way to say it wrong."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from reconciler.model import Repairs
from reconciler.store import Store
from tests.unit.support import Fleet, reconcile, rid

STATE = "wrappers: [{name: w, nodes: workers, dest: ~/w, content: x}, {name: v, nodes: node-1, dest: ~/v, content: x}]\n"


def say(*words: str) -> tuple[int, str]:
    """Exit code and everything printed."""
    said = reconcile(*words, "--db", "r.db")
    return said.code, said.out + said.err


def test_suspend_says_what_it_covers_and_resume_ends_it(fleet: Fleet) -> None:
    """With reason, owner and expiry on record."""
    fleet.write(STATE)
    code, said = say(
        "suspend", "node-1", "--reason", "disk is being replaced", "--until", "2h", "--owner", "dana"
    )
    assert code == 0
    assert "node-1: 2 resources are left alone until" in said
    store = Store(fleet.directory / "r.db")
    found = store.suspensions()["node-1"]
    assert (found.reason, found.owner) == ("disk is being replaced", "dana")
    assert found.until is not None
    assert timedelta(hours=1) < found.until - datetime.now(UTC) < timedelta(hours=3)
    store.close()
    assert "node-1: no longer suspended" in say("resume", "node-1", "--reason", "done")[1]
    assert "node-1: was not suspended" in say("resume", "node-1")[1]


def test_owner_is_the_account_where_nobody_says(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind sudo the one who asked."""
    monkeypatch.setenv("SUDO_USER", "sam")
    fleet.write(STATE)
    document = reconcile("suspend", "*/wrapper/w", "-r", "x", "--db", "r.db", "-o", "json").json()
    assert document["owner"].startswith("sam@")
    assert document["resources"] == ["node-1/wrapper/w", "node-2/wrapper/w"]
    assert document["until"] is None


def test_resume_lets_what_failed_begin_anew_and_names_what_still_holds(fleet: Fleet) -> None:
    """A wider suspension goes on."""
    fleet.write(STATE)
    say("suspend", "node-*", "-r", "x")
    store = Store(fleet.directory / "r.db")
    store.set_repairs(rid("node-1/wrapper/w"), Repairs(attempts=2, digest="d", exhausted=True))
    said = say("resume", "node-1/wrapper/w")[1]
    assert "1 resource is tried anew" in said
    assert "still suspended by: node-*" in said
    store.close()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["suspend", "node-9", "-r", "x"], "did you mean 'node-"),
        (["suspend", "node-1/wraper", "-r", "x"], "covers nothing that is declared"),
        (["suspend", "node-1", "-r", " "], "say why"),
        (["suspend", "node-1", "-r", "x", "--until", "soon"], "neither a duration"),
        (["suspend", "node-1", "-r", "x", "--until", "2020-01-01"], "is over already"),
        (["resume", "nobody"], "covers nothing that is declared"),
    ],
)
def test_mistakes_are_named(fleet: Fleet, words: list[str], expected: str) -> None:
    """And nothing is suspended."""
    fleet.write(STATE)
    code, said = say(*words)
    assert code == 1
    assert expected in said
    if (fleet.directory / "r.db").exists():
        store = Store(fleet.directory / "r.db")
        assert store.suspensions() == {}
        store.close()


def test_status_shows_a_suspension_before_the_next_pass(fleet: Fleet) -> None:
    """At once."""
    fleet.write(STATE)
    store = Store(fleet.directory / "r.db")
    row = dict.fromkeys(("message", "since", "seen", "digest"), "")
    identity = {"issue_key": "node-1/wrapper/w", "node": "node-1", "kind": "wrapper", "name": "w"}
    store.set_conditions([{**row, **identity, "status": "True", "reason": "AsDesired", "details": {}}])
    store.close()
    say("suspend", "node-1", "-r", "exam week")
    assert "suspended: exam week" in say("status")[1]
