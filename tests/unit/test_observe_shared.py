"""One worker asks all nodes whose control master is open; the others have their own. Real Ansible, played masters."""

from __future__ import annotations

import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ansible.plugins.connection import ssh

from reconciler import node, runner
from reconciler.runner import Result, Settings, Workspace
from tests.unit.masters import Master

# Ansible's own way to a node, with a note of each that it was taken for: the last word is the command.
SSH = """#!/bin/sh
echo "$@" >> %s
for last; do :; done
exec sh -c "$last"
"""


class Site:
    """Nodes of which some have an open master, and what came of a look at them."""

    def __init__(self, home: Path) -> None:
        self.home, self.lines = home, dict[str, str]()
        self.masters: dict[str, Master] = {}
        self.requests: dict[str, list[dict[str, Any]]] = {}
        self.log = home / "ssh.log"
        (home / "bin").mkdir()
        (home / "bin" / "ssh").write_text(SSH % self.log)
        (home / "bin" / "ssh").chmod(0o755)
        self._listening: list[socket.socket] = []

    def node(
        self, name: str, *, opened: bool = True, variables: str = "", seconds: float = 8.0, **given: Any
    ) -> None:
        """One node; ``given`` is for its master."""
        path = self.home / f"{name}.sock"
        self.lines[name] = f"{name} ansible_host={name}.test ansible_control_path={path} {variables}"
        if opened:
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(str(path))
            listening.listen(5)
            self._listening.append(listening)
            self.masters[name] = Master(listening, **given)
        nonce = f"@@{secrets.token_hex(12)}@@"
        script = node.bundle({}, {"nonce": nonce, "probes": [], "environment": {}})
        batch = {
            "script": script, "nonce": nonce, "interpreter": "python3", "seconds": seconds, "become": False,
            "fresh": False, "fresh_every": None,
        }  # fmt: skip
        self.requests[name] = [batch]

    def look(self, forks: int = 10, *, become: bool = False) -> dict[str, dict[str, Any]]:
        """What each node answered to its one batch, or the first line of why there is none."""
        inventory = self.home / "hosts"
        inventory.write_text("\n".join(self.lines.values()) + "\n")
        results: list[Result] = []
        with Workspace() as workspace:
            for name, batches in self.requests.items():
                workspace.request(name, {"batches": batches})
            settings = Settings(inventory, forks=forks, timeout=60)
            more = {"become": become, "one_each": True}
            runner.run("observe.yml", list(self.requests), workspace, settings, results.append, **more)
        assert len({result.node for result in results}) == len(results)
        return {result.node: _answer(result.data) for result in results}

    @property
    def by_ssh(self) -> set[str]:
        """Nodes that ssh was started for."""
        words = self.log.read_text().split() if self.log.exists() else []
        return {word.removesuffix(".test") for word in words if word.endswith(".test")}

    def close(self) -> None:
        """End the masters."""
        for listening in self._listening:
            listening.shutdown(socket.SHUT_RDWR)
            listening.close()


def _answer(data: Mapping[str, Any]) -> dict[str, Any]:
    if "reconciler" in data:
        (batch,) = data["reconciler"]["batches"]
        return dict(batch)
    return {"error": data["msg"].splitlines()[0]}


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    # A short path: the names of sockets are limited.
    with tempfile.TemporaryDirectory(prefix="shared-") as home:
        found = Site(Path(home))
        monkeypatch.setattr(runner, "_environment", _with(found.home / "bin", runner._environment))
        yield found
        found.close()


def _with(
    programs: Path, environment: Callable[[Settings], dict[str, str]]
) -> Callable[[Settings], dict[str, str]]:
    """The same environment, in which our ssh is found before the system's."""

    def found(settings: Settings) -> dict[str, str]:
        said = environment(settings)
        return {**said, "PATH": f"{programs}:{said['PATH']}", "ANSIBLE_SSH_RETRIES": "0"}

    return found


def test_open_masters_are_all_asked_without_ssh(site: Site) -> None:
    """More nodes than forks, each once."""
    for number in range(7):
        site.node(f"n{number}")
    found = site.look(forks=2)
    assert set(found) == set(site.requests)
    for answer in found.values():
        assert answer["answer"]["probes"] == []
        assert answer["connection"] == {
            "connection": "ssh",
            "control_socket": "alive",
            "transport": "pipelined",
        }
        assert answer["seconds"] > 0
    assert site.by_ssh == set()
    assert [len(master.commands) for master in site.masters.values()] == [1] * 7


def test_no_more_at_a_time_than_forks(site: Site) -> None:
    """One master for all, so that it can count."""
    for number in range(6):
        site.node(f"n{number}", opened=number == 0, hangs=0.3)
    (master,) = site.masters.values()
    for name in site.lines:
        site.lines[name] = f"{name} ansible_control_path={site.home}/n0.sock"
    assert set(site.look(forks=2)) == set(site.requests)
    assert (len(master.commands), master.most_at_once) == (6, 2)


