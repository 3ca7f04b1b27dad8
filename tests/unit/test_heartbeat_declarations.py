"""What is declared of an agent: its class, what goes before what, the files that follow, and mistakes at their place."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import yaml

from reconciler.desired.load import load
from reconciler.inventory import Inventory
from reconciler.kinds.registry import kinds
from reconciler.model import ConfigurationError, Resource
from reconciler.store import Store
from tests.unit.support import ROOT, Fleet, reconcile, rid, shown_problems, wrapper
from tests.unit.test_loop import world

BUSINESS = "{agent: a, nodes: node-1, class: business, workspace: ~/a"
MINUTE = 60.0


def text(resource: Resource, name: str = "file") -> str:
    """The content of one of its files."""
    return base64.b64decode(resource.args["files"][name]["body"]).decode()


def settings(fleet: Fleet, entry: str, header: str = "") -> dict[str, Any]:
    """What the program is told of one agent."""
    fleet.write(f"{header}\nheartbeats:\n  - {entry}\n")
    found: dict[str, Any] = fleet.resource("node-1/heartbeat/a").args["settings"]
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("high-frequency", (10, 20, 30, 60, 50, 60, ["coo"])),
        ("development", (15, 30, 45, 120, 100, 120, ["coo", "creator"])),
        ("business", (15, 30, 45, 90, 30, 120, ["creator"])),
    ],
)
def test_classes_have_the_values_of_the_table(fleet: Fleet, name: str, expected: tuple[Any, ...]) -> None:
    """Minutes; a beat is late after two intervals."""
    found = settings(fleet, BUSINESS.replace("business", name) + "}")
    keys = ("interval", "suspected_after", "recover_after", "task_limit", "rounds_max", "dependency_wait")
    times = [found[key] / (1 if key == "rounds_max" else MINUTE) for key in keys]
    assert (*times, found["tell"]) == expected
    assert (found["late_after"], found["rounds_warn"]) == (2 * found["interval"], 0.8)


def test_an_entry_goes_before_its_class_and_classes_before_what_is_built_in(fleet: Fleet) -> None:
    """Each value by itself."""
    header = "classes: {heartbeats: {business: {every: 20m, rounds: 7}}}"
    found = settings(fleet, BUSINESS + ", every: 5m, late_after: 7m}", header)
    assert (found["interval"], found["rounds_max"], found["task_limit"], found["late_after"]) == (
        300,
        7,
        5400,
        420,
    )


def test_a_class_of_ones_own_is_declared_in_full(fleet: Fleet) -> None:
    """Otherwise the first value that is missing is named."""
    whole = "every: 1h, suspected_after: 2h, recover_after: 3h, task_limit: 8h, rounds: 9, dependency_wait: 1d, tell: [ops]"
    header = f"classes: {{heartbeats: {{night: {{{whole}}}}}}}"
    assert settings(fleet, BUSINESS.replace("business", "night") + "}", header)["tell"] == ["ops"]
    fleet.write(
        f"{header.replace(', rounds: 9', '')}\nheartbeats:\n  - {BUSINESS.replace('business', 'night')}}}\n"
    )
    (problem,) = shown_problems(reconcile("validate").err)
    assert problem.message == "the class night has no rounds"


@pytest.mark.parametrize(
    ("entry", "message", "marked", "hint"),
    [
        (BUSINESS.replace("business", "busines") + "}", "there is no class 'busines'", "busines", "known: business, "),
        (BUSINESS + ", timezone: Asia/Shangai}", "there is no time zone 'Asia/Shangai'", "Asia/Shangai", "such as"),
        (BUSINESS + ", timer: cron, every: 25m}", "cron beats every 1, 2, 3, 4, 5, 6, 10, 12, 15, 20 or 30 minutes, or 1, 2, 3, 4, 6, 8, 12 or 24 hours", "25m", "or let systemd"),
        (BUSINESS + ", recover_after: 10m}", "a task is recovered later than it is suspected", "10m", "suspected_after is 30m"),
        (BUSINESS + ", every: 0s}", "has to be longer than nothing", "0s", ""),
        (BUSINESS + ", template: files/no.j2}", "cannot read 'files/no.j2': No such file or directory", "files/no.j2", "paths are"),
        (BUSINESS + ", sources: {workboard: null, documents: null}}", "an agent without any source has nothing to look at", "{", ""),
        (BUSINESS + ", language: fr}", "language may be 'en' or 'zh', not 'fr'", "fr", ""),
    ],
)  # fmt: skip
def test_mistakes_are_named_at_their_place(
    fleet: Fleet, entry: str, message: str, marked: str, hint: str
) -> None:
    """With the way out."""
    fleet.write(f"heartbeats:\n  - {entry}\n")
    (problem,) = shown_problems(reconcile("validate").err)
    assert problem.message == message
    assert problem.marked.startswith(marked)
    assert hint in problem.hint


def test_a_template_of_ones_own_is_given_the_same_values(fleet: Fleet) -> None:
    """And the node's variables."""
    fleet.write("{{ agent }} {{ minutes.interval }} {{ site }} {{ checks | join('+') }}\n", "files/h.j2")
    fleet.variables("node-1", "site: here")
    fleet.write(f"heartbeats:\n  - {BUSINESS}, template: files/h.j2, checks: ['{{{{ x }}}}', b]}}\n")
    assert text(fleet.resource("node-1/heartbeat/a")) == "a 15 here {{ x }}+b\n"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_instructions_say_what_an_agent_has_to_know(fleet: Fleet, language: str) -> None:
    """Its ids, its class's values, its checklist, its three sources and the rules, in either language."""
    given = f"{BUSINESS}, language: {language}, label: 文墨言, multica: 8321b0bf, checks: [publishing plan], timezone: Asia/Shanghai}}"
    fleet.write(f"heartbeats:\n  - {given}\n")
    found = text(fleet.resource("node-1/heartbeat/a"))
    for word in ("文墨言", "8321b0bf", "publishing plan", "Asia/Shanghai", "TODO.md", "openclaw workboard list --json",
                 "multica issue list", "15", "30", "45", "90", "120", "80", "creator", "~/a"):  # fmt: skip
        assert word in found, word
    rules = {"en": "Never interrupt a conversation", "zh": "不要打断对话"}
    assert rules[language] in found
    assert "\n\n\n" not in found


