"""The heartbeat program's state file, and the program as a command: killed, misled, asked how it is, asked to release."""

from __future__ import annotations

import fcntl
import json
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.heartbeat_support import (
    FILES,
    PYTHON,
    Account,
    card,
    claimed,
    codes,
    everything,
    ids,
    issue,
    number,
    program,
    until,
    warning,
)

KILLS = int(os.environ.get("RECONCILER_ROUNDS") or 40)


@pytest.fixture
def home(account: Path) -> Account:
    """An account with one agent that has one task."""
    found = Account(account)
    found.declare()
    found.cards(card("c1"))
    found.turn("exit 0\n")
    return found


def quiet(home: Account) -> None:
    """No turn and no beat is under way."""
    with home.file("turn.lock").open("w") as lock:
        until(lambda: not try_lock(lock.fileno()))


def try_lock(handle: int) -> bool:
    """Whether somebody else holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


# --- whole at any moment ----------------------------------------------------------------------------


def test_killed_at_any_moment_the_state_is_whole(home: Account) -> None:
    """And so are the files beside it; the next beat works; no turn was started that was not counted."""
    home.declare(cache_seconds=0.001, rate_limit={"calls": 100_000, "per": 1}, rounds_max=100_000)
    began = time.monotonic()
    home.see()
    takes = time.monotonic() - began
    dice, killed = random.Random(7), 0
    for turn in range(KILLS):
        process = home.start("architect", start_new_session=True)
        time.sleep(dice.uniform(0, 1.2 * takes))
        process.kill()
        killed += process.wait() == -9
        assert home.state()["beat"] > 0
        for path in [*home.file("x").parent.glob("*.json"), *home.home.glob(".cache/heartbeat/*.json")]:
            assert json.loads(path.read_text().partition("\n")[0]), path
        if turn % 10 == 9:
            quiet(home)
            before = home.state()["beat"]
            assert home.see()["beat"] > before
    assert killed >= KILLS / 3
    quiet(home)
    assert home.state()["memory"]["c1"]["rounds"] >= len(home.calls("openclaw agent")) > 0
    assert not [path for path in home.home.rglob("*.new") if path.stat().st_mtime < began]


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves the old file or the new one: content, then name, then directory."""
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def note_sync(handle: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name}")
        sync(handle)

    def note_rename(old: str, new: str) -> None:
        done.append(f"rename {Path(old).name} {Path(new).name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    program().write_atomically(str(tmp_path / "a.json"), b"{}")
    assert done == ["sync a.json.new", "rename a.json.new a.json", f"sync {tmp_path.name}"]
    assert (tmp_path / "a.json").read_bytes() == b"{}"


def test_a_beat_that_is_killed_before_it_wrote_starts_no_turn(home: Account) -> None:
    """The turn waits for the state: here the beat is killed while it cannot yet write that."""
    home.see()
    quiet(home)
    calls, before = len(home.calls("openclaw agent")), home.file("turn.json").read_text()
    fifo = home.file("json.new")
    os.mkfifo(fifo)  # opening it for writing waits for a reader
    process = home.start("architect")
    record = until(lambda: json.loads(home.file("turn.json").read_text()).get("ended") is None)
    assert record
    process.kill()
    process.wait()
    fifo.unlink()
    quiet(home)
    assert len(home.calls("openclaw agent")) == calls
    assert home.file("turn.json").read_text() == before
    state = home.see()
    assert (state["memory"]["c1"]["rounds"], codes(state)) == (calls + 1, [])


def test_a_full_disk_keeps_the_last_state(home: Account) -> None:
    """It is said, no turn is started, and no half of a file is left; with room again all goes on."""
    home.see()
    quiet(home)
    before, calls = home.file("json").read_bytes(), len(home.calls("openclaw agent"))
    said = home.beat("architect", "--full", limits="-f 1")  # 512 bytes
    assert said.code == 2
    assert "the state of the last beat stays" in said.err
    quiet(home)
    assert home.file("json").read_bytes() == before
    assert len(home.calls("openclaw agent")) == calls
    assert not list(home.home.rglob("*.new"))
    assert home.see("architect", "--full")["outcome"] == "turn"


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '{"memory": 7, "in_progress": {"a": 1}, "version": 1}',
        '{"memory": {"c1": []}}',
        '{"memory": {"c1": {"rounds": "x"}}}',
        "\x00" * 99,
    ],
)
def test_a_damaged_state_is_made_anew(home: Account, damage: str) -> None:
    """Whatever stands there; what was lost is said where nothing could be read."""
    home.see()
    quiet(home)
    home.file("json").write_text(damage)
    home.file("turn.json").write_text(damage)
    state = home.see()
    assert state["memory"]["c1"]["rounds"] == 1
    assert ("StateLost" in codes(state)) == (damage[:9] != '{"memory"')


