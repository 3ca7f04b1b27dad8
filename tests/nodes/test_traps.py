"""What fools plain configuration management: each of these happened on real machines."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.nodes.conftest import Pool
from tests.nodes.fleet import WATCHER, Fleet
from tests.nodes.safety import wait_for
from tests.nodes.test_fleet import everything


def test_a_hung_control_master_is_stepped_around_and_replaced(nodes: Pool, fleet: Fleet) -> None:
    taken = nodes(2)
    fleet.declare(everything(fleet))
    fleet.once()
    masters = fleet.masters()
    assert len(masters) == 2
    os.kill(masters[0], signal.SIGSTOP)
    for node in taken:
        node.run("rm ~/odd.txt", user="agent")
    seen = fleet.check()
    assert seen.code == 2
    assert [change["observed"] for row in seen.report["drifts"] for change in row["changes"]].count(
        "hung"
    ) == 1
    answer = fleet.once()
    assert answer.code == 0, answer.out
    assert sum(row["kind"] == "ssh" for row in answer.report["outcomes"]) == 1
    assert sum(row["kind"] == "wrapper" for row in answer.report["outcomes"]) == 2
    assert masters[0] not in fleet.masters()
    assert len(fleet.masters()) == 2
    assert fleet.once().report["drifts"] == []


def note_ssh(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says what ssh is started with from now on."""
    log, ssh = place / "ssh.log", place / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {shutil.which("ssh")} "$@"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    return log