def test_the_fourteen_agents_of_this_repository_are_declared_as_they_are() -> None:
    """Each once, with its class, ids and checks; their instructions are short and in Chinese."""
    entries = yaml.safe_load((ROOT / "desired_state" / "agents.yml").read_text())["heartbeats"]
    assert len({entry["agent"] for entry in entries}) == len({entry["multica"] for entry in entries}) == 14
    resources = load(ROOT / "desired_state", Inventory(ROOT / "inventory")).resources.values()
    agents = {r.id.name: r for r in resources if r.id.kind == "heartbeat"}
    assert set(agents) == {entry["agent"] for entry in entries}
    for resource in agents.values():
        assert "的心跳" in text(resource)
        assert len(text(resource).encode()) < 5 * 1024
        assert json.loads(text(resource, "config")) == resource.args["settings"]
        assert resource.args["settings"]["timezone"] == "Asia/Shanghai"
    every = {name for name, r in agents.items() if r.args["settings"]["interval"] == 600}
    assert every == {"coo", "secretary", "costcodev", "opengineer", "projectmanager"}


def test_agents_do_not_beat_together(fleet: Fleet) -> None:
    """Nor do two agents of the same name on two nodes; and the same declaration is always the same text."""
    fleet.write(
        "heartbeats:\n"
        + "".join(
            f"  - {BUSINESS.replace('agent: a', f'agent: a{n}').replace('~/a', f'~/a{n}')}}}\n"
            for n in range(14)
        )
    )
    once, again = (list(fleet.load().resources.values()) for _ in range(2))
    timers = [base64.b64decode(r.args["timer_files"]["files"][1]["body"]).decode() for r in once]
    assert [r.fields for r in once] == [r.fields for r in again]
    phases = {line for timer in timers for line in timer.splitlines() if line.startswith("OnActiveSec=")}
    assert len(phases) > 10
    service = base64.b64decode(once[0].args["timer_files"]["files"][0]["body"]).decode()
    assert "KillMode=process" in service  # the turn outlives the beat


def test_two_entries_for_one_agent_are_refused(fleet: Fleet) -> None:
    """Whatever they are called: they would write the same files."""
    fleet.write(f"heartbeats:\n  - {BUSINESS}}}\n  - {BUSINESS}, name: b}}\n")
    with pytest.raises(ConfigurationError) as raised:
        fleet.load()
    assert "as heartbeat 'a' does at" in str(raised.value)


@pytest.mark.parametrize(("recurring", "corrections"), [(("content",), 0), ((), 3)])
def test_what_comes_back_by_itself_is_no_flapping(
    store: Store, monkeypatch: pytest.MonkeyPatch, recurring: tuple[str, ...], corrections: int
) -> None:
    """Tasks get stuck again and again; that is no sign that something changes them back."""
    monkeypatch.setattr(kinds()["wrapper"], "RECURRING", recurring)
    fleet = world(store, wrapper())
    fleet.run()
    for _ in range(3):
        fleet.observer.contents[rid("node-1/wrapper/w")] = "old"
        fleet.run()
    assert store._corrections("2000-01-01T00:00:00").get("node-1/wrapper/w", 0) == corrections