def test_what_cannot_be_shared_is_asked_in_its_own_worker(site: Site) -> None:
    """And what was asked over its master is not asked again."""
    site.node("password", variables="ansible_password=secret")
    site.node("broken", variables="ansible_user='{{ nowhere }}'")
    site.node("unknown", variables="ansible_connection=pigeon")
    site.node("local", variables="ansible_connection=local")
    site.node("open")
    site.node("absent", opened=False)
    site.node("refuses", refuses=True)
    site.node("dies", dies=True)
    site.node("copies", variables="ansible_pipelining=false")
    site.node("wraps", variables=f"ansible_ssh_executable={site.home}/bin/wrapped")
    (site.home / "bin" / "wrapped").symlink_to("ssh")
    found = site.look()
    assert set(found) == set(site.requests)
    wrong = {name: found.pop(name)["error"] for name in ("broken", "unknown")}
    assert "nowhere" in wrong["broken"]
    assert "pigeon" in wrong["unknown"]
    assert all(answer["answer"]["probes"] == [] for answer in found.values())
    assert site.by_ssh == {"absent", "refuses", "dies", "copies", "wraps", "password"}
    assert found["local"]["connection"]["connection"] == "local"
    assert found["copies"]["connection"]["transport"].startswith("copied")
    assert {name: len(master.commands) for name, master in site.masters.items() if master.commands} == {
        "open": 1,
        "dies": 1,
    }


def test_first_node_that_is_broken_costs_nobody_an_answer(site: Site) -> None:
    """The task that runs once for all runs in its name."""
    site.node("broken", variables="ansible_user='{{ nowhere }}'")
    site.node("open")
    found = site.look()
    assert "nowhere" in found["broken"]["error"]
    assert "answer" in found["open"]


def test_new_logins_are_left_to_ssh(site: Site) -> None:
    """A control master that is open proves no login; one that worked lately need not be proved."""
    for name in ("fresh", "due", "recent", "open"):
        site.node(name)
    (site.home / "recent.sock.fresh").touch()
    site.requests["fresh"][0]["fresh"] = True
    site.requests["due"][0]["fresh_every"] = site.requests["recent"][0]["fresh_every"] = 60.0
    found = site.look()
    assert {name: answer["connection"].get("login") for name, answer in found.items()} == {
        "fresh": "fresh", "due": "fresh", "recent": "recent", "open": None,
    }  # fmt: skip
    assert site.by_ssh == {"fresh", "due"}


@pytest.mark.parametrize("strategy", ["ansible.builtin.free", "ansible.builtin.linear"])
def test_strategy_of_the_users_own_does_not_matter(
    site: Site, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """Some refuse tasks that run once for all nodes."""
    monkeypatch.setenv("ANSIBLE_STRATEGY", strategy)
    for name in ("a", "b"):
        site.node(name)
    assert all("answer" in answer for answer in site.look().values())
    assert site.by_ssh == set()


def test_variables_mean_what_they_mean_to_the_nodes_own_worker(site: Site) -> None:
    """Also those that tolerate what is missing: another meaning would lead to another machine."""
    site.node("gateway", variables=f"sockets={site.home}")
    site.node("wrong")
    site.node("vars")
    site.node("others")
    site.lines["vars"] = (
        f"vars ansible_host=x own={site.home}/vars.sock"
        f" ansible_control_path=\"{{{{ vars['own'] | default('{site.home}/wrong.sock') }}}}\""
    )
    site.lines["others"] = (
        "others ansible_host=x ansible_control_path="
        f"\"{{{{ (hostvars['gateway'] | default({{}})).sockets | default('{site.home}/wrong.sock/..') }}}}/others.sock\""
    )
    assert all("answer" in answer for answer in site.look().values())
    assert {name: len(master.commands) for name, master in site.masters.items()} == dict.fromkeys(
        site.lines, 1
    )


NOTING = """
_theirs = Connection.exec_command
def _noting(self, *given, **more):
    with open("%s", "a") as log:
        log.write(self.get_option("host") + "\\n")
    return _theirs(self, *given, **more)
Connection.exec_command = _noting
"""


def test_plugin_of_the_users_own_is_not_stepped_around(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lead into a container, say."""
    directory = site.home / "connection"
    directory.mkdir()
    theirs = Path(ssh.__file__).read_text()
    (directory / "ssh.py").write_text(theirs + NOTING % (site.home / "own.log"))
    monkeypatch.setenv("ANSIBLE_CONNECTION_PLUGINS", str(directory))
    site.node("own")
    found = site.look()
    assert all("answer" in answer for answer in found.values()), found
    assert (site.home / "own.log").read_text() == "own.test\n"
    assert site.by_ssh == {"own"}


SUDO = """#!/bin/sh
echo "$@" >> %s/sudo.log
while [ "${1#-}" != "$1" ]; do
  case $1 in -u) shift;; -n) never=yes;; esac
  shift
