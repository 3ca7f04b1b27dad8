"""The service role with stand-ins for the service managers: what is asked of them, in which order."""

from __future__ import annotations

import base64
import os
import plistlib
import time
from pathlib import Path
from typing import Any

import pytest

from reconciler.kinds import names
from reconciler.kinds.service import probe
from reconciler.node import lib
from tests.unit.support import Fleet, converge, look, step

# A service manager in thirty lines of shell: its state is three files in $STATE, its log is $STATE/log.
LAUNCHCTL = """#!/bin/sh
echo "$@" >> "$STATE/log"
case $1 in
  print) [ -f "$STATE/loaded" ] || exit 113
    [ -f "$STATE/running" ] && { echo "	state = running"; echo "	pid = $(cat "$STATE/running")"; } || echo "	state = exited";;
  print-disabled) [ -f "$STATE/disabled" ] && echo '	"org.example.w" => disabled'; true;;
  bootstrap) touch "$STATE/loaded";;
  bootout) rm -f "$STATE/loaded" "$STATE/running";;
  kickstart) [ -f "$STATE/dies" ] || echo PID > "$STATE/running";;
  enable) rm -f "$STATE/disabled";;
  disable) touch "$STATE/disabled";;
esac
"""
SYSTEMCTL = """#!/bin/sh
echo "$@" >> "$STATE/log"
[ "$1" = --user ] && shift
case $1 in
  show) cat "$STATE/show";;
esac
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: Path) -> Path:
    """The stand-ins first on PATH, and where they keep their state."""
    directory = tmp_path / "state"
    directory.mkdir()
    programs = account / "bin"
    programs.mkdir()
    for name, text in (("launchctl", LAUNCHCTL), ("systemctl", SYSTEMCTL)):
        (programs / name).write_text(text.replace("PID", str(os.getpid())))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("STATE", str(directory))
    return directory


def said(state: Path) -> list[str]:
    """Commands that change something, in order."""
    words = (line.split()[0] for line in (state / "log").read_text().splitlines())
    return [word for word in words if not word.startswith("print")]


@pytest.fixture
def job(fleet: Fleet) -> dict[str, Any]:
    """A launchd job as the role gets it."""
    fleet.write(
        "services:\n  - name: org.example.w\n    nodes: node-1\n    manager: launchd\n    scope: user\n    enabled: true\n"
        "    settle: 0\n    run: {command: [/opt/w, --poll, '5 <&>'], environment: {TZ: Asia/Shanghai}, directory: /opt}\n"
    )
    found = fleet.resource("node-1/service/org.example.w")
    return {**found.args, **found.fields}


def facts(job: dict[str, Any]) -> Any:
    """What the probe says."""
    return look("service", job)["facts"]


def test_rendered_plist_is_what_was_declared(job: dict[str, Any], state: Path, account: Path) -> None:
    """Words stay words, whatever is in them."""
    assert converge("service", job)["result"]["changed"]
    plist = plistlib.loads((account / "Library/LaunchAgents/org.example.w.plist").read_bytes())
    assert plist["Label"] == "org.example.w"
    assert plist["ProgramArguments"] == ["/opt/w", "--poll", "5 <&>"]
    assert plist["EnvironmentVariables"] == {"TZ": "Asia/Shanghai"}
    assert (plist["WorkingDirectory"], plist["RunAtLoad"]) == ("/opt", True)
    assert said(state) == ["bootstrap", "kickstart"]


def test_job_that_runs_as_declared_is_left_alone(job: dict[str, Any], state: Path) -> None:
    """The second pass finds no difference."""
    converge("service", job)
    assert facts(job)["state"] == "running"
    (state / "log").unlink()
    # This very test process stands in for the job; it is older than the plist.
    job = {**job, "restart_on": [], "fresh": None}
    assert step("apply", "service", job, attempt="a2")["result"]["changed"] is False
    assert said(state) == []


def test_changed_plist_is_loaded_again(job: dict[str, Any], state: Path, account: Path) -> None:
    """Launchd reads it only then."""
    path = account / "Library/LaunchAgents/org.example.w.plist"
    path.parent.mkdir(parents=True)
    path.write_text("old")
    (state / "loaded").touch()
    (state / "running").write_text(str(os.getpid()))
    assert converge("service", job)["result"]["changed"]
    assert said(state) == ["bootout", "bootstrap", "kickstart"]
    (state / "log").unlink()
    step("rollback", "service", job)
    assert path.read_text() == "old"
    assert said(state)[:1] == ["bootout"]
    assert said(state)[-2:] == ["bootstrap", "kickstart"]


def test_disabled_job_is_enabled(job: dict[str, Any], state: Path) -> None:
    """So that it comes back after a boot."""
    (state / "disabled").touch()
    assert facts(job)["enabled"] == "disabled"
    converge("service", job)
    assert said(state)[0] == "enable"
    assert facts(job)["enabled"] == "enabled"


def test_job_that_does_not_stay_up_fails_and_is_taken_back(
    job: dict[str, Any], state: Path, account: Path
) -> None:
    """The plist that was installed for it goes, too."""
    (state / "dies").touch()
    assert "does not stay up" in converge("service", job)["failed"]
    step("rollback", "service", job)
    assert not (account / "Library").exists()
    assert not (state / "loaded").exists()


def test_job_that_should_be_stopped_is_unloaded(job: dict[str, Any], state: Path) -> None:
    """Running is the drift."""
    converge("service", job)
    (state / "log").unlink()
    job = {**job, "state": "stopped"}
    assert converge("service", job, attempt="a2")["result"]["changed"]
    assert said(state) == ["bootout"]
    assert facts(job)["state"] == "missing"


# --- systemd's answers, as recorded -----------------------------------------------------------------

SHOW = {
    "LoadState": "loaded", "ActiveState": "active", "SubState": "running", "UnitFileState": "enabled", "MainPID": "77",
    "NRestarts": "2", "NeedDaemonReload": "no", "FragmentPath": "/etc/systemd/system/w.service", "Result": "success",
    "ExecMainStartTimestampMonotonic": "0", "ActiveEnterTimestampMonotonic": "0",
}  # fmt: skip
ARGS = {
    "unit_name": "w.service",
    "unit_path": "~/w.service",
    "scope": "user",
    "manager": "systemd",
    "restart_on": ["~/input"],
}


def systemd(state: Path, **changed: str) -> Any:
    """Facts of a unit of which systemd says this."""
    (state / "show").write_text("".join(f"{key}={value}\n" for key, value in {**SHOW, **changed}.items()))
    return look("service", ARGS)["facts"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {},
            {
                "state": "running",
                "enabled": "enabled",
                "restarts": 2,
                "pid": 77,
                "masked": False,
                "stale": "",
            },
        ),
        ({"ActiveState": "reloading"}, {"state": "running"}),
        ({"ActiveState": "inactive", "SubState": "dead"}, {"state": "stopped", "substate": "dead"}),
        ({"ActiveState": "inactive", "LoadState": "not-found"}, {"state": "missing"}),
        ({"ActiveState": "failed", "Result": "exit-code"}, {"state": "failed", "result": "exit-code"}),
        ({"ActiveState": "activating", "SubState": "auto-restart"}, {"state": "starting"}),
        ({"ActiveState": "deactivating"}, {"state": "stopped"}),
        ({"UnitFileState": "masked"}, {"masked": True}),
        ({"LoadState": "masked", "UnitFileState": ""}, {"masked": True}),
        ({"NeedDaemonReload": "yes"}, {"stale": "systemd has not read the unit file as it is now"}),
        ({"MainPID": "", "NRestarts": ""}, {"pid": 0, "restarts": 0}),
    ],
)
def test_systemds_answer_becomes_facts(
    state: Path, changed: dict[str, str], expected: dict[str, Any]
) -> None:
    """State, enablement, and whether a restart is due."""
    found = systemd(state, **changed)
    assert {key: found[key] for key in expected} == expected


def test_process_that_is_older_than_its_input_is_stale(state: Path, account: Path) -> None:
    """Read off the node alone, with nothing remembered."""
    assert systemd(state, ExecMainStartTimestampMonotonic="1")["stale"] == ""
    (account / "input").write_text("new")
    found = systemd(state, ExecMainStartTimestampMonotonic="1")["stale"]
    assert found == "~/input is newer than the running process"
    assert systemd(state, ActiveEnterTimestampMonotonic="1")["stale"] == found
    later = str(10**15)
    assert systemd(state, ExecMainStartTimestampMonotonic=later)["stale"] == ""


def test_clock_that_was_set_back_makes_no_input_newer_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service would be restarted in every pass until the clock has caught up."""
    (tmp_path / "input").write_text("new")
    now = time.time()
    monkeypatch.setattr(probe, "lib", lib)
    args = {"restart_on": [str(tmp_path / "input")]}
    assert probe.newer_input(args, now - 10) != ""
    monkeypatch.setattr("time.time", lambda: now - 3600)
    assert probe.newer_input(args, now - 3610) == ""


