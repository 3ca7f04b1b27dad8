"""The heartbeat role on this machine: the real program, stand-ins for the timers' managers, and what is undone."""

from __future__ import annotations

import json
import plistlib
import subprocess
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from reconciler.kinds import probe_path
from tests.unit.support import Fleet, converge, look, on_node, step

# Managers in a few lines of shell: their state is files in $STATE, their log is $STATE/log.
SYSTEMCTL = """#!/bin/sh
echo "$@" >> "$STATE/log"
[ "$1" = --user ] && shift
case $1 in
  show) shift; separator=""
    for word; do
      case $word in --*) continue;; esac
      [ -f "$STATE/active-$word" ] && active=active || active=inactive
      [ -L "$HOME/.config/systemd/user/timers.target.wants/$word" ] && enabled=enabled || enabled=disabled
      [ -f "$HOME/.config/systemd/user/$word" ] && loaded=loaded || loaded=not-found
      printf '%sId=%s\\nLoadState=%s\\nActiveState=%s\\nUnitFileState=%s\\n' "$separator" "$word" $loaded $active $enabled
      separator="
"
    done;;
  enable) wants="$HOME/.config/systemd/user/timers.target.wants"; mkdir -p "$wants"; ln -sf "../$2" "$wants/$2";;
  start|restart) [ "$2" = broken.service ] && { echo "it does not start" >&2; exit 1; }; touch "$STATE/active-$2";;
  stop) rm -f "$STATE/active-$2";;
  disable) rm -f "$HOME/.config/systemd/user/timers.target.wants/$3" "$STATE/active-$3";;
esac
"""
CRONTAB = """#!/bin/sh
[ "$1" = -l ] && { [ -f "$STATE/crontab" ] || { echo "no crontab for me" >&2; exit 1; }; cat "$STATE/crontab"; exit 0; }
cp "$1" "$STATE/crontab"
"""
LAUNCHCTL = """#!/bin/sh
echo "$@" >> "$STATE/log"
case $1 in
  list) printf 'PID\\tStatus\\tLabel\\n-\\t0\\tcom.apple.x\\n'; [ -f "$STATE/loaded" ] && printf -- '-\\t0\\t%s\\n' "$(cat "$STATE/loaded")"; true;;
  bootstrap) basename "$3" .plist > "$STATE/loaded";;
  bootout) rm -f "$STATE/loaded";;
esac
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: Path) -> Path:
    """The stand-ins first on PATH, and where they keep their state."""
    directory = tmp_path / "state"
    directory.mkdir()
    (account / "bin").mkdir()
    for name, text in (("systemctl", SYSTEMCTL), ("crontab", CRONTAB), ("launchctl", LAUNCHCTL)):
        (account / "bin" / name).write_text(text)
        (account / "bin" / name).chmod(0o755)
    monkeypatch.setenv("STATE", str(directory))
    return directory


def agent(fleet: Fleet, name: str = "architect", **given: Any) -> dict[str, Any]:
    """An agent as the role gets it; all it has are boxes in its workspace."""
    entry = {
        "agent": name, "nodes": "node-1", "class": "development", "workspace": f"~/{name}",
        "sources": {"workboard": None}, **given,
    }  # fmt: skip
    fleet.write(json.dumps({"heartbeats": [entry]}))
    found = fleet.resource(f"node-1/heartbeat/{name}")
    return {**found.args, **found.fields, "name": name}


def changed(resource: dict[str, Any]) -> dict[str, Any]:
    """What differs on this machine, by the probe's own comparison."""
    from reconciler.kinds.heartbeat import probe  # noqa: PLC0415

    answer = look("heartbeat", resource)
    assert "facts" in answer, answer
    declared = {key: resource[key] for key in probe.COMPARED}
    return {change["field"]: change["observed"] for change in probe.changes(declared, answer["facts"])}


