"""Continuous mode as a service: real passes over make-believe nodes, real signals, a real repository."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from reconciler import asks, demo
from reconciler.store import Store
from tests.local.test_demo import COMMAND, until

SLOW = 90.0


@dataclass
class Service:
    """One process in continuous mode over the demo's fleet; its logs are JSON."""

    directory: Path
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def start(self, *arguments: str, interval: str = "1h", **env: str) -> None:
        quiet = {"RECONCILER_LOG_FORMAT": "json", "RECONCILER_HTTP__ENABLED": "false"}
        more = {"RECONCILER_INTERVAL": interval, **quiet, **self.env, **env}
        errors = (self.directory / "log").open("ab")
        with errors:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments], cwd=self.directory, env={**os.environ, **more}, stderr=errors,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip

    def log(self, event: str | None = None) -> list[dict[str, Any]]:
        """Lines so far; every one has to be JSON."""
        lines = (self.directory / "log").read_text().splitlines() if (self.directory / "log").exists() else []
        found = [json.loads(line) for line in lines if line]
        return [line for line in found if event is None or line["event"] == event]

    def passes(self) -> int:
        return len(self.log("pass"))

    def idle(self, passes: int = 1) -> None:
        """So many passes were made."""
        assert until(lambda: self.passes() >= passes, SLOW), self.log()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=SLOW,
            check=False,
        )

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(SLOW)

    def wrapper(self, node: str = "node-3") -> Path:
        return self.directory / "nodes" / node / "task-wrapper.sh"

    def events(self, key: str) -> list[str]:
        sql = "SELECT status FROM guardian_events WHERE issue_key = ? ORDER BY id"
        with closing(sqlite3.connect(self.directory / "reconciler.db", timeout=20)) as database:
            return [row[0] for row in database.execute(sql, [key])]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """Not started yet."""
    directory = tmp_path / "demo"
    demo._make(directory)
    demo._drift(directory)
    made = Service(directory)
    yield made
    if made.process and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def test_pass_is_made_on_request_and_acknowledged(service: Service) -> None:
    """By command, for all or for a part; a name that means nothing is the asker's mistake, and no pass."""
    said = service.run("now")
    assert said.returncode == 1
    assert "nothing runs continuously" in said.stderr
    service.start()
    service.idle()
    for node in ("node-2", "node-3"):
        service.wrapper(node).unlink()
    said = service.run("now", "node-3/wrapper", "--wait")
    assert (said.returncode, service.wrapper().exists(), service.wrapper("node-2").exists()) == (
        0,
        True,
        False,
    ), said
    assert "ended with exit code 0" in said.stdout
    said = service.run("now", "node-7")
    assert said.returncode == 1
    assert "nothing that passes have looked at is called node-7" in said.stderr
    assert "did you mean 'node-" in said.stderr
    assert service.run("now", "--output", "json").returncode == 0
    assert until(service.wrapper("node-2").exists)
    with closing(Store(service.directory / "reconciler.db")) as store:
        numbers = [asks.ask(store, target, "dana") for target in ("node-7", "node-3", "node-7")]

        def became() -> list[str]:
            return [str((asks.state(store, number) or {})["problem"]) for number in numbers]

        assert until(lambda: all((asks.state(store, n) or {})["state"] == "done" for n in numbers), SLOW)
        assert [bool(problem) for problem in became()] == [True, False, True], (
            "one asker's mistake is not another's"
        )
    assert service.stop() == 0


def test_signals_make_a_pass_and_read_settings_again(service: Service) -> None:
    """SIGUSR1 at once; SIGHUP takes a new interval over, and keeps the old settings where the new ones are wrong."""
    service.start(interval="1h")
    service.idle()
    service.wrapper().unlink()
    os.kill(service.pid, signal.SIGUSR1)
    assert until(service.wrapper().exists, SLOW)
    service.idle(2)
    settings = service.directory / "reconciler.toml"
    good = settings.read_text()
    settings.write_text(good + "intervall = 3\n")
    os.kill(service.pid, signal.SIGHUP)
    assert until(lambda: bool(service.log("the settings are wrong; going on with those before")))
    assert "intervall" in service.log("the settings are wrong; going on with those before")[0]["reason"]
    settings.write_text(good + "forks = 7\n")
    os.kill(service.pid, signal.SIGHUP)
    assert until(lambda: bool(service.log("settings read again")))
    assert service.stop(signal.SIGINT) == 0
    assert service.log("ended in order")