done
[ "$never" ] || { cat >> %s/typed; exit 1; }
exec "$@"
"""


def test_privilege_without_a_password_needs_no_ssh(site: Site) -> None:
    """Whatever else sudo wants is left to Ansible, which also says best what it lacks."""
    sudo = site.home / "bin" / "sudo"
    sudo.write_text(SUDO % (site.home, site.home))
    sudo.chmod(0o755)
    how = f"ansible_become_exe={sudo}"
    site.node("plain", variables=how)
    site.node("sudo", variables=how)
    site.node("root", variables=f"{how} ansible_user=root")
    site.node("other", variables=f"{how} ansible_become_user=somebody")
    (site.home / "bin" / "refuses").write_text("#!/bin/sh\nexit 1\n")
    (site.home / "bin" / "refuses").chmod(0o755)
    site.node("refused", variables=f"ansible_become_exe={site.home}/bin/refuses")
    site.node("asks", variables=f"{how} ansible_become_flags='-H -S'")
    site.node("password", variables=f"{how} ansible_become_password=secret")
    site.node("su", variables=f"{how} ansible_become_method=su ansible_become_flags=")
    site.node("never", variables=f"{how} ansible_become=false")
    site.node("shell", variables=f"{how} ansible_shell_executable=/bin/sh")
    for name in set(site.requests) - {"plain"}:
        site.requests[name][0]["become"] = True
    found = site.look(become=True)
    failed = {name for name, answer in found.items() if "answer" not in answer}
    assert failed == {"refused", "asks", "password", "su"}
    assert site.by_ssh == {"refused", "asks", "password", "su", "never", "shell"}
    typed = site.home / "typed"
    assert not typed.exists() or "import" not in typed.read_text(), "the script was taken for a password"
    asked = [line.split()[:5] for line in (site.home / "sudo.log").read_text().splitlines()]
    assert asked.count(["-H", "-S", "-n", "-u", "root"]) == 2  # sudo and shell
    assert asked.count(["-H", "-S", "-n", "-u", "somebody"]) == 1


@pytest.mark.parametrize("how", [{"hangs": 20}, {"mute": True}], ids=["node", "network"])
def test_silent_node_is_told_of_where_nobody_else_waits(site: Site, how: dict[str, Any]) -> None:
    """Its own deadline holds, once. Who is not reached by ssh at all can wait."""
    site.node("silent", seconds=5, **how)
    site.node("open")
    site.node("local", variables="ansible_connection=local")
    found = site.look()
    assert found["silent"] == {
        "error": "no answer within 5 s",
        "reached": False,
        "seconds": found["silent"]["seconds"],
    }
    assert 5 <= found["silent"]["seconds"] < 8
    assert {"answer"} <= set(found["open"]) & set(found["local"])
    assert site.by_ssh == set()


def test_nobody_waits_long_for_a_silent_node(site: Site) -> None:
    """Who has no open master gets its turn after three seconds; the silent one is asked once more, by itself."""
    site.node("silent", hangs=25, seconds=20)
    site.node("absent", opened=False)
    found = site.look()
    assert set(found) == {"silent", "absent"}
    assert all("answer" in answer for answer in found.values())
    assert site.by_ssh == {"silent", "absent"}
    assert found["silent"]["seconds"] < 5


def test_answers_take_the_long_way_where_no_mailbox_can_be(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is too long for a socket: each node has its worker, and is asked once."""
    deep = site.home / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    site.node("open")
    site.node("local", variables="ansible_connection=local")
    assert {name: answer.get("error") for name, answer in site.look().items()} == {
        "open": None,
        "local": None,
    }
    assert (site.by_ssh, site.masters["open"].commands) == ({"open"}, [])


def test_ansible_ends_by_itself_when_nobody_is_left(site: Site) -> None:
    """The play for the others has no node then."""
    site.node("open")
    results: list[Result] = []
    (site.home / "hosts").write_text(site.lines["open"])
    with Workspace() as workspace:
        workspace.request("open", {"batches": site.requests["open"]})
        runner.run(
            "observe.yml", ["open"], workspace, Settings(site.home / "hosts", timeout=60), results.append
        )
        assert not list(workspace.requests.iterdir())
    assert [set(result.data) & {"reconciler", "delivered"} for result in results] == [
        {"reconciler"},
        {"delivered"},
    ]