@pytest.mark.parametrize("timer", ["systemd", "cron", "launchd"])
def test_from_nothing_to_a_beat_and_back(fleet: Fleet, state: Path, account: Path, timer: str) -> None:
    """Whatever starts it; the undo leaves nothing but the backups' places."""
    (state / "crontab").write_text("MAILTO=me\n0 1 * * * /bin/true\n")
    resource = agent(fleet, timer=timer)
    assert set(changed(resource)) == {"file", "program", "config", "timer", "schedule", "beat"}
    done = converge("heartbeat", resource)
    if "failed" in done:  # here no cron runs, which is not for a role to change; all else was done
        assert timer == "cron"
        assert "schedule is cron is not running" in done["failed"]
        assert changed(resource) == {"schedule": "cron is not running"}
    else:
        assert done["result"]["changed"]
        assert changed(resource) == {}
    health = subprocess.run([account / ".local/bin/heartbeat", "architect", "--health"], check=False)
    assert health.returncode == 0
    assert (account / "architect" / "HEARTBEAT.md").read_text().startswith("# Heartbeat of architect")
    assert "failed" not in step("rollback", "heartbeat", resource)
    assert not (account / "architect" / "HEARTBEAT.md").exists()
    assert not (account / ".local/bin/heartbeat").exists()
    assert (state / "crontab").read_text() == "MAILTO=me\n0 1 * * * /bin/true\n"
    assert not (state / "loaded").exists()
    assert not list(state.glob("active-*"))


@pytest.mark.parametrize(("first", "second"), list(permutations(["systemd", "cron", "launchd"], 2)))
def test_another_timer_takes_the_place_of_the_former(
    fleet: Fleet, state: Path, account: Path, first: str, second: str
) -> None:
    """Lines of others stay; an undo brings the former one back, running as it did."""
    (state / "crontab").write_text("MAILTO=me\n")
    before = agent(fleet, timer=first)
    converge("heartbeat", before, attempt="one")
    was = changed(before)
    after = agent(fleet, timer=second)
    assert changed(after)["former"] == first
    done = converge("heartbeat", after, attempt="two")
    links = account / ".config/systemd/user/timers.target.wants"
    if "failed" in done:  # here no cron runs, which is not for a role to change: the former one stays
        assert second == "cron"
        assert changed(after) == {"schedule": "cron is not running", "former": first}
        there = {first, second}
    else:
        assert changed(after) == {}
        there = {second}
    assert ("cron" in there) == ("architect" in (state / "crontab").read_text())
    assert ("systemd" in there) == (account / ".config/systemd/user/heartbeat-architect.timer").exists()
    assert ("systemd" in there) == bool(list(links.glob("*")))
    assert ("systemd" in there) == bool(list(state.glob("active-heartbeat-*")))
    assert ("launchd" in there) == (state / "loaded").exists()
    assert "failed" not in step("rollback", "heartbeat", after, attempt="two")
    assert changed(before) == was
    assert (first == "systemd") == (links / "heartbeat-architect.timer").is_symlink()
    assert (state / "crontab").read_text().startswith("MAILTO=me\n")
    assert (first == "cron") == ("architect" in (state / "crontab").read_text())


def test_lines_of_others_in_a_crontab_are_never_touched(fleet: Fleet, state: Path) -> None:
    """Two agents and a person share one; each agent's lines are replaced in their place."""
    (state / "crontab").write_text("0 1 * * * /bin/true")  # its last line has no end
    for name in ("architect", "coo"):
        converge("heartbeat", agent(fleet, name, timer="cron"), attempt=name)
    before = (state / "crontab").read_text().splitlines()
    assert before[0] == "0 1 * * * /bin/true"
    assert [line.split()[-2:] for line in before if "begin" in line] == [
        ["architect", "begin"],
        ["coo", "begin"],
    ]
    converge("heartbeat", agent(fleet, "architect", timer="cron", every="30m"), attempt="b")
    after = (state / "crontab").read_text().splitlines()
    assert len(after) == len(before)
    assert [a for a, b in zip(before, after, strict=True) if a != b] == [before[2]]
    assert "-59/30 * * * * sleep " in after[2]


