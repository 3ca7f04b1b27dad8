"""What the heartbeat program reads: two commands and the workspace's documents, and what is left when they fail."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.heartbeat_support import (
    MULTICA,
    UUID,
    Account,
    card,
    claimed,
    codes,
    ids,
    is_alive,
    iso,
    issue,
    number,
    program,
    until,
    warning,
)

LISTING = {"workboard": "openclaw workboard list", "multica": "multica issue list"}


@pytest.fixture
def home(account: Path) -> Account:
    """An account with one agent."""
    found = Account(account)
    found.declare(turn=None)
    return found


def test_three_sources_become_one_list(home: Account) -> None:
    """Open and in progress, of this agent only, with what each source calls itself."""
    home.cards(
        card("c1"),
        claimed("c2"),
        card("c3", agentId="designer"),
        card("c4", status="done"),
        card("c5", agentId=None),
    )
    home.issues(issue("i1"))
    home.issues(issue("i2", status="in_progress"), status="in_progress")
    home.todo("- [ ] Write\n- [x] Written\n")
    home.todo("- [~] Improve\n", "AGENTS.md")
    state = home.see()
    assert {(task["source"], task["title"], task["status"]) for task in state["tasks"]} == {
        ("workboard", "Card c1", "open"), ("workboard", "Card c2", "in_progress"), ("multica", "Issue i1", "open"),
        ("multica", "Issue i2", "in_progress"), ("documents", "Write", "open"), ("documents", "Improve", "in_progress"),
    }  # fmt: skip
    assert (state["open"], state["in_progress_total"]) == (3, 3)
    assert {name: (s["status"], s["count"]) for name, s in state["sources"].items()} == {
        "workboard": ("ok", 2), "multica": ("ok", 2), "documents": ("ok", 2),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "status"),
    [("fail", "failed"), ("rubbish", "rubbish"), ("silent", "rubbish"), ("huge", "rubbish")],
)
@pytest.mark.parametrize("command", ["openclaw", "multica"])
def test_a_command_that_does_badly_costs_only_its_own_source(
    home: Account, command: str, mode: str, status: str
) -> None:
    """The others are used, and it is said what happened."""
    down, up = ("workboard", "multica") if command == "openclaw" else ("multica", "workboard")
    home.cards(card("c1"))
    home.issues(issue("i1"))
    home.todo("- [ ] Write\n")
    home.mode(command, mode)
    state = home.see()
    assert state["sources"][down]["status"] == status
    assert state["sources"][down]["detail"]
    assert down in warning(state, "SourceDown")["detail"]
    assert {task["source"] for task in state["tasks"]} == {up, "documents"}
    assert state["outcome"] == "idle"


def test_a_failing_command_is_quoted(home: Account) -> None:
    """With its status and its last line."""
    home.mode("openclaw", "fail")
    assert (
        home.see()["sources"]["workboard"]["detail"]
        == "exit status 3: gateway not connected: ECONNREFUSED 127.0.0.1:18789"
    )


def test_a_missing_command_is_named(home: Account) -> None:
    """As missing, which is not the same as failing."""
    (home.bin / "multica").unlink()
    home.cards(card("c1"))
    state = home.see()
    assert state["sources"]["multica"]["status"] == "missing"
    assert "multica" in state["sources"]["multica"]["detail"]
    assert ids(state["tasks"]) == ["c1"]


@pytest.mark.parametrize("mode", ["hang", "hang-deaf"])
def test_a_command_that_hangs_is_ended_with_its_children(home: Account, mode: str) -> None:
    """After its time; deaf ones too."""
    home.declare(turn=None, source_timeout=1)
    home.mode("openclaw", mode)
    home.todo("- [ ] Write\n")
    began = time.monotonic()
    state = home.see()
    assert time.monotonic() - began < 30
    assert state["sources"]["workboard"]["status"] == "timeout"
    assert [task["title"] for task in state["tasks"]] == ["Write"]
    pids = [
        number(home.stand_ins / name) for name in ("child", "grandchild") if (home.stand_ins / name).exists()
    ]
    assert pids
    until(lambda: not any(map(is_alive, pids)), 10)


def test_a_beat_that_is_asked_to_stop_leaves_no_command_behind(home: Account) -> None:
    """A service manager stops a beat while a command hangs."""
    home.mode("openclaw", "hang")
    process = home.start("architect")
    child = number(home.stand_ins / "child")
    process.terminate()
    assert process.wait(30) == 128 + 15
    until(lambda: not is_alive(child), 10)


def test_documents_have_a_timeout_too(home: Account) -> None:
    """A pipe that nobody writes to stands where the file should be."""
    home.declare(turn=None, source_timeout=1)
    os.mkfifo(home.workspace / "TODO.md")
    home.cards(card("c1"))
    state = home.see()
    assert state["sources"]["documents"]["status"] == "timeout"
    assert ids(state["tasks"]) == ["c1"]


def test_a_workspace_that_is_not_there_is_missing(home: Account) -> None:
    """No documents in a workspace is well, no workspace is not."""
    assert home.see()["sources"]["documents"]["status"] == "ok"
    home.workspace.rmdir()
    assert home.see()["sources"]["documents"]["status"] == "missing"


def test_a_beat_without_any_source_is_degraded(home: Account) -> None:
    """Its exit code says so, no turn is started, the state is written all the same."""
    home.declare()
    home.mode("openclaw", "fail")
    home.mode("multica", "fail")
    home.workspace.rmdir()
    assert home.beat().code == 2
    assert home.state()["outcome"] == "degraded"
    assert not home.calls("openclaw agent")


def test_thousands_of_items_stay_bounded(home: Account) -> None:
    """All are counted, the urgent ones listed; the state file stays small, dependencies are still found."""
    many = [card(f"c{n:04}", title=f"Task {n} " + "x" * 500) for n in range(4000)]
    many.append(
        card(
            "urgent", priority="urgent", metadata={"links": [{"type": "blocked_by", "targetCardId": "c3999"}]}
        )
    )
    home.cards(*many, *[claimed(f"p{n}", title=f"Going {n}") for n in range(500)])
    home.todo("".join(f"- [ ] Box {n}\n" for n in range(3000)))
    state = home.see()
    assert (state["open"], state["in_progress_total"]) == (7001, 500)
    assert state["tasks"][0]["id"] == "urgent"
    assert state["tasks"][0]["waiting"]
    assert (len(state["tasks"]), len(state["in_progress"])) == (50, 100)
    assert home.file("json").stat().st_size < 150_000


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ('[{"id": "a", "title": "A", "agentId": "architect"}]', ["a"]),
        (
            '{"data": {"items": [{"id": 5, "title": "A", "assignee": {"id": "architect", "name": "x"}}]}}',
            ["5"],
        ),
        (
            '[plugins] loaded 3\nwarning: old\n{"cards": [{"id": "a", "title": "A", "agentId": "ARCHITECT"}]}\n',
            ["a"],
        ),
        ('{"cards": []}', []),
        ('{"cards": [7, {"id": "a", "title": "A", "agentId": "architect"}, {"title": "no id"}]}', ["a"]),
        (
            '\n {"cards": [{"id": "a", "title": "A\\ud83d", "agentId": "architect", "updatedAt": 1e999}]}',
            ["a"],
        ),
    ],
)
def test_shapes_that_are_understood(home: Account, printed: str, found: list[str]) -> None:
    """A bare list, nested ones, banners before the JSON, odd entries among good ones."""
    (home.stand_ins / "cards.json").write_text(printed)
    state = home.see()
    assert (state["sources"]["workboard"]["status"], ids(state["tasks"])) == ("ok", found)


@pytest.mark.parametrize(
    "printed",
    ['{"cards": [', '{"error": "no"}', "7", '"text"', '{"cards": [1, 2]}', "[" * 100_000, '{"cards": []} trailing', "\x00" * 4096, "null"],
    ids=range(9),
)  # fmt: skip
def test_shapes_that_are_rubbish(home: Account, printed: str) -> None:
    """Half of it, another thing, nested to death."""
    (home.stand_ins / "cards.json").write_text(printed)
    assert home.see()["sources"]["workboard"]["status"] == "rubbish"


def test_a_list_that_was_cut_off_is_told(home: Account) -> None:
    """Multica lists fifty unless asked for more, and says that there are more."""
    home.issues(issue("i1"), more=True)
    assert "multica" in warning(home.see(), "ListCutOff")["detail"]


def test_an_agent_without_an_id_has_no_tasks_there(home: Account) -> None:
    """Its other sources are read, Multica is not called."""
    home.declare(turn=None, multica=None)
    home.cards(card("c1"))
    state = home.see()
    assert set(state["sources"]) == {"workboard", "documents"}
    assert not home.calls("multica")


def test_one_task_in_two_sources_is_one(home: Account) -> None:
    """By id first, then by title: urgency and dependencies of both, in progress where either says so."""
    home.cards(card("c1", title="Build the Thing!"), card("i2", title="Other"), card("c9", title="Wait"))
    home.issues(
        issue("i1", title="build the thing", status="todo", priority="urgent", depends_on=["c9"]),
        issue("i2", title="Renamed meanwhile", status="todo"),
    )
    home.todo("- [~] Build the thing\n")
    state = home.see()
    assert [
        (task["id"], task["source"], task["status"], task["priority"], task["also"])
        for task in state["tasks"][:1]
    ] == [("c1", "workboard", "in_progress", "urgent", ["i1", state["tasks"][0]["also"][1]])]
    assert sorted(ids(state["tasks"])) == ["c1", "c9", "i2"]
    assert state["tasks"][0]["waiting"]


def test_what_is_urgent_comes_first(home: Account) -> None:
    """Then what is due, then what is oldest."""
    now = int(time.time() * 1000)
    home.cards(
        card("late", priority="low"), card("old", createdAt=now - 9_000_000), card("new"),
        card("due", dueDate=iso(time.time() + 9000)), card("sooner", dueDate=iso(time.time() + 4000)),
        card("first", priority="urgent"), card("second", priority="P1"),
    )  # fmt: skip
    assert ids(home.see()["tasks"]) == ["first", "second", "sooner", "due", "old", "new", "late"]


@pytest.mark.parametrize(
    ("given", "rank"),
    [
        (0, 0), (1, 1), (3, 3), (9, 4), (-1, 0), ("2", 2), ("urgent", 0), ("Critical", 0), ("P0", 0), ("紧急", 0), ("high", 1),
        ("高", 1), ("p1", 1), ("medium", 2), ("none", 2), ("中", 2), (None, 2), ("", 2), ("whatever", 2), (True, 2),
        ("low", 3), ("低", 3), ("lowest", 4), (1.5, 1),
    ],
)  # fmt: skip
def test_priorities_are_numbers_or_words(given: Any, rank: int) -> None:
    """In English and Chinese; nothing said is normal."""
    assert program().rank_of(given) == rank


# --- the shared cache -------------------------------------------------------------------------------


def test_a_listing_is_shared_for_a_while(home: Account) -> None:
    """Several beats, one call each; a full beat calls anew, and so does a beat after that while."""
    for _ in range(3):
        home.see()
    assert [
        len(home.calls(word)) for word in (LISTING["workboard"], "--status todo", "--status in_progress")
    ] == [1, 1, 1]
    assert home.state()["sources"]["workboard"]["cached"]
    home.see("architect", "--full")
    assert len(home.calls(LISTING["workboard"])) == 2
    assert not home.state()["sources"]["workboard"]["cached"]
    home.declare(turn=None, cache_seconds=0.001)
    home.see()
    assert len(home.calls(LISTING["workboard"])) == 3


@pytest.mark.parametrize("mode", ["slow", "hang"])
def test_beats_at_once_call_once(home: Account, mode: str) -> None:
    """One runs the command; the others wait for its result, also where that is a failure."""
    home.mode("openclaw", mode)
    agents = [f"agent-{n}" for n in range(6)]
    for agent in agents:
        home.declare(agent, turn=None, source_timeout=5, multica=None)
    running = [home.start(agent) for agent in agents]
    assert [process.wait(60) for process in running] == [0] * 6
    assert len(home.calls(LISTING["workboard"])) == 1
    expected = "ok" if mode == "slow" else "timeout"
    assert {home.state(agent)["sources"]["workboard"]["status"] for agent in agents} == {expected}


def test_a_caller_that_is_killed_blocks_nobody(home: Account) -> None:
    """The next one ends what it left running, and calls itself."""
    home.mode("openclaw", "hang")
    home.declare("killed", turn=None, source_timeout=60)
    first = home.start("killed")
    left = [number(home.stand_ins / name) for name in ("child", "grandchild")]
    second = home.start("architect")
    first.kill()
    first.wait()
    home.mode("openclaw", "ok")
    assert second.wait(60) == 0
    assert home.state()["sources"]["workboard"]["status"] == "ok"
    until(lambda: not any(map(is_alive, left)), 10)


def test_a_command_is_not_called_more_often_than_its_rate(home: Account) -> None:
    """Over all agents of the account; then the last result is used, and where there is none it says so."""
    given: dict[str, Any] = {
        "turn": None,
        "multica": None,
        "cache_seconds": 0.001,
        "rate_limit": {"calls": 2, "per": 600},
    }
    home.cards(card("c1"), card("c2", agentId="other"))
    home.declare(**given)
    home.declare("other", **given)
    for agent in ("architect", "other", "architect", "other"):
        home.see(agent)
    assert len(home.calls(LISTING["workboard"])) == 2
    state = home.state("other")
    assert state["sources"]["workboard"]["status"] == "limited"
    assert "s old" in state["sources"]["workboard"]["detail"]
    assert ids(state["tasks"]) == ["c2"]
    for path in (home.home / ".cache" / "heartbeat").glob("*.json"):
        path.unlink()
    assert home.see()["tasks"] == []
    assert home.state()["sources"]["workboard"]["status"] == "limited"


def test_a_command_for_all_is_called_once_for_all(home: Account) -> None:
    """Where several agents are declared, and only there; each picks its own."""
    sources = home.declare(turn=None)["sources"]
    sources["multica"]["list_all"] = [*MULTICA, "--limit", "500", "--status", "todo"]
    home.declare(turn=None, sources=sources)
    home.see()
    assert [UUID in call for call in home.calls("multica issue list")] == [True, True]
    home.declare("designer", turn=None, sources=sources, multica="other-id")
    home.issues(issue("i1"), issue("i2", assignee_id="other-id"), issue("i3", assignee_id=None))
    assert ids(home.see("architect", "--full")["tasks"]) == ["i1"]
    assert ids(home.see("designer")["tasks"]) == ["i2"]
    assert home.calls("multica issue list")[2:] == [
        "multica issue list --output json --limit 500 --status todo"
    ]


def test_two_hundred_agents_call_each_command_once(home: Account) -> None:
    """One round of the whole node, sixteen at a time."""
    sources = home.declare(turn=None)["sources"]
    sources["multica"]["list_all"] = [*MULTICA, "--limit", "5000", "--status", "todo"]
    sources["multica"]["list_all_in_progress"] = [*MULTICA, "--limit", "5000", "--status", "in_progress"]
    agents = [f"agent-{n}" for n in range(200)]
    for n, agent in enumerate(agents):
        home.declare(
            agent, turn=None, sources=sources, multica=f"id-{n}", cache_seconds=300, source_timeout=60
        )
    home.cards(*[card(f"c-{agent}", agentId=agent) for agent in agents])
    home.issues(*[issue(f"i{n}", assignee_id=f"id-{n}") for n in range(200)])
    waiting = list(agents)
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < 16:
            running.append(home.start(waiting.pop()))
        assert running.pop(0).wait(120) == 0
    assert sorted(home.calls()) == [
        "multica issue list --output json --limit 5000 --status in_progress",
        "multica issue list --output json --limit 5000 --status todo",
        "openclaw workboard list --json",
    ]
    for n, agent in enumerate(agents):
        assert sorted(ids(home.state(agent)["tasks"])) == [f"c-{agent}", f"i{n}"]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"version": 1}\n', b"\xff" * 100, b"null\n"])
def test_a_damaged_cache_is_made_anew(home: Account, damage: bytes) -> None:
    """Whatever stands there."""
    home.cards(card("c1"))
    home.see()
    for path in (home.home / ".cache" / "heartbeat").glob("*.*"):
        path.write_bytes(damage)
    assert ids(home.see()["tasks"]) == ["c1"]
    assert len(home.calls(LISTING["workboard"])) == 2


def test_a_cache_from_the_future_is_not_believed(home: Account) -> None:
    """A clock that was set back must not freeze the list."""
    home.see()
    for path in (home.home / ".cache" / "heartbeat").glob("*.json"):
        head, line, rest = path.read_bytes().partition(b"\n")
        path.write_bytes(json.dumps({**json.loads(head), "at": time.time() + 9999}).encode() + line + rest)
    home.cards(card("c1"))
    assert ids(home.see()["tasks"]) == ["c1"]


def test_what_nobody_asks_for_any_more_is_removed(home: Account) -> None:
    """Results of commands that are no longer declared."""
    home.see()
    old = home.home / ".cache" / "heartbeat" / "old.json"
    old.write_text("{}")
    os.utime(old, (1, 1))
    home.see("architect", "--full")
    assert not old.exists()


# --- documents --------------------------------------------------------------------------------------

DOCUMENT = """\
# Things
- [ ] Plain
* [ ] Starred
+ [ ] Plus
1. [ ] Numbered
2) [X] Ticked
   - [ ] Nested