def test_an_open_master_is_used_without_starting_ssh(
    nodes: Pool, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For looks; where the server allows it no further session, ssh logs in as it always did. Steps go through ssh."""
    taken = nodes(2)
    log = note_ssh(tmp_path, monkeypatch)
    for node in taken:
        node.run("echo 'MaxSessions 1' > /etc/ssh/sshd_config.d/00-few.conf && systemctl reload ssh")
    time.sleep(0.5)
    state = everything(fleet)
    del state["ssh"]
    fleet.declare(state)
    assert fleet.once().code == 0
    assert log.read_text(), "somebody has to log in"
    log.unlink()
    assert fleet.once().report["drifts"] == []
    assert not log.exists(), log.read_text()
    taken[0].run("rm ~/odd.txt", user="agent")
    assert set(fleet.once().outcomes.values()) == {"fixed"}
    assert log.exists(), "a step may need an agent that ssh forwards"

    # Somebody else's session over the same master.
    socket = next(path for path in (fleet.runtime / "reconciler-ssh").iterdir() if path.is_socket())
    argv = [shutil.which("ssh") or "ssh", "-F", "/dev/null", "-S", str(socket), "agent@elsewhere", "sleep 60"]
    log.unlink()
    held = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    time.sleep(1)
    assert held.poll() is None
    log.unlink(missing_ok=True)
    answer = fleet.once()
    held.kill()
    held.wait()
    assert (answer.code, answer.report["drifts"]) == (0, []), answer.out
    assert len(log.read_text().splitlines()) == 1, log.read_text()


def test_looks_with_privilege_share_an_open_master_too(
    nodes: Pool, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sudo asks for no password. Where it does, the node is asked by ssh, and says what is missing."""
    one, two = nodes(2)
    log = note_ssh(tmp_path, monkeypatch)
    secret = {"name": "secret", "nodes": "all", "content": "k\n", "dest": "/etc/agent-key", "mode": "0600",
              "owner": "root", "allow_become": True}  # fmt: skip
    plain = {"name": "plain", "nodes": "all", "content": "p\n", "dest": "~/plain"}
    fleet.declare({"wrappers": [secret, plain]})
    assert fleet.once().code == 0
    log.unlink()
    assert fleet.once().report["drifts"] == []
    assert not log.exists(), log.read_text()
    one.run("echo changed > /etc/agent-key")
    found = fleet.check().report
    assert [(row["node"], row["name"]) for row in found["drifts"]] == [("node-1", "secret")]
    assert not log.exists(), log.read_text()
    two.run("rm -f /etc/sudoers.d/*")
    found = fleet.check().report
    assert [(row["node"], row["name"]) for row in found["unknown"]] == [("node-2", "secret")]
    assert "password" in found["unknown"][0]["reason"]
    assert {line.split("Port=")[1].split()[0] for line in log.read_text().splitlines()} == {str(two.port)}


def test_a_master_that_dies_in_the_middle_of_a_look_is_made_good(nodes: Pool, fleet: Fleet) -> None:
    """The node is asked once more, over a new login."""
    (node,) = nodes(1)
    fleet.declare({"tools": [{"name": "slow", "nodes": "all", "command": "slow", "version": ">=1.0"}]})
    slow = "#!/bin/sh\nif [ -e /tmp/wait ]; then rm /tmp/wait; touch /tmp/waits; sleep 8; fi\necho slow 1.2\n"
    node.write("/usr/local/bin/slow", slow, mode="0755")
    assert fleet.once().code == 0
    node.run("touch /tmp/wait; chmod 777 /tmp/wait", user="agent")
    process = fleet.start("--once", "--output", "json")
    wait_for(lambda: node.run("test -e /tmp/waits", check=False).returncode == 0, "it looks", 30)
    (master,) = fleet.masters()
    os.kill(master, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err


def test_a_hung_master_disturbs_nothing_even_where_no_ssh_resource_is_declared(
    nodes: Pool, fleet: Fleet
) -> None:
    (node,) = nodes(1)
    state = everything(fleet)
    del state["ssh"]
    fleet.declare(state)
    fleet.once()
    (master,) = fleet.masters()
    os.kill(master, signal.SIGSTOP)
    node.run("rm ~/odd.txt", user="agent")
    assert fleet.once().outcomes == {"node-1/wrapper/odd": "fixed"}


def test_a_login_that_fails_beside_a_living_session_is_reported(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    fleet.declare({"ssh": [{"nodes": "all", "fresh_login_every": "0s"}]})
    assert fleet.once().code == 0
    node.run("echo 'AllowUsers nobody' > /etc/ssh/sshd_config.d/00-lock.conf && systemctl reload ssh")
    time.sleep(0.5)
    answer = fleet.once()
    assert answer.code == 3
    assert "old session still works" in answer.report["skipped"][0]["reason"]


def test_two_passes_at_once_only_one_runs(nodes: Pool, fleet: Fleet) -> None:
    taken = nodes(4)
    fleet.declare(everything(fleet))
    both = [fleet.start("--once", "--output", "json") for _ in range(2)]
    ended = [(process.communicate(timeout=120), process.returncode) for process in both]
    codes = sorted(code for _out, code in ended)
    assert codes == [0, 1], ended
    refused = next(out for (out, _err), code in ended if code == 1)
    assert "another pass is under way" in refused
    # Each repair was made once: one backup directory, one terminal event per resource.
    terminal = [row["issue_key"] for row in fleet.events() if row["status"] == "fixed"]
    assert len(terminal) == len(set(terminal)) > 0
    for node in taken:
        assert len(node.run("ls ~/.local/state/reconciler/journal", user="agent").stdout.split()) == 1


def test_a_restart_lost_to_a_kill_between_the_unit_file_and_the_restart_is_still_due(
    nodes: Pool, fleet: Fleet
) -> None:
    (node,) = nodes(1)
    fleet.declare(everything(fleet))
    fleet.once()
    old = node.run("systemctl --user show -p MainPID --value task-watcher", user="agent").stdout
    # What a pass killed at the worst moment leaves: the new file is there, nobody was told.
    newer = WATCHER.replace("Description=Watches tasks", "Description=Watches tasks better")
    fleet.file("task-watcher.service", newer)
    node.run(f"cat > ~/.config/systemd/user/task-watcher.service <<'END'\n{newer}END", user="agent")
    assert fleet.once().outcomes == {"node-1/service/task-watcher": "fixed"}
    assert node.run("systemctl --user show -p MainPID --value task-watcher", user="agent").stdout != old
    # The same after a daemon-reload: now only the age of the process tells.
    old = node.run("systemctl --user show -p MainPID --value task-watcher", user="agent").stdout
    newest = newer.replace("better", "best")
    fleet.file("task-watcher.service", newest)
    node.run(
        f"cat > ~/.config/systemd/user/task-watcher.service <<'END'\n{newest}END\nsystemctl --user daemon-reload",
        user="agent",
    )
    assert fleet.once().outcomes == {"node-1/service/task-watcher": "fixed"}
    assert node.run("systemctl --user show -p MainPID --value task-watcher", user="agent").stdout != old
    assert fleet.once().report["drifts"] == []


def test_a_pass_killed_at_random_moments_is_made_good_by_the_next(nodes: Pool, fleet: Fleet) -> None:
    taken = nodes(3)
    fleet.declare(everything(fleet))
    for delay in (1.2, 2.0, 2.8, 3.6, 4.4):
        for node in taken:
            node.run(
                "systemctl --user stop task-watcher; rm -f ~/odd.txt ~/.local/bin/mm; echo x > ~/task-wrapper.sh",
                user="agent",
                check=False,
            )
        process = fleet.start("--once", "--output", "json")
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        deadline = time.monotonic() + 20
        while fleet.ansible() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert fleet.ansible() == [], "Ansible went on without its controller"
        answer = fleet.once()
        assert answer.code == 0, answer.out + answer.err
        assert fleet.once().report["drifts"] == []


def test_a_managed_path_replaced_by_a_link_is_replaced_itself(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    fleet.declare(everything(fleet))
    fleet.once()
    node.run("echo precious > ~/precious; ln -sf ~/precious ~/odd.txt", user="agent")
    assert fleet.once().outcomes == {"node-1/wrapper/odd": "fixed"}
    assert node.read("/home/agent/precious") == b"precious\n"
    assert node.tree("/home/agent/odd.txt")["/home/agent/odd.txt"].type == "file"
    node.run("rm ~/odd.txt; mkdir ~/odd.txt; touch ~/odd.txt/inside", user="agent")
    refused = fleet.once()
    assert refused.code == 3
    assert "/home/agent/odd.txt/inside" in node.tree("/home/agent/odd.txt")


def test_a_full_disk_leaves_the_old_file_whole(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    fleet.declare(
        {
            "wrappers": [
                {
                    "name": "big",
                    "nodes": "all",
                    "content": "small\n",
                    "dest": "~/small/big.conf",
                    "mode": "0640",
                }
            ]
        }
    )
    node.run("mkdir /home/agent/small && mount -t tmpfs -o size=256k,mode=0777 tmpfs /home/agent/small")
    assert fleet.once().code == 0
    node.run("head -c 300000 /dev/zero > ~/small/filler || true", user="agent")
    before = node.tree("/home/agent/small")
    fleet.declare(
        {
            "wrappers": [
                {
                    "name": "big",
                    "nodes": "all",
                    "content": "x" * 100_000,
                    "dest": "~/small/big.conf",
                    "mode": "0640",
                }
            ]
        }
    )
    answer = fleet.once()
    assert answer.code == 3
    assert "No space left" in answer.report["outcomes"][0]["detail"]
    after = node.tree("/home/agent/small")
    assert after["/home/agent/small/big.conf"] == before["/home/agent/small/big.conf"]
    assert set(after) - set(before) <= {p for p in after if p.endswith(".bak")}


def test_a_masked_unit_is_unmasked(nodes: Pool, fleet: Fleet) -> None:
    (node,) = nodes(1)
    fleet.declare(everything(fleet))
    fleet.once()
    node.run("systemctl --user stop task-watcher; rm ~/.config/systemd/user/task-watcher.service;"
             " systemctl --user mask task-watcher", user="agent")  # fmt: skip
    seen = fleet.check().report["planned"][0]["changes"]
    assert {change["observed"] for change in seen} >= {"masked"}
    assert fleet.once().outcomes == {"node-1/service/task-watcher": "fixed"}
    assert node.run("systemctl --user is-active task-watcher", user="agent").stdout.strip() == "active"


def test_ctrl_c_in_the_middle_ends_everything_it_started(nodes: Pool, fleet: Fleet) -> None:
    nodes(3)
    fleet.declare(everything(fleet))
    process = fleet.start("--once")
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "interrupted: what was begun is carried on" in err
    assert "Traceback" not in err
    fleet.check_ended()
    assert fleet.once().code == 0