def test_the_plist_is_what_launchd_takes(fleet: Fleet, state: Path, account: Path) -> None:
    """A job that starts the program, survives the beat, and is loaded again when its file changes."""
    converge("heartbeat", agent(fleet, timer="launchd", timezone="Asia/Shanghai"))
    (path,) = (account / "Library/LaunchAgents").glob("*.plist")
    job = plistlib.loads(path.read_bytes())
    assert (job["Label"], job["StartInterval"], job["RunAtLoad"]) == (
        "reconciler.heartbeat.architect",
        900,
        True,
    )
    assert job["AbandonProcessGroup"]  # the turn outlives the beat
    assert job["EnvironmentVariables"] == {"TZ": "Asia/Shanghai"}
    assert job["ProgramArguments"][:2] == ["/bin/sh", "-c"]
    assert job["ProgramArguments"][2].endswith(
        'exec "$HOME/.local/share/reconciler/heartbeat/heartbeat" architect'
    )
    (state / "log").unlink()
    converge("heartbeat", agent(fleet, timer="launchd", every="20m"), attempt="b")
    words = [
        line.split()[0] for line in (state / "log").read_text().splitlines() if not line.startswith("list")
    ]
    assert words == ["bootout", "enable", "bootstrap"]


def test_all_agents_of_a_node_are_asked_for_in_one_call(fleet: Fleet, state: Path) -> None:
    """However many there are."""
    several = []
    for number in range(14):
        resource = agent(fleet, f"a{number}")
        converge("heartbeat", resource, attempt=f"t{number}")
        several.append({"kind": "heartbeat", "args": resource, "timeout": 20})
    (state / "log").unlink()
    answers = on_node({"heartbeat": probe_path("heartbeat")}, {"probes": several})["probes"]
    assert {answer["facts"]["schedule"] for answer in answers} == {"active"}
    assert len((state / "log").read_text().splitlines()) == 1


def test_an_undo_leaves_the_program_to_the_other_agents(fleet: Fleet, state: Path, account: Path) -> None:
    """It was not there before; another agent has come to use it since."""
    assert state.is_dir()
    first, second = agent(fleet, "one"), agent(fleet, "two")
    converge("heartbeat", first, attempt="a")
    converge("heartbeat", second, attempt="b")
    step("rollback", "heartbeat", first, attempt="a")
    assert not (account / "one/HEARTBEAT.md").exists()
    assert changed(second) == {}


def test_what_stood_there_before_is_put_back(fleet: Fleet, state: Path, account: Path) -> None:
    """A HEARTBEAT.md that somebody wrote, a program of an older version, a timer that was stopped."""
    resource = agent(fleet)
    converge("heartbeat", resource, attempt="a")
    (account / "architect/HEARTBEAT.md").write_text("mine\n")
    (account / ".local/share/reconciler/heartbeat/heartbeat.py").write_text("old\n")
    (state / "active-heartbeat-architect.timer").unlink()
    assert set(changed(resource)) == {"file", "program", "schedule"}
    converge("heartbeat", resource, attempt="b")
    assert changed(resource) == {}
    step("rollback", "heartbeat", resource, attempt="b")
    assert (account / "architect/HEARTBEAT.md").read_text() == "mine\n"
    assert (account / ".local/share/reconciler/heartbeat/heartbeat.py").read_text() == "old\n"
    assert changed(resource)["schedule"] == "stopped"


def write_state(account: Path, **given: Any) -> None:
    """What the last beat would have written."""
    path = account / ".local/state/heartbeat/architect.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **given}))


def ledger(account: Path) -> dict[str, Any]:
    """What was done about the agent."""
    found: dict[str, Any] = json.loads((account / ".local/state/heartbeat/architect.ledger.json").read_text())
    return found


