"""The dead man's switch: a change that locks everybody out is undone by its node, and a good one stays."""

import subprocess

import pytest

from tests.lab import Node
from tests.nodes.conftest import Pool
from tests.nodes.fleet import Fleet
from tests.nodes.safety import (
    AGENT,
    alert_files,
    check_quiet,
    check_settled,
    last_event,
    stories,
    text,
    wait_for,
)

KEYS = f"{AGENT}/.ssh/authorized_keys"
KEY = "node-1/wrapper/keys"
# A good change has to be confirmed in time on a busy machine, too. The watch over it ends when it is.
PATIENT = "60s"
REASON = "could not be confirmed over a new login"
NOBODYS = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA nobody\n"


def declare_keys(fleet: Fleet, content: str, within: str) -> None:
    """The account's own keys: what is wrong there shows with the next login."""
    entry = {"name": "keys", "nodes": "all", "dest": "~/.ssh/authorized_keys", "content": content,
             "confirm_within": within}  # fmt: skip
    fleet.declare({"wrappers": [entry]})


def watches(node: Node) -> list[str]:
    """Processes of steps that are still there, whoever's."""
    rows = node.run("pgrep -a python3", check=False).stdout.splitlines()
    return [row for row in rows if "-I -S -" in row]


def check_nothing_is_held(node: Node, user: str = "agent") -> None:
    """The watch is gone, and so is the node's lock; new logins work."""
    wait_for(lambda: not watches(node), "the watch ended")
    node.run("flock -n ~/.local/state/reconciler/lock true", user=user)
    assert node.ssh("echo in").stdout == "in\n"


def test_keys_that_let_nobody_in_are_undone_and_good_ones_stay(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    old = text(node, KEYS)
    declare_keys(fleet, NOBODYS, "8s")
    answer = fleet.once()
    assert (answer.code, answer.outcomes) == (3, {KEY: "rolled_back"}), answer.out
    assert REASON in last_event(fleet, KEY)["details"]["reason"]
    assert stories(fleet) == {KEY: ["detected", "fixing", "rolled_back"]}
    assert text(node, KEYS) == old
    check_nothing_is_held(node)

    declare_keys(fleet, f"{old}# and a comment\n", PATIENT)
    assert fleet.once().outcomes == {KEY: "fixed"}
    check_nothing_is_held(node)
    assert text(node, KEYS) == f"{old}# and a comment\n"
    check_quiet(fleet)


def test_login_daemon_and_its_file_are_undone_together(nodes: Pool, fleet: Fleet) -> None:
    """The file alone does no harm until the daemon is restarted: a new login has to show what both lead to."""
    (node,) = nodes(1)
    node.run("systemctl restart ssh")
    lock = {"name": "lock", "nodes": "all", "dest": "/etc/ssh/sshd_config.d/50-lock.conf",
            "content": "AllowUsers nobody\n", "allow_become": True, "confirm_within": "8s"}  # fmt: skip
    daemon = {"name": "ssh", "nodes": "all", "allow_become": True, "confirm_within": "8s", "settle": 0.3,
              "restart_on": ["/etc/ssh/sshd_config.d/50-lock.conf"]}  # fmt: skip
    quick = {"retry_interval": "1s", "max_attempts": 2}
    fleet.declare({"defaults": quick, "wrappers": [lock], "services": [daemon]})
    answer = fleet.once()
    assert answer.code == 3, answer.out
    assert answer.outcomes == {"node-1/wrapper/lock": "rolled_back", "node-1/service/ssh": "rolled_back"}
    for key in answer.outcomes:
        assert REASON in last_event(fleet, key)["details"]["reason"]
    assert text(node, "/etc/ssh/sshd_config.d/50-lock.conf") == ""
    check_nothing_is_held(node, "root")
    assert text(node, "/root/.local/state/reconciler/epoch") != ""
    check_settled(fleet)

    patient = {"confirm_within": PATIENT}
    good = {**lock, **patient, "content": "AllowUsers agent\n"}
    fleet.declare({"defaults": quick, "wrappers": [good], "services": [{**daemon, **patient}]})
    answer = fleet.once()
    assert answer.code == 0, answer.out
    assert set(answer.outcomes.values()) == {"fixed"}
    assert len(answer.outcomes) == 2
    check_nothing_is_held(node, "root")
    assert alert_files(fleet) == []
    assert text(node, "/etc/ssh/sshd_config.d/50-lock.conf") == "AllowUsers agent\n"
    check_quiet(fleet)


@pytest.mark.parametrize("within", ["3s", "3m"], ids=["after-the-undo", "before-the-undo"])
def test_controller_killed_between_apply_and_confirmation(nodes: Pool, fleet: Fleet, within: str) -> None:
    """The node does not wait for it; a pass that comes before the undo confirms, one that comes later begins anew."""
    (node,) = nodes(1)
    old = text(node, KEYS)
    new = f"{old}# new\n"
    declare_keys(fleet, new, within)
    argv, env = fleet.command("--once", "--output", "json")
    done = subprocess.run(
        argv, env={**env, "RECONCILER_FAILPOINT": "applied"}, cwd=fleet.directory, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == -9, done.stdout + done.stderr
    if within == "3s":
        wait_for(lambda: text(node, KEYS) == old, "the node undid it")
        check_nothing_is_held(node)
        declare_keys(fleet, new, PATIENT)
    else:
        assert text(node, KEYS) == new
        assert watches(node)
    answer = fleet.once()
    assert (answer.code, answer.outcomes) == (0, {KEY: "fixed"}), answer.out
    assert stories(fleet) == {KEY: ["detected", "fixing", "fixed"]}
    check_nothing_is_held(node)
    record = node.run("cat ~/.local/state/reconciler/journal/*/*.json", user="agent").stdout
    assert '"state": "confirmed"' in record
    assert text(node, KEYS) == new
    check_quiet(fleet)
