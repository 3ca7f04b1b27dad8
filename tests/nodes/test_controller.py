"""The reconciler as a service on a real node, looking after other real nodes: installed by its own playbook."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from selenium.webdriver.common.by import By

from tests.api.browser import started
from tests.lab import Node
from tests.local.test_demo import until
from tests.nodes.conftest import Pool

ROOT = Path(__file__).parents[2]
HOME, VENV = "/var/lib/reconciler", "/opt/reconciler"
SLOW = 120.0
INTERVAL = 3.0
PASSES_OF_AN_HOUR = 12
SLEEPY = """\
import os, sys, time
here = os.path.expanduser("~")
open(here + "/begun", "w").close()
while not os.path.exists(here + "/go"):
    time.sleep(0.1)
"""


@dataclass
class Controller:
    """A node with the service, and the nodes that it looks after."""

    node: Node
    workers: list[Node]
    play: Callable[..., str]
    port: int
    fleet: Path

    def reconcile(self, words: str, *, check: bool = True) -> Any:
        """A question to the installed program, as its own user, with the answer read."""
        command = f"cd /etc/reconciler && HOME={HOME} {VENV}/bin/reconcile {words} --db {HOME}/reconciler.db --output json"
        said = self.node.run(f"runuser -u reconciler -- sh -c '{command}'", check=check).stdout
        return json.loads(said)

    def passes(self) -> int:
        return self.journal().count('"event": "pass"')

    def journal(self) -> str:
        return self.node.run("journalctl -u 'reconciler*' -o cat --no-pager").stdout

    def events(self, key: str) -> list[str]:
        rows = self.reconcile("events -n 100000")
        return [row["status"] for row in rows if row["issue_key"] == key]

    def show(self, name: str, unit: str = "reconciler.service") -> str:
        return self.node.run(f"systemctl show -P {name} {unit}").stdout.strip()

    def idle(self, more: int = 1) -> None:
        """So many more passes were made."""
        before = self.passes()
        assert until(lambda: self.passes() >= before + more, SLOW), self.journal()[-4000:]


def free_port() -> int:
    """One of the machine's, which its nodes share."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel and everything it needs, for a machine that reaches no index."""
    directory = tmp_path_factory.mktemp("wheels")
    for argv in (
        [sys.executable, "-m", "build", "--wheel", "--outdir", directory, ROOT],
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--only-binary=:all:",
            "-d",
            directory,
            f"{directory}/NAME",
        ],
    ):
        name = next((path.name for path in directory.glob("fleet_reconciler*.whl")), "")
        words = [str(word).replace("NAME", name) for word in argv]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.fixture(scope="module")