def test_a_late_agent_is_beaten_once_and_the_record_begins_anew(
    fleet: Fleet, state: Path, account: Path
) -> None:
    """A full beat that helps restarts nothing, now or the next time."""
    resource = agent(fleet, service="gateway.service")
    converge("heartbeat", resource, attempt="a")
    for attempt in ("b", "c"):
        write_state(account, beat=time.time() - 7200)
        assert changed(resource) == {"beat": "late: 2 h old"}
        done = converge("heartbeat", resource, attempt=attempt)
        assert "ran a full beat" in done["result"]["detail"]
        assert changed(resource) == {}
        assert ledger(account)["forced_beat"] == 0
    assert "gateway" not in (state / "log").read_text()


def test_a_forced_beat_that_did_not_help_restarts_the_service(fleet: Fleet, state: Path) -> None:
    """No source answers: forced, then restarted, then it is for a person."""
    resource = agent(
        fleet, service="gateway.service", sources={"workboard": {"list": ["false"]}, "documents": None}
    )
    converge("heartbeat", resource, attempt="a")
    assert changed(resource) == {"beat": "none of its task sources answers"}
    assert "gateway" not in (state / "log").read_text()
    done = converge("heartbeat", resource, attempt="b")
    assert "restarted gateway.service" in done["result"]["detail"]
    assert (state / "log").read_text().count("restart gateway.service") == 1
    done = converge("heartbeat", resource, attempt="c")
    assert "did not help" in done["failed"]
    assert (state / "log").read_text().count("restart gateway.service") == 1


def test_a_running_turn_is_given_its_grace_before_the_restart(
    fleet: Fleet, state: Path, account: Path
) -> None:
    """It is waited for, and no longer than declared."""
    resource = agent(
        fleet, service="gateway.service", sources={"workboard": {"list": ["false"]}}, turn=["sleep", "3"], turn_grace="20s",
        multica=None,
    )  # fmt: skip
    (account / "architect").mkdir()
    (account / "architect/TODO.md").write_text("- [ ] draw it\n")
    converge("heartbeat", resource, attempt="a")
    assert json.loads((account / ".local/state/heartbeat/architect.json").read_text())["turn"]["running"]
    known = {**ledger(account), "forced_beat": time.time()}
    (account / ".local/state/heartbeat/architect.ledger.json").write_text(json.dumps(known))
    write_state(account, beat=time.time() - 7200, scheduled_beat=None)
    began = time.monotonic()
    done = converge("heartbeat", resource, attempt="b")
    assert "waited for the turn; restarted gateway.service" in done["result"]["detail"], done
    assert 1 < time.monotonic() - began < 19
    assert "restart gateway.service" in (state / "log").read_text()


def test_a_box_that_stands_still_is_flagged_then_given_back_with_a_note(
    fleet: Fleet, state: Path, account: Path
) -> None:
    """The first time nobody is told, and its count is kept."""
    assert state.is_dir()
    resource = agent(fleet, suspected_after="1s", recover_after="4s", task_limit="1h")
    (account / "architect").mkdir()
    (account / "architect/TODO.md").write_text("- [~] draw it\n")
    converge("heartbeat", resource, attempt="a")
    program = account / ".local/bin/heartbeat"

    def seen_as(word: str) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            subprocess.run([program, "architect"], check=True)
            found = str(changed(resource).get("tasks", ""))
            if word in found:
                return found
            time.sleep(0.3)
        raise AssertionError(word)

    seen_as("suspected")
    done = converge("heartbeat", resource, attempt="b")
    assert "flagged TODO.md#" in done["result"]["detail"]
    assert "tasks" not in changed(resource) or "recover" in changed(resource)["tasks"]
    seen_as("recover")
    done = converge("heartbeat", resource, attempt="c")
    assert "nobody is told" in done["result"]["detail"], done
    (entry,) = ledger(account)["tasks"].values()
    assert (entry["timeouts"], entry["blocked"], entry["title"]) == (1, False, "draw it")
    text = (account / "architect/TODO.md").read_text()
    assert text.startswith("- [ ] draw it\n")
    assert "which is the first time" in text
    assert "tasks" not in changed(resource)
