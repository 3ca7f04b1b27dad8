"""The agent's turn: when it is started, what is seen of it, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.unit.heartbeat_support import (
    Account,
    card,
    codes,
    is_alive,
    number,
    until,
    warning,
)


@pytest.fixture
def home(account: Path) -> Account:
    """An account with one agent that has one task."""
    found = Account(account)
    found.declare()
    found.cards(card("c1", title="设计 it"))
    return found


LASTING = 'echo $$ >"$HOME/.stand_ins/pid"; echo begun; sleep 600 & echo $! >"$HOME/.stand_ins/below"; wait\n'


@pytest.fixture
def lasting(home: Account) -> Account:
    """The turn takes ten minutes."""
    home.turn(LASTING)
    return home


def test_the_turn_is_a_process_of_its_own(lasting: Account) -> None:
    """In a session of its own, with nothing of the beat's; the beat does not wait for it."""
    state = lasting.see()
    pid = number(lasting.stand_ins / "pid")
    assert (state["outcome"], state["turn"]["pid"], state["turn"]["running"], state["turn"]["task"]) == (
        "turn",
        pid,
        True,
        "c1",
    )
    assert os.getsid(pid) == pid
    opened = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    assert not [name for name in opened if ".lock" in name or ".json" in name]
    os.killpg(pid, signal.SIGKILL)
    assert lasting.ended()["status"] == -9


def test_a_turn_knows_its_task(home: Account) -> None:
    """By the placeholders of the declared command; what it prints is kept with the local time."""
    home.declare(turn=["openclaw", "agent", "--agent", "{agent}", "{task}: {title}"])
    home.see()
    record = home.ended()
    assert (record["status"], record["timed_out"], record["task"]) == (0, False, "c1")
    assert home.calls("openclaw agent") == ["openclaw agent --agent architect c1: 设计 it"]
    first, second = home.file("turn.log").read_text().splitlines()
    assert first.startswith("--- ")
    assert " CST c1" in first
    assert second == "a turn: agent --agent architect c1: 设计 it"


def test_a_turn_in_progress_is_seen(lasting: Account) -> None:
    """The next beats look and write, but start no second one; none counts as a round."""
    first = lasting.see()
    pid = number(lasting.stand_ins / "pid")
    for words in ([], ["architect", "--full"]):
        state = lasting.see(*words)
        assert (state["outcome"], state["turn"]["pid"], state["turn"]["running"]) == ("turn", pid, True)
        assert state["beat"] > first["beat"]
        assert state["memory"]["c1"]["rounds"] == 1
    assert len(lasting.calls("openclaw agent")) == 1
    os.killpg(pid, signal.SIGKILL)
    lasting.ended()
    assert warning(lasting.see(), "TurnFailed")["tasks"] == ["c1"]
    os.killpg(until(lambda: json.loads(lasting.file("turn.json").read_text())["pid"]), signal.SIGKILL)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_turn_that_takes_too_long_is_ended_with_its_group(home: Account, deaf: bool) -> None:  # noqa: FBT001
    """Asked first, then killed; that is recorded and told."""
    home.turn(("trap '' TERM\n" if deaf else "") + LASTING)
    home.declare(turn_timeout=1)
    home.see()
    pids = [number(home.stand_ins / name) for name in ("pid", "below")]
    record = home.ended()
    assert record["timed_out"]
    assert record["status"] == (-9 if deaf else -15)
    assert 1 <= record["ended"] - record["started"] < 40
    until(lambda: not any(map(is_alive, pids)), 10)
    home.declare(turn=None)
    assert "its time was over" in warning(home.see(), "TurnFailed")["detail"]


def test_a_turn_whose_watcher_was_killed_is_seen_and_ended_in_time(lasting: Account) -> None:
    """By the next beats: by its process, and once its time is over."""
    lasting.see()
    pid = number(lasting.stand_ins / "pid")
    watcher = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(watcher, signal.SIGKILL)
    until(lambda: not is_alive(watcher))
    assert is_alive(pid)
    assert lasting.see()["turn"]["running"]
    record = json.loads(lasting.file("turn.json").read_text())
    lasting.file("turn.json").write_text(json.dumps({**record, "started": record["started"] - 100}))
    lasting.turn("exit 0\n")
    state = lasting.see()
    until(lambda: not is_alive(pid), 10)
    assert "TurnLost" in codes(state)
    assert lasting.ended()["status"] == 0