def test_one_service_per_database(service: Service) -> None:
    """The second says who is there and ends; a single pass beside it is fine."""
    service.start()
    service.idle()
    said = service.run()
    assert said.returncode == 1
    assert f"process {service.pid} already runs continuously" in said.stderr
    assert service.run("--once").returncode == 0
    assert service.stop() == 0
    service.start()
    service.idle(2)


def test_supervisor_hears_what_it_needs(service: Service) -> None:
    """Ready, alive also while a pass lasts, reloading, stopping."""
    short = tempfile.TemporaryDirectory(dir="/tmp")  # the address of a socket may not be long
    address = f"{short.name}/notify"
    heard: list[str] = []
    with short, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hear:
        hear.bind(address)
        hear.settimeout(SLOW)

        def wait_for(word: str) -> None:
            deadline = time.monotonic() + SLOW
            while word not in heard:
                assert time.monotonic() < deadline, heard
                with suppress(TimeoutError):
                    heard.extend(hear.recv(4096).decode().splitlines())

        service.start(NOTIFY_SOCKET=address)
        wait_for("READY=1")
        wait_for("STATUS=a pass is under way")
        heard.clear()
        wait_for("WATCHDOG=1")
        wait_for("STATUS=last pass: as_desired")
        heard.clear()
        os.kill(service.pid, signal.SIGHUP)
        wait_for("RELOADING=1")
        wait_for("READY=1")
        heard.clear()
        assert service.process
        service.process.terminate()
        wait_for("STOPPING=1")


def test_pass_that_does_not_end_in_time_is_left_for_the_next_start(service: Service) -> None:
    """Asked to end in the middle of a repair: nothing half done is lost sight of."""
    slow = f"{sys.executable} {service.directory}/slow.py %s"
    (service.directory / "slow.py").write_text(
        "import pathlib, time\nhere = pathlib.Path(__file__).parent\n(here / 'begun').touch()\n"
        "while not (here / 'go').exists(): time.sleep(0.05)\n"
    )
    state = service.directory / "desired_state/fleet.yml"
    state.write_text(state.read_text().replace("sh -n %s", slow))
    service.start(RECONCILER_STOP_TIMEOUT="1s", RECONCILER_LEASE="2s")
    assert until((service.directory / "begun").exists, SLOW)
    assert service.stop() == 3
    (ended,) = service.log("no pass")
    assert ended["result"] == "abandoned"
    (service.directory / "go").touch()
    service.start()
    service.idle()
    assert service.stop() == 0
    story = service.events("node-1/wrapper/task-wrapper")
    assert story == ["detected", "fixing", "fixed"]


def test_failed_repair_is_tried_again_when_it_is_due(service: Service) -> None:
    """Not an interval of an hour later."""
    state = service.directory / "desired_state/fleet.yml"
    broken = state.read_text().replace("sh -n %s", f"test -e {service.directory}/mended -a -e %s")
    state.write_text("defaults: {retry_interval: 5s, max_attempts: 3}\n" + broken)
    service.start()
    key = "node-1/wrapper/task-wrapper"
    assert until(lambda: service.passes() >= 1 and "rolled_back" in service.events(key), SLOW)
    (service.directory / "mended").touch()
    assert until(lambda: service.events(key)[-1] == "fixed", SLOW), service.events(key)


def test_resources_are_looked_at_as_often_as_each_declares(service: Service) -> None:
    """The wrapper every second; the others not again within the hour."""
    state = service.directory / "desired_state/fleet.yml"
    state.write_text(state.read_text().replace('    mode: "0755"', '    mode: "0755"\n    interval: 1s'))
    service.start()
    service.idle(3)
    assert [line["resources"] for line in service.log("pass")][:3] == [7, 3, 3]


def test_logs_tell_the_story_with_run_node_and_resource(service: Service) -> None:
    """One line an event, and one for the pass."""
    service.start()
    service.idle()
    assert service.stop() == 0
    (fixed,) = [line for line in service.log("fixed") if line["resource"] == "node-3/wrapper/task-wrapper"]
    (ended,) = service.log("pass")
    assert (fixed["node"], fixed["run"], fixed["level"]) == ("node-3", ended["run"], "info")
    assert (ended["result"], ended["fixed"], ended["nodes"]) == ("as_desired", 7, 4)
    assert service.log()[0]["event"] == "started"
    once = service.run("--once", "--check")
    assert once.stderr == "", "a single pass logs nothing unless it is asked to"


# --- git ------------------------------------------------------------------------------------------------