def test_a_beat_never_overlaps_itself(home: Account) -> None:
    """The second one goes at once, and says why; a beat of another agent is none."""
    home.mode("openclaw", "slow")
    first = home.start("architect")
    until(lambda: home.calls("workboard list"))
    said = home.beat()
    assert said.code == 3
    assert "another beat" in said.err
    home.declare("other", turn=None)
    assert home.beat("other").code == 0
    assert first.wait(60) == 0
    assert len(home.calls("workboard list")) == 1


def test_the_state_says_when_and_by_whom(home: Account) -> None:
    """Epoch and UTC for programs, the declared zone for people; the program's own digest; which beat was a timer's."""
    state = home.see()
    assert abs(state["beat"] - time.time()) < 60
    assert state["beat_at"] == time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(state["beat"]))
    assert state["beat_local"] == time.strftime(
        "%Y-%m-%d %H:%M:%S CST", time.gmtime(state["beat"] + 8 * 3600)
    )
    digest = subprocess.run(
        ["sha256sum", FILES / "heartbeat.py"], capture_output=True, text=True, check=True
    ).stdout
    assert state["program"] == digest[:12]
    full = home.see("architect", "--full")
    assert (full["full"], full["scheduled_beat"], state["scheduled_beat"]) == (
        True,
        state["beat"],
        state["beat"],
    )
    assert full["beat"] > state["beat"]


def test_it_loads_next_to_nothing(home: Account) -> None:
    """Two hundred beats a round: what a beat imports is measured, and stays out."""
    code = f"import sys; sys.path.insert(0, {str(home.installed)!r}); import heartbeat; heartbeat.main(['architect']); print(*sys.modules)"
    done = subprocess.run(
        [PYTHON, "-IS", "-c", code],
        env=home.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert home.state()["outcome"] == "turn"
    assert not set(done.stdout.split()) & {
        "json",
        "re",
        "subprocess",
        "argparse",
        "datetime",
        "hashlib",
        "pathlib",
        "enum",
        "typing",
        "tempfile",
    }


# --- configuration ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"version": 2}, "key version"),
        ({"agent": "other"}, "key agent"),
        ({"interval": "15m"}, 'key interval: a number above zero is needed (found "15m")'),
        ({"interval": None}, "key interval"),
        ({"interval": True}, "key interval"),
        ({"source_timeout": 0}, "key source_timeout"),
        ({"workspace": None}, "key workspace"),
        ({"turn": "openclaw agent"}, "key turn: a list of texts is needed"),
        ({"sources": {}}, "key sources"),
        ({"sources": {"jira": {"list": ["x"]}}}, "key sources.jira"),
        ({"sources": {"workboard": {"show": ["x"]}}}, "key sources.workboard.list"),
        ({"sources": {"workboard": {"list": "x"}}}, "key sources.workboard.list"),
        ({"sources": {"documents": {"files": []}}}, "key sources.documents.files"),
        ({"rate_limit": {"calls": 0}}, "key rate_limit.calls"),
        ({"conversation": {"fresh": "soon"}}, "key conversation.fresh"),
        ({"path": "/bin"}, "key path"),
    ],
    ids=range(16),
)
def test_a_wrong_configuration_names_file_and_key(home: Account, given: dict[str, Any], place: str) -> None:
    """On the terminal and in the state file; what the last beat saw stays there, and its time."""
    before = home.see()
    quiet(home)
    written = json.loads(home.config().read_text())
    written = {key: value for key, value in {**written, **given}.items() if value is not None}
    home.config().write_text(json.dumps(written))
    said = home.beat()
    assert said.code == 1
    assert f"{home.config()}: {place}" in said.err
    state = home.state()
    assert (state["outcome"], state["beat"], ids(state["tasks"])) == ("misconfigured", before["beat"], ["c1"])
    assert place in warning(state, "Configuration")["detail"]
    health = home.beat("architect", "--health")
    assert (health.code, place in health.out) == (2, True)
    home.declare()
    assert home.see()["outcome"] == "turn"