def test_another_process_of_that_number_is_not_the_turn(home: Account) -> None:
    """Numbers come round; the time of birth tells."""
    home.see()
    record = {**home.ended(), "pid": os.getpid(), "birth": "1"}
    del record["ended"]
    home.file("turn.json").write_text(json.dumps(record))
    state = home.see()
    assert "TurnLost" in codes(state)
    assert state["turn"]["pid"] != os.getpid()


def test_a_turn_that_fails_is_told_by_the_next_beat(home: Account) -> None:
    """With its status; the next turn is started all the same."""
    home.turn("echo no provider >&2; exit 7\n")
    assert "TurnFailed" not in codes(home.see())
    assert home.ended()["status"] == 7
    assert "no provider" in home.file("turn.log").read_text()
    state = home.see()
    assert "status 7" in warning(state, "TurnFailed")["detail"]
    assert state["memory"]["c1"]["rounds"] == 2


def test_a_turn_that_is_missing_is_told_at_once(home: Account) -> None:
    """And is no round."""
    home.declare(turn=["no-such-agent"])
    state = home.see()
    assert state["outcome"] == "turn-failed"
    assert "no-such-agent" in warning(state, "TurnMissing")["detail"]
    assert "c1" not in state["memory"]
    assert home.beat("architect", "--health").code == 2


def test_the_log_of_turns_stays_small(home: Account) -> None:
    """Two files of 256 KB, whatever a turn prints."""
    home.turn('head -c 3000000 /dev/zero | tr "\\0" x; echo; echo the end\n')
    home.see()
    assert home.ended()["status"] == 0
    for ending in ("turn.log", "turn.log.1"):
        assert home.file(ending).stat().st_size <= 256 << 10
    assert home.file("turn.log").read_text().endswith("the end\n")


def test_what_a_turn_leaves_running_delays_nobody(home: Account) -> None:
    """A server that it started keeps its output open: the turn is over when the turn is over."""
    home.turn(
        'sleep 600 & echo $! >"$HOME/.stand_ins/below"; (while :; do echo noise; sleep 0.01; done) & echo $! >"$HOME/.stand_ins/noise"; exit 0\n'
    )
    home.see()
    assert home.ended()["status"] == 0
    for name in ("below", "noise"):
        pid = number(home.stand_ins / name)
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_turn_has_the_signals_of_any_program(home: Account) -> None:
    """Python ignores a broken pipe, and what it starts would inherit that: a pipeline would not end, or complain."""
    home.turn("yes | head -n 1\n")
    home.see()
    assert home.ended()["status"] == 0
    assert home.file("turn.log").read_text().splitlines()[1:] == ["y"]


def test_a_conversation_is_never_interrupted(home: Account) -> None:
    """By a marker that is fresh, or by a command that says so; and no round is counted."""
    marker = home.home / "architect.talking"
    home.declare(conversation={"marker": "~/{agent}.talking", "fresh": 300})
    marker.touch()
    state = home.see()
    assert (state["outcome"], state["conversation"]) == ("conversation", True)
    assert state["memory"] == {}
    os.utime(marker, (time.time() - 400, time.time() - 400))
    assert home.see()["outcome"] == "turn"
    home.ended()
    for code, outcome, talking in ((0, "conversation", True), (1, "turn", False), (2, "conversation", None)):
        home.declare(conversation={"command": ["sh", "-c", f"exit {code}"]})
        state = home.see()
        assert (state["outcome"], state["conversation"]) == (outcome, talking)
        assert ("ConversationUnknown" in codes(state)) == (talking is None)
        home.ended()
    home.declare(conversation={"command": ["no-such-command"]})
    assert home.see()["outcome"] == "conversation"
    home.declare(conversation={"command": ["sleep", "600"]}, source_timeout=1)
    assert home.see()["outcome"] == "conversation"


def test_a_conversation_is_asked_for_only_where_a_turn_is_due(home: Account) -> None:
    """Otherwise it costs nothing."""
    home.declare(conversation={"command": ["openclaw", "workboard", "comment"]})
    home.cards()
    home.see()
    assert not home.calls("comment")


def test_the_turn_has_the_declared_time_zone_and_path(home: Account) -> None:
    """Timers start beats with a short PATH and no zone."""
    home.turn('date "+%Z $PATH"; exit 0\n')
    home.declare(path=["~/tools"], timezone="America/New_York")
    home.see()
    home.ended()
    zone, _, path = home.file("turn.log").read_text().splitlines()[1].partition(" ")
    assert zone in ("EST", "EDT")
    assert path.split(":")[:2] == [f"{home.home}/tools", f"{home.home}/.local/bin"]