def test_copying_tool_that_sets_times_back_does_not_hide_a_change(state: Path, account: Path) -> None:
    """The time of the last status change counts."""
    (account / "input").write_text("new")
    os.utime(account / "input", (0, 0))
    assert systemd(state, ExecMainStartTimestampMonotonic="1")["stale"] != ""


def test_manager_that_does_not_answer_makes_the_state_unknown(state: Path, account: Path) -> None:
    """With the hint that user units usually need."""
    (account / "bin" / "systemctl").write_text("#!/bin/sh\necho 'Failed to connect to bus' >&2; exit 1\n")
    error = look("service", ARGS)["error"]
    assert "Failed to connect to bus" in error
    assert "loginctl enable-linger" in error
    assert state.is_dir()
    assert "service" in names()


def test_unit_file_is_written_from_a_program(fleet: Fleet) -> None:
    """Quoted as systemd reads it: specifiers and variables are taken literally."""
    fleet.write(
        "services:\n  - name: w\n    nodes: node-1\n    scope: user\n"
        "    run: {command: [/opt/w, 'a b', '100%', '$HOME', 'say \"x\\y\"'], environment: {K: 'v %h'}, directory: /opt/%}\n"
    )
    body = base64.b64decode(fleet.resource("node-1/service/w").args["body"]).decode()
    assert 'ExecStart="/opt/w" "a b" "100%%" "$$HOME" "say \\"x\\\\y\\""' in body
    assert 'Environment="K=v %%h"' in body
    assert "WorkingDirectory=/opt/%%" in body
    assert "WantedBy=default.target" in body
