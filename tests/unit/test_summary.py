"""``reconcile report`` and what ``reconcile status`` says besides the matrix: a day in words, sent where it is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from reconciler.model import Event, ResourceId, Status, Suspension
from reconciler.store import Store
from reconciler.summary import as_chat, as_html, as_text, headline, summary_document
from tests.api.showcase import Showcase, busy_night
from tests.unit.support import Said, reconcile
from tests.unit.test_notify import Receiver

NODES = ("controller", *(f"node-{number}" for number in range(1, 8)))


@pytest.fixture
def night(account: Path) -> Iterator[Showcase]:
    """A fleet after a busy night."""
    made = Showcase(account / "fleet", NODES)
    busy_night(made)
    yield made
    made.close()


def said(night: Showcase, *words: str) -> Said:
    """The command over its database."""
    return reconcile(*words, "--db", str(night.db))


def test_a_day_in_words(night: Showcase) -> None:
    """What is wrong now comes first; then repairs, passes, alerts, suspensions."""
    text = said(night, "report").out
    first = "83 % as desired, 3 resources are not, 1 node is unknown, 3 alerts are open"
    assert text.splitlines()[0].startswith(first)
    for part in (
        "node-7: unknown since",
        "it was started and is failed again: exit status 3; state: failed (exit-code) → running",
        "suspended: disk is being replaced",
        "service: 1, mean 3 min, longest 3 min",
        "7 (2 as desired, 5 could not fix something)",
        "P1 opened: node-5/schema/dispatch NeedsPerson",
        "node-6/tool until",
    ):
        assert part in text, part
    assert text.index("Not as desired now") < text.index("Repaired") < text.index("Passes")
    assert "tool: 2" in said(night, "report", "--since", "7d").out


def test_what_is_over_is_told_and_what_was_before_is_not(night: Showcase) -> None:
    """A resolved alert, and nothing of last week."""
    night.roles.stubborn.clear()
    night.nodes.silent.clear()
    night.run()
    found = summary_document(night.store, datetime.now(UTC) - timedelta(minutes=1))
    assert {row["reason"] for row in found["alerts"]["resolved"]} == {"RepairFailed", "NodeUnknown"}
    assert found["alerts"]["opened"] == []
    assert [(row["kind"], row["count"]) for row in found["repaired"]] == [("service", 1)]
    assert found["unknown_nodes"] == []
    assert headline(found) == "97 % as desired, 2 resources are not, 1 alert is open"


def test_what_keeps_coming_back_is_named(store: Store) -> None:
    """From the third time in a month on, and only while it still does."""
    rid, old = ResourceId("node-1", "tool", "mm"), ResourceId("node-1", "tool", "old")
    now = datetime.now(UTC)
    for which, days in ((rid, (20, 10, 0)), (old, (20, 10, 5))):
        for day in days:
            moment = now - timedelta(days=day, minutes=5)
            store.record(
                [
                    Event(which, "C4", Status.DETECTED, 2, {}, 0, moment),
                    Event(which, "C4", Status.FIXED, 2, {}, 1, moment),
                ]
            )
    found = summary_document(store, now - timedelta(days=1))
    assert found["recurring"] == [{"resource": "node-1/tool/mm", "episodes": 3}]
    assert "node-1/tool/mm: 3 episodes in 30 days" in as_text(found)


def test_before_the_first_pass_there_is_nothing_to_say(store: Store) -> None:
    """In every form, without an error."""
    found = summary_document(store, datetime.now(UTC) - timedelta(days=1))
    for form in (as_text, as_html, as_chat):
        assert "Nothing has been looked at yet" in form(found)


class _Tags(HTMLParser):
    """Which elements were begun and ended."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """One begins."""
        assert not [value for key, value in attrs if key in ("src", "href", "onerror")]
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """The innermost ends."""
        assert self.open.pop() == tag


def test_what_a_node_says_is_markup_nowhere(night: Showcase) -> None:
    """Neither in a mail nor in a chat; control characters reach nobody."""
    evil = "<img src=x onerror=alert(1)> [click](http://evil) @everyone **x** \x1b[31m"
    night.stubborn("node-4/service/task-watcher", evil)
    night.run()
    found = summary_document(night.store, datetime.now(UTC) - timedelta(days=1))
    parser = _Tags()
    parser.feed(as_html(found))
    assert parser.open == []
    assert set(parser.seen) == {"html", "head", "meta", "title", "body", "h1", "p", "h2", "ul", "li"}
    chat = as_chat(found)
    assert r"\[click\](http://evil) \@everyone \*\*x\*\*" in chat
    assert r"\<img" in chat
    assert not [
        c for form in (as_text, as_html, as_chat) for c in form(found) if not c.isprintable() and c != "\n"
    ]


def test_a_chat_gets_no_novel(night: Showcase) -> None:
    """Six lines a section, and how many more there are."""
    night.nodes.silent = set(NODES)
    night.run()
    chat = as_chat(summary_document(night.store, datetime.now(UTC) - timedelta(days=1)))
    assert "- … and 2 more" in chat


def test_status_says_the_rest_as_well(night: Showcase) -> None:
    """Next pass, suspensions with their end, open alerts, times to repair; a silent node is one line."""
    night.store.suspend("node-2", Suspension("moving it", ""))
    shown = said(night, "status")
    text = shown.out
    assert "; next pass 20" in text
    assert "suspended node-6/tool by dana@controller until 20" in text
    assert "suspended node-2 until: reconcile resume node-2: moving it" in text
    assert "open alerts: 3 P1; see: reconcile alerts" in text
    (line,) = [line for line in text.splitlines() if line.startswith("service ")]
    assert line.split() == [
        "service",
        "2",
        "6",
        "min",
        "35",
        "s",
        "3",
        "min",
        "10",
        "min",
        "10",
        "s",
        "10",
        "min",
        "10",
        "s",
        "1",
    ]
    assert len([line for line in text.splitlines() if line.startswith("node-7 Unknown")]) == 1
    document = said(night, "status", "-o", "json").json()
    assert document["next_pass"] > document["last_pass"]["started"]
    assert document["unknown_nodes"] == ["node-7"]
    assert {row["kind"] for row in document["repairs"]} == {"schema", "service", "ssh", "tool", "wrapper"}
    assert [row["target"] for row in document["suspensions"]] == ["node-2", "node-6/tool"]


# --- sending ----------------------------------------------------------------------------------------


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Somewhere that takes reports."""
    made = Receiver()
    yield made
    made.close()