\t- [ ] With a tab
- [~] Going
- [/] Going too
- [!] Blocked
- [-] Cancelled
- [x] Done
- [] none
- [ ]none either
-[ ] nor this
[ ] nor this
- [?] nor this
text - [ ] nor this
```sh
- [ ] in a fence
```
~~~~
- [ ] in another
```
- [ ] still in it
~~~~
<!-- - [ ] in a comment -->
<!--
- [ ] in a long one
-->
  - [ ]   Much   room
"""


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_boxes_of_a_document(ending: str) -> None:
    """Every kind of bullet and mark; nothing in fences and comments; nested ones are tasks of their own."""
    found = program().boxes("TODO.md", "\ufeff" + DOCUMENT.replace("\n", ending))
    assert [(task["title"], task["state"]) for task in found] == [
        ("Plain", "open"), ("Starred", "open"), ("Plus", "open"), ("Numbered", "open"), ("Ticked", "done"),
        ("Nested", "open"), ("With a tab", "open"), ("Going", "in_progress"), ("Going too", "in_progress"),
        ("Blocked", "blocked"), ("Cancelled", "cancelled"), ("Done", "done"), ("Much room", "open"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "title", "rank", "deps"),
    [
        ("Write (P1)", "Write", 1, []),
        ("!high Write it", "Write it", 1, []),
        ("Write [urgent] it", "Write it", 0, []),
        ("写方案（紧急）", "写方案", 0, []),
        ("写方案 ！高", "写方案", 1, []),
        ("Make it high", "Make it high", 2, []),
        ("Publish (depends on: c1, MUL-7)", "Publish", 2, ["c1", "MUL-7"]),
        ("发布（依赖：c1、c2）", "发布", 2, ["c1", "c2"]),
        ("Call (see notes)", "Call (see notes)", 2, []),
        ("Pay due:2026-12-01 (low)", "Pay", 3, []),
    ],
)
def test_what_stands_in_a_box(text: str, title: str, rank: int, deps: list[str]) -> None:
    """Priority, due date and dependencies, in both languages."""
    (found,) = program().boxes("TODO.md", f"- [ ] {text}\n")
    assert (found["title"], found["rank"], found["deps"]) == (title, rank, deps)
    assert found["due"] == (program().moment("2026-12-01") if "due:" in text else None)


def test_a_box_keeps_its_id() -> None:
    """When it is ticked, moved, made urgent or noted upon; two of the same text are two."""
    boxes = program().boxes
    (first,) = boxes("TODO.md", "- [ ] Write the report\n")
    (again, other) = boxes("TODO.md", "# New\n\n  * [~]  Write  the report (P0)\n    > a note\n- [ ] Other\n")
    assert first["id"] == again["id"] != other["id"]
    same = boxes("TODO.md", "- [ ] A\n- [ ] A\n")
    assert same[1]["id"] == same[0]["id"] + "-2"
    assert boxes("AGENTS.md", "- [ ] A\n")[0]["id"] != same[0]["id"]


def test_a_long_document_is_told_and_cut(home: Account) -> None:
    """AGENTS.md is read in every turn of the agent: five kilobytes; and no document is read without end."""
    home.todo("x" * 5200 + "\n- [ ] Seen\n", "AGENTS.md")
    home.todo("- [ ] First\n" + "y" * (1 << 20) + "\n- [ ] Beyond\n")
    state = home.see()
    assert codes(state).count("FileTooLong") == 2
    assert sorted(task["title"] for task in state["tasks"]) == ["First", "Seen"]


def test_a_document_in_another_encoding_is_read_all_the_same(home: Account) -> None:
    """What cannot be decoded is replaced."""
    (home.workspace / "TODO.md").write_bytes("- [ ] 写方案\n".encode("gbk") + b"- [ ] Good\n")
    assert "Good" in [task["title"] for task in home.see()["tasks"]]