@pytest.fixture
def push(service: Service, tmp_path: Path) -> Callable[[str, str], str]:
    """Put the demo's desired state into a repository, and change it: file, content; the revision."""
    bare, work = tmp_path / "fleet.git", tmp_path / "work"

    def git(*words: str) -> str:
        argv = ["git", "-c", "user.name=dana", "-c", "user.email=dana@example.org", *words]
        done = subprocess.run(argv, cwd=work, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    subprocess.run(["git", "init", "--quiet", "--bare", "-b", "main", str(bare)], check=True, timeout=60)
    work.mkdir()
    (service.directory / "desired_state").rename(work / "desired_state")
    (service.directory / "inventory.yml").rename(work / "inventory.yml")
    git("init", "--quiet", "-b", "main")
    git("remote", "add", "origin", str(bare))

    def change(name: str, text: str) -> str:
        if name:
            (work / name).write_text(text)
        git("add", "-A")
        git("commit", "--quiet", "--allow-empty", "-m", "change")
        git("push", "--quiet", "origin", "main")
        return git("rev-parse", "--short=12", "HEAD")

    change("", "")
    (service.directory / "reconciler.toml").write_text(
        f'inventory = "inventory.yml"\ndb = "reconciler.db"\n[git]\nurl = "{bare}"\ninterval = "1s"\n'
    )
    return change


def test_commit_reaches_the_nodes_and_a_wrong_one_changes_nothing(
    service: Service, push: Callable[[str, str], str]
) -> None:
    """Within seconds of the push, with the revision in the events; the mistake is told with its place."""
    service.start()
    service.idle()
    script = "#!/bin/sh\n# next month's way\n"
    revision = push("desired_state/files/task-wrapper.sh", script)
    assert until(lambda: service.wrapper("node-1").read_text() == script, SLOW)
    assert until(lambda: service.passes() >= 2, SLOW)
    assert service.log("pass")[1]["why"] == "new revision"
    assert {line["revision"] for line in service.log("pass")[1:]} == {revision}
    bad = push("desired_state/more.yml", "wrappers:\n  - {name: x, nodes: node-1, dest: ~/x, contant: y}\n")
    assert until(lambda: bool(service.log("revision rejected")), SLOW)
    (line,) = service.log("revision rejected")
    assert (line["revision"], line["kept"]) == (bad, revision)
    assert "desired_state/more.yml:2:" in line["reason"]
    service.wrapper("node-1").write_text("drifted\n")
    assert service.run("now", "--wait").returncode == 0
    assert service.wrapper("node-1").read_text() == script, "the last good revision is still kept up"
    alerts = json.loads(service.run("alerts", "--output", "json").stdout)["alerts"]
    assert [(alert["key"], alert["reason"]) for alert in alerts] == [("fleet", "RevisionRejected")]
    assert "contant" in alerts[0]["detail"]
    push("desired_state/more.yml", "wrappers:\n  - {name: x, nodes: node-1, dest: ~/x, content: y}\n")
    assert until((service.directory / "nodes/node-1/x").exists, SLOW)
    service.idle(service.passes())
    assert until(lambda: json.loads(service.run("alerts", "--output", "json").stdout)["alerts"] == [], SLOW)
    assert service.run("validate").returncode == 0
    assert service.stop() == 0


def test_new_revision_cancels_waiting_retries(service: Service, push: Callable[[str, str], str]) -> None:
    """Also where the declaration that failed is another's: somebody is mending something."""
    broken = demo.DESIRED.replace("sh -n %s", f"test -e {service.directory}/mended -a -e %s")
    push("desired_state/fleet.yml", "defaults: {retry_interval: 1h}\n" + broken)
    service.start()
    key = "node-1/wrapper/task-wrapper"
    assert until(lambda: service.passes() >= 1 and "rolled_back" in service.events(key), SLOW)
    (service.directory / "mended").touch()
    push("README", "the validator is installed now\n")
    assert until(lambda: service.events(key)[-1] == "fixed", SLOW), service.events(key)


def test_single_pass_pulls_and_says_so_when_the_newest_is_wrong(
    service: Service, push: Callable[[str, str], str], tmp_path: Path
) -> None:
    """Exit code 3: what is wanted now was not done, though the last good revision was."""
    assert service.run("--once", "--pull").returncode == 0
    bad = push("desired_state/more.yml", "wrapers: []\n")
    said = service.run("--once", "--pull")
    assert said.returncode == 3
    assert f"revision {bad} is not carried out" in said.stderr
    assert "did you mean 'wrappers'" in said.stderr
    (tmp_path / "fleet.git").rename(tmp_path / "gone.git")
    service.wrapper().unlink()
    said = service.run("--once", "--pull")
    assert "warning: the repository cannot be asked" in said.stderr
    assert service.wrapper().exists()