def test_a_report_is_sent_where_it_is_wanted(night: Showcase, receiver: Receiver) -> None:
    """Only on routes that take reports; the exit code says whether it arrived."""
    other = Receiver()
    Path("reconciler.toml").write_text(
        f'[[notify]]\nname = "team"\nurl = "{receiver.url}"\nreports = true\n'
        f'[[notify]]\nname = "on-call"\nurl = "{other.url}"\n'
    )
    sent = said(night, "report", "--send")
    assert (sent.code, sent.out) == (0, f"team ({receiver.url}): sent\n")
    (got,) = receiver.got
    assert got["title"].startswith("Fleet: 83 % as desired")
    assert "node-7: unknown since" in got["message"]
    assert other.got == []
    other.close()


@pytest.mark.parametrize("form", ["html", "chat"])
def test_every_form_is_sent(night: Showcase, receiver: Receiver, form: str) -> None:
    """As what it is: the receiver's own form is made of it."""
    Path("reconciler.toml").write_text(f'[[notify]]\nname = "team"\nurl = "{receiver.url}"\nreports = true\n')
    assert said(night, "report", "--send", "--format", form).code == 0
    assert "exit status 3" in receiver.got[0]["message"]


def test_a_report_that_does_not_arrive_is_said(night: Showcase, receiver: Receiver) -> None:
    """Exit code 3, for the timer that ran it."""
    receiver.answer = 500
    Path("reconciler.toml").write_text(f'[[notify]]\nname = "team"\nurl = "{receiver.url}"\nreports = true\n')
    sent = said(night, "report", "--send")
    assert (sent.code, "failed: it answered HTTP 500" in sent.out) == (3, True)
    assert said(night, "report", "--send", "-o", "json").json()[0]["error"] == "it answered HTTP 500"


def test_without_a_route_it_says_how_to_make_one(night: Showcase) -> None:
    """A configuration error, as is a time that is none."""
    sent = said(night, "report", "--send")
    assert (sent.code, "say reports = true in a [[notify]] table" in sent.err) == (1, True)
    wrong = said(night, "report", "--since", "yesterday")
    assert (wrong.code, "--since: 'yesterday' is neither" in wrong.err) == (1, True)
    assert said(night, "report", "-o", "json").json()["score"] == 83