def installed(pool: Pool, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Controller:
    """Installed on one of three nodes by the playbook, with the two others as its fleet; nothing runs."""
    tmp_path = tmp_path_factory.mktemp("controller")
    nodes = pool
    first, *workers = nodes(3)
    bundle = subprocess.run(
        ["tar", "-c", "-C", wheels, "."], capture_output=True, check=True, timeout=120
    ).stdout
    first.write("/var/tmp/wheels.tar", bundle)
    first.run("mkdir -p /var/tmp/wheels && tar -xf /var/tmp/wheels.tar -C /var/tmp/wheels")
    fleet = tmp_path / "fleet"
    (fleet / "desired_state/files").mkdir(parents=True)
    (fleet / "inventory").mkdir()
    keys = nodes.lab.keys
    known = HOME + "/.ssh/known_hosts"
    hosts = {node.name: nodes.lab.host_vars(node) for node in workers}
    (fleet / "inventory/hosts.yml").write_text(
        yaml.safe_dump({"all": {"hosts": hosts, "vars": {
            "ansible_user": "agent", "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={known} -o StrictHostKeyChecking=yes",
        }}})
    )  # fmt: skip
    (fleet / "desired_state/fleet.yml").write_text(yaml.safe_dump(DESIRED))
    (fleet / "desired_state/files/w.sh").write_text("#!/bin/sh\n# new\n")
    (wheel,) = wheels.glob("fleet_reconciler*.whl")

    port = free_port()

    def play(*more: str) -> str:
        given = {
            "controller_hosts": first.name, "controller_packages": [], "controller_package": str(wheel),
            "controller_pip_arguments": "--no-index --find-links /var/tmp/wheels", "controller_fleet": str(fleet),
            "controller_interval": f"{INTERVAL}s", "controller_stop_timeout": 5,
            "controller_settings": f'log_format = "json"\nlease = "5s"\n[http]\nport = {port}\n',
            "controller_environment": {"AGENT_KEY": 'a "quoted" $value'}, "ansible_user": "root",
        }  # fmt: skip
        argv = [
            str(Path(sys.executable).parent / "ansible-playbook"), "playbooks/controller.yml",
            "-i", str(nodes.lab.inventory), "-e", json.dumps(given), *more,
        ]  # fmt: skip
        env = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
        done = subprocess.run(
            argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # The key comes from the playbook: the nodes let it in before the first pass, as a person would see to.
    play("-e", "controller_mode=timer")
    first.run("systemctl stop reconciler-once.timer reconciler-once.service")
    public = first.read(f"{HOME}/.ssh/id_ed25519.pub").decode()
    for node in workers:
        allowed = node.read("/home/agent/.ssh/authorized_keys").decode()
        node.write("/home/agent/.ssh/authorized_keys", allowed + public, owner="agent", mode="0600")
    first.write(known, keys.known_hosts.read_bytes(), owner="reconciler", mode="0600")
    return Controller(first, workers, play, port, fleet)


@pytest.fixture
def controller(installed: Controller) -> Controller:
    """As installed, with an empty database and workers that have nothing yet."""
    node = installed.node
    node.run("systemctl stop reconciler-once.timer reconciler.service reconciler-once.service", deadline=SLOW)
    node.run("rm -rf /etc/systemd/system/reconciler.service.d && systemctl daemon-reload")
    node.run(
        f"rm -rf {HOME}/reconciler.db* {HOME}/alerts; journalctl --rotate && journalctl --vacuum-time=1s"
    )
    node.write(
        "/etc/reconciler/desired_state/fleet.yml", (installed.fleet / "desired_state/fleet.yml").read_bytes()
    )
    for worker in installed.workers:
        worker.uncut()
        worker.run("rm -rf ~/w.sh* ~/s.db* ~/begun ~/go ~/sleepy.py ~/.local/state/reconciler", user="agent")
    return installed


DESIRED: dict[str, Any] = {
    "defaults": {"retry_interval": "1s"},
    "wrappers": [{"name": "w", "nodes": "all", "src": "files/w.sh", "dest": "~/w.sh", "mode": "0755"}],
    "schema": [{"name": "s", "nodes": "all", "database": "~/s.db", "tables": {"t": {"columns": {"id": "INTEGER PRIMARY KEY", "note": "TEXT"}}}}],
    "services": [{"name": "x", "nodes": "all", "scope": "user", "enabled": True, "run": {"command": ["/bin/sleep", "infinity"]}}],
}  # fmt: skip


def drift(node: Node, chance: random.Random) -> None:
    """One of the week's usual things."""
    what = chance.choice(
        ["echo old > ~/w.sh", "rm -f ~/w.sh", "chmod 600 ~/w.sh", "rm -f ~/s.db", "systemctl --user stop x.service",
         "rm -f ~/.config/systemd/user/x.service; systemctl --user daemon-reload"]
    )  # fmt: skip
    node.run(f"export XDG_RUNTIME_DIR=/run/user/$(id -u); {what}", user="agent")


def as_desired(node: Node) -> bool:
    """By looking at the node itself."""
    script = (
        "export XDG_RUNTIME_DIR=/run/user/$(id -u); grep -q new ~/w.sh && test -x ~/w.sh && systemctl --user -q is-active x"
        " && python3 -c \"import sqlite3,os; sqlite3.connect(os.path.expanduser('~/s.db')).execute('select note from t')\""
    )
    return node.run(script, user="agent", check=False).returncode == 0


def check_agreement(controller: Controller, profile: Path) -> None:
    """The API, the metrics and the page say what the events and the nodes say."""
    url = f"http://127.0.0.1:{controller.port}"
    names = {node.name for node in controller.workers}
    status = httpx.get(f"{url}/api/status", timeout=20).json()
    conditions = {
        row["issue_key"]: row["status"] for node in status["nodes"].values() for row in node["resources"]
    }
    assert set(status["nodes"]) == names
    assert set(conditions.values()) == {"True"}, conditions
    assert httpx.get(f"{url}/readyz", timeout=20).status_code == 200
    metrics = httpx.get(f"{url}/metrics", timeout=20).text
    samples = re.findall(r"^reconciler_condition\{(.*)\} (\S+)$", metrics, re.MULTILINE)
    good = sum(float(value) for labels, value in samples if 'status="True"' in labels)
    assert good == len(conditions), samples
    fixed = re.findall(r'^reconciler_attempts_total\{.*status="fixed".*\} (\S+)$', metrics, re.MULTILINE)
    rows = controller.reconcile("events -n 100000")
    assert sum(map(float, fixed)) == sum(row["status"] == "fixed" and row["fix_attempts"] > 0 for row in rows)
    page = started(profile / "chromium")
    try:
        page.get(url + "/")
        assert until(lambda: page.find_element(By.ID, "live").text == "live")
        shown = page.find_element(By.TAG_NAME, "body").text
        assert all(name in shown for name in names), shown
        assert "100" in shown
    finally:
        page.quit()


def test_service_keeps_a_fleet_as_desired_for_an_hour(controller: Controller, tmp_path: Path) -> None:
    """An hour's worth of passes in less time, with drift at random: each is repaired within the next interval."""
    said = controller.play()
    assert "failed=0" in said
    assert "Authorize this key" in said
    again = controller.play()
    assert "changed=0" in again, again
    assert controller.show("ActiveState") == "active"
    assert until(lambda: controller.passes() >= 1, SLOW), controller.journal()
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    while controller.passes() < PASSES_OF_AN_HOUR:
        node = chance.choice(controller.workers)
        drift(node, chance)
        # One pass may be under way and have looked already; the next one, an interval later, has to do it.
        controller.idle(2)
        assert as_desired(node), (seed, node, controller.journal()[-3000:])
    status = controller.reconcile("status")
    assert status["score"] == 100
    assert all(as_desired(node) for node in controller.workers)
    assert controller.reconcile("alerts")["alerts"] == []
    rows = controller.reconcile("events -n 100000")
    assert sum(row["status"] == "fixing" for row in rows) == sum(
        row["status"] == "fixed" and row["fix_attempts"] > 0 for row in rows
    )
    check_agreement(controller, tmp_path)
    environment = controller.node.run(
        "tr '\\0' '\\n' < /proc/$(systemctl show -P MainPID reconciler)/environ"
    ).stdout
    assert 'AGENT_KEY=a "quoted" $value' in environment
    assert controller.show("User") == "reconciler"


def test_service_that_is_ended_in_the_middle_of_a_repair_resumes_it(controller: Controller) -> None:
    """In order by systemctl stop, and not in order by kill -9: no repair is lost, and none is done twice."""
    node = controller.workers[0]
    slow = {**DESIRED["wrappers"][0], "validate": "python3 /home/agent/sleepy.py %s", "nodes": node.name}
    node.write("/home/agent/sleepy.py", SLEEPY, owner="agent")
    controller.node.write(
        "/etc/reconciler/desired_state/fleet.yml",
        yaml.safe_dump({**DESIRED, "wrappers": [slow]}),
        mode="0644",
    )
    key = f"{node.name}/wrapper/w"
    controller.node.run("systemctl start reconciler")
    for ending in ("systemctl stop reconciler", "systemctl kill -s KILL --kill-whom=main reconciler"):
        assert until(lambda: node.run("test -e ~/begun", user="agent", check=False).returncode == 0, SLOW)
        controller.node.run(ending, deadline=SLOW)
        if "stop" in ending:
            assert controller.show("Result") in ("success", "exit-code")
            left = controller.node.run("pgrep -u reconciler -a", check=False).stdout
            assert left == "", left
            controller.node.run("systemctl start reconciler")
        node.run("touch ~/go; rm ~/begun", user="agent")
        assert until(lambda: controller.events(key)[-1:] == ["fixed"], SLOW), controller.journal()[-4000:]
        story = controller.events(key)
        assert story.count("fixing") == story.count("fixed"), story
        node.run("rm -f ~/go; echo drifted > ~/w.sh", user="agent")
    node.run("touch ~/go", user="agent")


def test_watchdog_restarts_a_service_that_hangs(controller: Controller) -> None:
    """A process that is there and does nothing is worse than none."""
    controller.node.write(
        "/etc/systemd/system/reconciler.service.d/fast.conf", "[Service]\nWatchdogSec=8s\nRestartSec=1s\n"
    )
    controller.node.run("systemctl daemon-reload && systemctl start reconciler")
    controller.idle()
    before = controller.show("MainPID")
    controller.node.run(f"kill -STOP {before}")
    assert until(lambda: controller.show("MainPID") not in (before, "0"), SLOW), controller.journal()
    controller.idle()
    assert int(controller.show("NRestarts")) >= 1


def test_timer_makes_single_passes_and_the_database_is_backed_up(controller: Controller) -> None:
    """The other way to run it; and the backup that comes with either."""
    controller.play("-e", "controller_mode=timer", "-e", "controller_log_file=/var/log/reconciler.log")
    assert controller.show("ActiveState") == "inactive"
    assert controller.show("ActiveState", "reconciler-once.timer") == "active"
    assert until(lambda: all(map(as_desired, controller.workers)), SLOW), controller.journal()
    drift(controller.workers[0], random.Random(1))
    assert until(lambda: all(map(as_desired, controller.workers)), SLOW), controller.journal()
    assert "wrapper/w" in controller.node.read("/var/log/reconciler.log").decode()
    assert b"/var/log/reconciler.log" in controller.node.read("/etc/logrotate.d/reconciler")
    controller.node.run("systemctl start reconciler-backup.service", deadline=SLOW)
    listing = controller.node.run(f"ls {HOME}/backups").stdout.split()
    assert len(listing) == 1
    assert controller.show("ActiveState", "reconciler-backup.timer") == "active"
    # A node that is silent is told, and is no failure of the unit.
    controller.workers[1].cut()
    time.sleep(INTERVAL)
    assert until(lambda: '"exit_code": 4' in json.dumps(controller.reconcile("status")["last_pass"]), SLOW)
    assert until(lambda: controller.show("Result", "reconciler-once.service") == "success", SLOW)
    assert controller.show("ActiveState", "reconciler-once.service") != "failed"
