"""The demo's fleet: real Ansible, real roles and a real database, without root, sshd or containers."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from reconciler import demo

COMMAND = [sys.executable, "-m", "reconciler"]


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """The demo's directory, drifted."""
    directory = tmp_path / "demo"
    demo._make(directory)
    demo._drift(directory)
    return directory


def once(directory: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [*COMMAND, *arguments, "--output", "json"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


def until(happened: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_the_demo_shows_drift_repairs_it_and_is_quiet_then(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "reconciler.demo", str(tmp_path / "demo")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 to fix" in done.stdout
    assert "7 fixed" in done.stdout
    assert "7 as desired" in done.stdout


def test_the_demo_never_touches_a_directory_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    done = subprocess.run(
        [sys.executable, "-m", "reconciler.demo", str(tmp_path)], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert (tmp_path / "precious").read_text() == "x"


def fixed(fleet: Path) -> int:
    """How often node-3's wrapper was put right, as far as events say."""
    if not (fleet / "reconciler.db").exists():
        return 0
    sql = "SELECT count(*) FROM guardian_events WHERE issue_key = ? AND status = 'fixed'"
    with closing(sqlite3.connect(fleet / "reconciler.db", timeout=10)) as database:
        try:
            return int(database.execute(sql, ["node-3/wrapper/task-wrapper"]).fetchone()[0])
        except sqlite3.OperationalError:  # not made yet
            return 0


def test_continuous_passes_repair_what_drifts_and_end_in_order(fleet: Path) -> None:
    """Also over a mistake in the desired state: it is told, nothing is touched, and the next edit mends it."""
    env = {**os.environ, "RECONCILER_INTERVAL": "1s", "RECONCILER_HTTP__ENABLED": "false"}
    wrapper = fleet / "nodes/node-3/task-wrapper.sh"
    with subprocess.Popen(
        COMMAND, cwd=fleet, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        # Not while a repair is being verified: it would be undone, and wait for its next attempt.
        assert until(lambda: fixed(fleet) == 1)
        wrapper.unlink()
        assert until(lambda: fixed(fleet) == 2)
        state = fleet / "desired_state/fleet.yml"
        good = state.read_text()
        state.write_text(good.replace("wrappers:", "wrapers:"))
        time.sleep(3)
        wrapper.unlink()
        time.sleep(3)
        assert not wrapper.exists()
        state.write_text(good)
        assert until(lambda: fixed(fleet) == 3)
        process.send_signal(signal.SIGTERM)
        _out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "did you mean 'wrappers'" in err
    assert "Traceback" not in err
    document = json.loads(
        subprocess.run(
            [*COMMAND, "status", "--output", "json"], cwd=fleet, capture_output=True, timeout=60, check=True
        ).stdout
    )
    assert document["score"] == 100
    assert document["last_pass"]["next"] > document["last_pass"]["started"]


def test_a_secret_reaches_the_node_and_nothing_else(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "sk-very-secret-4711"
    monkeypatch.setenv("AGENT_KEY", secret)
    (fleet / "desired_state/secret.yml").write_text(
        "wrappers:\n  - name: key\n    nodes: workers\n    dest: ~/key\n    mode: '0600'\n    validate: sh -c 'cat %s; exit 1'\n"
        "    content: {$env: AGENT_KEY}\n"
    )
    said = ""
    for arguments in (["--check"], ["--once"], ["events"], ["status"], ["explain", "node-1/wrapper/key"]):
        for output in ("text", "json"):
            argv = [*COMMAND, *arguments, "--output", output]
            done = subprocess.run(argv, cwd=fleet, capture_output=True, text=True, timeout=120, check=False)
            said += done.stdout + done.stderr
    assert "(secret)" in said
    assert secret not in said
    assert secret.encode() not in (fleet / "reconciler.db").read_bytes()
    state = (fleet / "desired_state/secret.yml").read_text()
    (fleet / "desired_state/secret.yml").write_text(state.replace("; exit 1", ""))
    code, report = once(fleet, "--once")
    assert code == 0, report
    assert (fleet / "nodes/node-1/key").read_text() == secret
    assert secret not in json.dumps(report)
    assert once(fleet, "--check")[0] == 0


def test_a_pass_ended_by_sigterm_leaves_no_request_file_behind(fleet: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen(
        [*COMMAND, "--once"], cwd=fleet, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert until(lambda: any(scratch.glob("reconciler-*")))
        time.sleep(0.5)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 143
    assert list(scratch.glob("reconciler-*")) == []