def test_a_configuration_that_cannot_be_read_is_told(home: Account) -> None:
    """With the place in the file; without any state before it, too."""
    home.config().write_text('{\n  "version": 1,\n  "agent" "architect"\n}')
    said = home.beat()
    assert said.code == 1
    assert "line 3 column 11" in said.err
    assert home.state()["beat"] == 0
    home.config().unlink()
    assert "there is no such file" in home.beat().err


@pytest.mark.parametrize(
    "words",
    [[], ["a", "b"], ["architect", "--what"], ["../x"], ["-x"], [".x"], ["architect", "--release", "c1"], ["architect", "--release"],
     ["architect", "--full", "--dry-run"], ["architect", "--reason", "x"], [""]],
    ids=range(11),
)  # fmt: skip
def test_a_wrong_command_line_shows_the_right_one(home: Account, words: list[str]) -> None:
    """And does nothing."""
    with home.start(*words, stderr=subprocess.PIPE) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"usage: heartbeat AGENT" in err
    assert not home.file("json").exists()


# --- health and dry run -----------------------------------------------------------------------------


def health(home: Account, **given: Any) -> tuple[int, str]:
    """What --health says of the last state with some of it changed."""
    home.file("json").write_text(json.dumps({**home.state(), **given}))
    said = home.beat("architect", "--health")
    assert said.out.count("\n") == 1
    return said.code, said.out.strip()


def test_health_is_an_exit_code_and_a_line(home: Account) -> None:
    """Healthy, never beaten, late, from the future, degraded, paused, unreadable."""
    assert (home.beat("architect", "--health").code, home.beat("architect", "--health").out) == (
        2,
        "architect: no beat yet\n",
    )
    home.see()
    assert health(home) == (0, "architect: healthy, turn, 1 open")
    assert health(home, beat=time.time() - 1850)[1].startswith("architect: the last beat is 185")
    assert health(home, beat=time.time() - 1700)[0] == 0
    assert health(home, beat=time.time() - 1700, late_after=1000)[0] == 2
    assert health(home, beat=time.time() + 900)[1].endswith("in the future")
    assert health(home, beat=time.time(), outcome="paused")[0] == 2
    assert health(home, outcome="idle")[0] == 0
    home.mode("multica", "fail")
    home.see("architect", "--full")
    assert health(home) == (2, "architect: degraded: multica is failed")
    for damage in ("{", "[]", json.dumps({"beat": time.time()})):
        home.file("json").write_text(damage)
        assert home.beat("architect", "--health").out == "architect: the state file cannot be read\n"


def test_health_of_what_limits_itself_is_good(home: Account) -> None:
    """A source that was asked often enough is no illness."""
    home.declare(cache_seconds=0.001, rate_limit={"calls": 1, "per": 600})
    home.see()
    assert home.see()["sources"]["workboard"]["status"] == "limited"
    assert health(home)[0] == 0


def test_a_dry_run_writes_nothing_and_starts_nothing(home: Account) -> None:
    """On a new account and on one with a state; it shows tasks, warnings and the command."""
    home.declare(turn=["openclaw", "agent", "--agent", "{agent}", "--task", "{task}"])
    home.mode("multica", "fail")
    for _ in range(2):
        before = everything(home.home)
        said = home.beat("architect", "--dry-run")
        assert said.code == 0
        assert everything(home.home) == before
        assert not home.calls("openclaw agent")
        assert "would start: openclaw agent --agent architect --task c1" in said.out
        assert "normal open c1 Card c1" in said.out
        assert "warning SourceDown: multica" in said.out
        (home.stand_ins / "calls").unlink(missing_ok=True)
        home.see()
        quiet(home)
        (home.stand_ins / "calls").unlink(missing_ok=True)
    home.cards(card("c1", status="done"))
    home.declare(cache_seconds=0.001)
    assert "would start no turn" in home.beat("architect", "--dry-run").out


# --- release ----------------------------------------------------------------------------------------


def ledger(home: Account) -> dict[str, Any]:
    """The entries of the ledger."""
    path = home.file("ledger.json")
    found: dict[str, Any] = json.loads(path.read_text())["tasks"] if path.exists() else {}
    return found


@pytest.fixture
def stuck(home: Account) -> Account:
    """A card, an issue and a box are in progress."""
    home.declare(turn=None)
    home.cards(claimed("c1", minutes=60))
    home.issues(issue("i1", status="in_progress"), status="in_progress")
    home.todo("# Things\r\n- [x] Before\r\n  - [~] 写方案 (P1)\r\n    - [ ] part\r\n- [ ] After\r\n").chmod(
        0o640
    )
    home.see()
    return home


def test_a_card_is_released_once(stuck: Account) -> None:
    """With a comment, through the declared commands; asked again, nothing is done again."""
    for _ in range(2):
        said = stuck.beat("architect", "--release", "c1", "--reason", "没有进展: 45 min")
        assert said.code == 0
    assert stuck.calls("release") + stuck.calls("comment") == [
        "openclaw workboard release c1", "openclaw workboard comment c1 没有进展: 45 min",
    ]  # fmt: skip
    entry = ledger(stuck)["c1"]
    assert (entry["timeouts"], entry["blocked"], entry["reason"]) == (1, False, "没有进展: 45 min")
    assert abs(entry["released"] - time.time()) < 60
    stuck.cards(claimed("c1", minutes=0))
    assert {item["id"]: item["timeouts"] for item in stuck.see()["in_progress"]}["c1"] == 1
    assert stuck.beat("architect", "--release", "c1", "--reason", "again", "--block").code == 0
    assert (ledger(stuck)["c1"]["timeouts"], ledger(stuck)["c1"]["blocked"]) == (2, True)


def test_a_released_task_is_seen_anew(stuck: Account) -> None:
    """The list is read again although it was read just now, and its rounds start anew."""
    stuck.beat("architect", "--release", "c1", "--reason", "x")
    stuck.cards(card("c1"))
    state = stuck.see()
    assert {task["id"]: task["status"] for task in state["tasks"]}["c1"] == "open"


def test_an_issue_is_set_to_blocked_with_a_comment(stuck: Account) -> None:
    """By its declared commands."""
    said = stuck.beat("architect", "--release", "i1", "--reason", "no progress")
    assert (said.code, said.out) == (0, "i1: issue blocked, commented\n")
    assert stuck.calls("issue status") + stuck.calls("issue comment") == [
        "multica issue status i1 blocked", "multica issue comment add i1 --content no progress",
    ]  # fmt: skip


@pytest.mark.parametrize(("more", "mark", "word"), [([], " ", "released"), (["--block"], "!", "blocked")])
def test_a_document_gets_a_note(stuck: Account, more: list[str], mark: str, word: str) -> None:
    """Below the box, which is unmarked or marked as blocked; the rest stays as it was, line ends and mode too."""
    (name,) = [item["id"] for item in stuck.state()["in_progress"] if item["source"] == "documents"]
    path = stuck.workspace / "TODO.md"
    for _ in range(2):
        assert stuck.beat("architect", "--release", name, "--reason", "no\nprogress", *more).code == 0
    lines = path.read_bytes().decode().split("\r\n")
    note = lines.pop(3)
    assert lines == [
        "# Things",
        "- [x] Before",
        f"  - [{mark}] 写方案 (P1)",
        "    - [ ] part",
        "- [ ] After",
        "",
    ]
    assert note.startswith("    > ")
    assert note.endswith(f"CST {word}: no progress")
    assert path.stat().st_mode & 0o777 == 0o640
    assert name not in ids(stuck.see()["in_progress"])


def test_a_command_that_fails_is_told_and_nothing_is_recorded_as_done(stuck: Account) -> None:
    """What was done is not done again once the rest can be."""
    stuck.mode("openclaw", "fail")
    said = stuck.beat("architect", "--release", "c1", "--reason", "x")
    assert said.code == 2
    assert "release failed: exit status 3: gateway not connected" in said.err
    assert "released" not in ledger(stuck)["c1"]
    assert "timeouts" not in ledger(stuck)["c1"]
    stuck.mode("openclaw", "ok")
    commands = json.loads(stuck.config().read_text())["sources"]
    commands["workboard"]["comment"] = ["no-such-command"]
    stuck.declare(turn=None, sources=commands)
    assert stuck.beat("architect", "--release", "c1", "--reason", "x").code == 2
    stuck.declare(turn=None)
    assert stuck.beat("architect", "--release", "c1", "--reason", "x").code == 0
    assert len(stuck.calls("workboard release")) == 2  # the one that failed, and the one that did not
    assert len(stuck.calls("workboard comment")) == 1
    assert ledger(stuck)["c1"]["timeouts"] == 1


def test_a_release_that_was_killed_goes_on(stuck: Account) -> None:
    """It knows how far it came."""
    commands = json.loads(stuck.config().read_text())["sources"]
    commands["workboard"]["comment"] = ["sh", "-c", 'echo $$ >"$HOME/.stand_ins/child"; exec sleep 600']
    stuck.declare(turn=None, sources=commands, source_timeout=60)
    process = stuck.start("architect", "--release", "c1", "--reason", "x")
    number(stuck.stand_ins / "child")
    process.kill()
    process.wait()
    os.kill(number(stuck.stand_ins / "child"), 9)
    assert "released" not in ledger(stuck)["c1"]
    stuck.declare(turn=None)
    assert stuck.beat("architect", "--release", "c1", "--reason", "x").code == 0
    assert len(stuck.calls("workboard release")) == 1
    assert len(stuck.calls("workboard comment")) == 1
    assert ledger(stuck)["c1"]["timeouts"] == 1


def test_what_is_not_known_is_not_released(stuck: Account) -> None:
    """Nor is a ledger overwritten that cannot be read."""
    said = stuck.beat("architect", "--release", "gone", "--reason", "x")
    assert said.code == 1
    assert "no such task" in said.out
    assert not stuck.calls("release")
    stuck.file("ledger.json").write_text("{")
    said = stuck.beat("architect", "--release", "c1", "--reason", "x")
    assert said.code == 1
    assert "ledger" in said.err
    assert stuck.file("ledger.json").read_text() == "{"


def test_what_others_wrote_in_the_ledger_stays(stuck: Account) -> None:
    """The reconciler keeps its own notes there."""
    stuck.file("ledger.json").write_text(
        json.dumps({"version": 1, "forced_beat": 5, "tasks": {"c1": {"flagged": 7}, "z": {}}})
    )
    stuck.beat("architect", "--release", "c1", "--reason", "x")
    found = json.loads(stuck.file("ledger.json").read_text())
    assert (found["forced_beat"], found["tasks"]["c1"]["flagged"], found["tasks"]["z"]) == (5, 7, {})


def test_no_shell_reads_a_reason(stuck: Account) -> None:
    """It is one argument, and what looks like a placeholder in it is none."""
    reason = "$(touch x); `id` \"q\" 'q' {agent} {id}"
    stuck.beat("architect", "--release", "c1", "--reason", reason)
    assert stuck.calls("comment") == [f"openclaw workboard comment c1 {reason}"]


def test_the_program_says_of_what_it_is_made() -> None:
    """Every key of the configuration and every warning stands in its documentation."""
    text = (FILES.parents[2] / "docs" / "heartbeats.md").read_text()
    source = (FILES / "heartbeat.py").read_text()
    named = {part.partition('"')[0] for part in source.split('warn("')[1:]}
    assert len(named) >= 14
    assert not {name for name in [*named, *program().NUMBERS] if f"`{name}`" not in text}
