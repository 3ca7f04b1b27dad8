"""The lab keeps its promises: real nodes, real failures, and nothing left behind."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lab import Lab, LabError, Node, rootfs
from tests.lab import host as lab_host
from tests.lab.host import port_is_free
from tests.nodes.conftest import Pool, refuse, sweep_crashed

HEALTHY = 15.0  # seconds within which a healthy node answers ssh, also on a busy machine
HANGING = 2.0  # after which we take a node for a hanging one; a healthy one takes a quarter of a second
CONFIGURED = ("/etc", "/home", "/root", "/opt", "/usr/local", "/var/lib/systemd/linger")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "lab"


def without_times(node: Node) -> dict[str, tuple[object, ...]]:
    return {path: entry._replace(mtime_ns=0) for path, entry in node.tree(*CONFIGURED).items()}


def processes(lab: Lab) -> dict[int, str]:
    """The nodes' processes, each with its start time: a PID's next owner is not taken for it."""
    return {pid: started(pid) for node in lab for pid in node.group.pids()}


def started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[19]
    except OSError:
        return "gone"


def assert_no_trace(directory: Path, seen: dict[int, str], groups: list[Path]) -> None:
    deadline = time.monotonic() + 5  # for the machine's PID 1 to bury the dead
    while left := [pid for pid, when in seen.items() if started(pid) == when]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()
    assert [path for path in groups if path.exists()] == []
    assert not directory.exists()
    assert not list(Path("/run/systemd/nspawn/propagate").glob(f"*-{groups[0].name}"))


# -- a node is a real machine ----------------------------------------------------------------------


def test_nodes_run_systemd_and_a_user_manager(nodes: Pool) -> None:
    for node in nodes(3):
        assert node.run("systemctl is-system-running").stdout.strip() == "running"
        assert node.run("systemctl --user is-system-running", user="agent").stdout.strip() == "running"
        assert node.run("hostname").stdout.strip() == node.name


def test_ssh_reaches_the_agent_and_root(nodes: Pool) -> None:
    (node,) = nodes(1)
    assert node.ssh("id -un; id -u").stdout.split() == ["agent", "1000"]
    assert node.ssh("id -un", user="root").stdout.strip() == "root"
    assert node.ssh("sudo -n id -u").stdout.strip() == "0"


def test_the_agent_has_user_services_over_ssh(nodes: Pool) -> None:
    (node,) = nodes(1)
    node.ssh("systemd-run --user --unit demo sleep 600")
    assert node.ssh("systemctl --user is-active demo").stdout.strip() == "active"
    assert node.ssh("echo $XDG_RUNTIME_DIR").stdout.strip() == "/run/user/1000"


def test_packages_install_without_the_network(nodes: Pool) -> None:
    (node,) = nodes(1)
    node.write("/home/agent/demo-1.0-py3-none-any.whl", make_wheel(), owner="agent")
    node.write("/home/agent/demo-1.0.0.tgz", make_npm_tarball(), owner="agent")
    node.ssh("python3 -m venv env && env/bin/pip install --quiet --no-index ./demo-1.0-py3-none-any.whl")
    assert node.ssh("env/bin/python -c 'import demo; print(demo.ANSWER)'").stdout.strip() == "42"
    node.ssh("npm install --offline --global --prefix ~/.local ./demo-1.0.0.tgz", deadline=60)
    assert node.ssh("~/.local/bin/demo").stdout.strip() == "hello"


def make_wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("demo.py", "ANSWER = 42\n")
        wheel.writestr("demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
        wheel.writestr(
            "demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("demo-1.0.dist-info/RECORD", "demo.py,,\n")
    return buffer.getvalue()


def make_npm_tarball() -> bytes:
    files = {
        "package/package.json": b'{"name": "demo", "version": "1.0.0", "bin": {"demo": "demo.js"}}',
        "package/demo.js": b"#!/usr/bin/env node\nconsole.log('hello')\n",
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_ansible_reaches_the_nodes_taken(nodes: Pool, inventory: Path) -> None:
    nodes(2)
    ansible = Path(sys.executable).with_name("ansible")
    command = [str(ansible), "fleet", "-i", str(inventory), "-m", "ansible.builtin.ping", "--one-line"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.count("SUCCESS") == 2


def test_a_node_survives_a_reboot_from_inside(nodes: Pool) -> None:
    (node,) = nodes(1)
    node.write("/etc/kept", "yes")
    before = node.group.init()
    node.ssh("sudo systemctl reboot", check=False)
    deadline = time.monotonic() + 20
    while node.group.init() in {before, None}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    node.wait_ready()
    assert node.read("/etc/kept") == b"yes"


# -- failures --------------------------------------------------------------------------------------


def test_a_paused_node_hangs_until_resumed(nodes: Pool) -> None:
    (node,) = nodes(1)
    node.pause()
    assert node.state == "paused"
    with pytest.raises(LabError, match="did not answer"):
        node.ssh("true", deadline=HANGING)
    node.resume()
    node.ssh("true", deadline=HEALTHY)


def test_files_of_a_paused_node_can_be_seen_and_changed(nodes: Pool) -> None:
    (node,) = nodes(1)
    node.pause()
    node.write("/etc/seen", "x")
    assert node.read("/etc/seen") == b"x"
    assert "/etc/seen" in node.tree("/etc")
    with pytest.raises(LabError, match="paused"):
        node.run("true")


def test_pausing_stops_what_was_started_through_the_lab(nodes: Pool) -> None:
    (node,) = nodes(1)
    node.run("date > /run/ticks; (while :; do date +%N > /run/ticks; sleep 0.05; done) > /dev/null 2>&1 &")
    node.pause()
    frozen_at = node.read("/run/ticks")
    time.sleep(0.3)
    assert node.read("/run/ticks") == frozen_at


def test_a_cut_node_refuses_even_through_an_open_master(nodes: Pool, tmp_path: Path) -> None:
    (node,) = nodes(1)
    socket = tmp_path / "s"
    through = ["-o", f"ControlPath={socket}", "-o", "BatchMode=yes", "-o", "ControlMaster=no"]
    master = [*node.ssh_command(), "-o", f"ControlPath={socket}", "-M", "-N", "-f", "-o", "ControlPersist=60"]
    subprocess.run(master, timeout=10, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run([*node.ssh_command(), *through, "true"], timeout=10, check=True)
    node.run("sleep 600 > /dev/null 2>&1 &", user="agent")
    node.cut()
    failed = subprocess.run(
        [*node.ssh_command(), *through, "true"], timeout=10, capture_output=True, check=False
    )
    assert failed.returncode == 255
    assert not node.answers()
    assert node.run("pgrep -x sleep").stdout.strip(), "what ran on the node goes on"
    node.uncut()
    node.ssh("true", deadline=HEALTHY)


def test_a_stopped_node_keeps_its_files(nodes: Pool) -> None:
    (node,) = nodes(1)
    node.write("/home/agent/deep/note", "kept\n", mode="0600", owner="agent")
    node.stop()
    assert node.state == "stopped"
    assert not node.answers()
    node.start()
    assert node.ssh("cat deep/note; stat -c '%a %U' deep/note").stdout.split() == ["kept", "600", "agent"]


def test_a_node_with_a_broken_service_boots_all_the_same(nodes: Pool) -> None:
    (node,) = nodes(1)
    unit = "[Service]\nExecStart=/bin/false\n[Install]\nWantedBy=multi-user.target\n"
    node.write("/etc/systemd/system/broken.service", unit)
    node.run("systemctl enable broken.service")
    node.stop()
    node.start()
    assert node.run("systemctl is-failed broken.service").stdout.strip() == "failed"


def test_a_node_killed_while_paused_boots_again(nodes: Pool) -> None:
    (node,) = nodes(1)
    node.pause()
    node.kill()
    node.start()
    node.ssh("true", deadline=HEALTHY)


# -- files -----------------------------------------------------------------------------------------


def test_reset_gives_the_same_clean_node(nodes: Pool) -> None:
    (node,) = nodes(1)
    clean = without_times(node)
    node.run("echo x > /etc/x; rm -r /etc/cron.d; useradd other; systemctl mask dbus.socket")
    assert without_times(node) != clean
    begin = time.monotonic()
    node.reset()
    assert time.monotonic() - begin < 10
    assert without_times(node) == clean


@pytest.mark.parametrize(
    "change",
    [
        "echo more >> /opt/t/file",
        "chmod 600 /opt/t/file",
        "chown agent /opt/t/file",
        "touch -d @1 /opt/t/file",
        "ln -sfn /tmp /opt/t/link",
        "rm /opt/t/file",
        "mkdir /opt/t/new",
        "mkfifo /opt/t/pipe",
    ],
)
def test_tree_sees_a_change(nodes: Pool, pool: Pool, change: str) -> None:
    node = next(iter(pool.lab), None) or nodes(1)[0]
    node.run("rm -rf /opt/t; mkdir /opt/t; echo one > /opt/t/file; ln -s /etc /opt/t/link")
    before = node.tree("/opt/t")
    assert node.tree("/opt/t") == before
    assert before["/opt/t/link"].target == "/etc"
    node.run(change)
    assert node.tree("/opt/t") != before


# -- scale -----------------------------------------------------------------------------------------


def test_aliases_answer_at_their_own_addresses(nodes: Pool, lab: Lab) -> None:
    (node,) = nodes(1)
    aliases = lab.aliases(node, 300)
    assert len({alias["ansible_host"] for alias in aliases.values()}) == 300
    node.reset()
    last = str(list(aliases.values())[-1]["ansible_host"])
    assert last.startswith("127.")
    command = [*node.ssh_command()[:-1], f"agent@{last}", "hostname"]
    assert (
        subprocess.run(command, timeout=10, capture_output=True, text=True, check=True).stdout.strip()
        == node.name
    )


def test_a_node_heard_everywhere_lets_in_the_loopback_range_only(nodes: Pool, lab: Lab) -> None:
    (node,) = nodes(1)
    lab.aliases(node, 1)
    seen_from = "sshd -T -C user=agent,host=h,addr=192.0.2.1,lport=1,laddr={} | grep -i ^denyusers; true"
    assert node.run(seen_from.format("127.77.0.2")).stdout == ""
    assert node.run(seen_from.format("192.0.2.2")).stdout == "denyusers *\n"


# -- nothing is left -------------------------------------------------------------------------------


def test_leaving_removes_every_trace(directory: Path) -> None:
    with Lab(["a", "b"], directory) as lab:
        lab["a"].run("setsid sleep 600 > /dev/null 2>&1 &")
        lab["b"].pause()
        seen, groups, port = processes(lab), lab._parents, lab["a"].port
        assert len(seen) > 10
    assert_no_trace(directory, seen, groups)
    assert port_is_free(port)


def test_an_error_inside_removes_every_trace(directory: Path) -> None:
    seen: dict[int, str] = {}
    lab = Lab(["a"], directory)
    with contextlib.suppress(ZeroDivisionError), lab:
        seen |= processes(lab)
        raise ZeroDivisionError
    assert seen
    assert_no_trace(directory, seen, lab._parents)


def test_a_taken_port_is_named_and_leaves_no_trace(directory: Path, nodes: Pool) -> None:
    (node,) = nodes(1)
    other = Lab(["a"], directory, first_port=node.port)
    with pytest.raises(LabError, match=str(node.port)):
        other.up()
    assert_no_trace(directory, {}, other._parents)


PROGRAM = """
import sys, time
from pathlib import Path
from tests.lab import Lab
with Lab(["a"], Path(sys.argv[1])) as lab:
    print("up", flush=True)
    time.sleep(600)
"""


def start_program(directory: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(directory)]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout is not None
    assert program.stdout.readline() == "up\n"
    return program


def end_program(program: subprocess.Popen[str], how: signal.Signals) -> None:
    program.send_signal(how)
    program.communicate(timeout=30)


def test_ctrl_c_removes_every_trace(directory: Path) -> None:
    program = start_program(directory)
    lab = Lab.attach(directory)
    seen = processes(lab)
    end_program(program, signal.SIGINT)
    assert_no_trace(directory, seen, lab._parents)


def test_a_killed_run_is_swept(directory: Path) -> None:
    program = start_program(directory)
    lab = Lab.attach(directory)
    seen = processes(lab)
    end_program(program, signal.SIGKILL)
    assert lab["a"].answers(), "a lab does not die with its program"
    assert Lab.sweep(directory)
    assert_no_trace(directory, seen, lab._parents)
    assert not Lab.sweep(directory)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_end_in_the_middle_of_booting_leaves_nothing_unknown(directory: Path, how: signal.Signals) -> None:
    many = PROGRAM.replace('["a"]', 'list("abcdefgh")')
    program = subprocess.Popen(
        [sys.executable, "-c", many, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (directory / "nodes" / "c").exists():
        assert program.poll() is None
        time.sleep(0.01)
    lab = Lab.attach(directory)
    end_program(program, how)
    assert Lab.sweep(directory) == (how == signal.SIGKILL)
    assert_no_trace(directory, {}, lab._parents)


def test_a_living_programs_lab_is_left_alone(directory: Path) -> None:
    program = start_program(directory)
    try:
        with pytest.raises(LabError, match="living program"):
            Lab.sweep(directory)
        sweep_crashed(directory.parent)
        assert Lab.attach(directory)["a"].answers()
    finally:
        end_program(program, signal.SIGINT)


def test_a_strangers_directory_is_never_removed(directory: Path) -> None:
    directory.mkdir()
    (directory / "thesis.txt").write_text("years of work")
    with pytest.raises(LabError, match="choose another directory"):
        Lab(["a"], directory).up()
    assert (directory / "thesis.txt").read_text() == "years of work"


# -- the command -----------------------------------------------------------------------------------


def lab_command(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.lab", words[0], "--directory", str(directory), *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_keeps_a_lab_between_calls(directory: Path) -> None:
    try:
        assert lab_command(directory, "up", "--nodes", "a,b").returncode == 0
        assert lab_command(directory, "ssh", "a", "hostname").stdout.strip() == "a"
        assert lab_command(directory, "pause", "a").returncode == 0
        assert lab_command(directory, "cut", "b").returncode == 0
        states = lab_command(directory, "status").stdout
        assert "paused" in states
        assert states.count("does not answer") == 2
        assert lab_command(directory, "reset", "a").returncode == 0
        again = lab_command(directory, "up")
        assert (again.returncode, "already up" in again.stderr) == (1, True)
    finally:
        down = lab_command(directory, "down")
    assert down.returncode == 0
    assert not directory.exists()


def test_the_command_says_what_is_wrong(directory: Path) -> None:
    for words in (["status"], ["down"], ["ssh", "a"]):
        done = lab_command(directory, *words)
        assert done.returncode == 1
        assert done.stderr == f"lab: no lab is up in {directory}\n"


# -- what it needs ---------------------------------------------------------------------------------


def test_missing_programs_are_named_by_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    said = " ".join(lab_host.problems())
    assert "root" in said
    assert "debootstrap" in said
    assert "systemd-container" in said


def test_only_an_automatic_run_fails_where_nodes_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no root"):
        refuse(["no root"])
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no root"):
        refuse(["no root"])


def test_two_builders_build_once_and_half_builds_are_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built: list[Path] = []

    def build(root: Path, _: object) -> None:
        root.mkdir()  # raises if what a killed builder left were still there
        time.sleep(0.3)
        built.append(root)

    monkeypatch.setattr(rootfs, "_build", build)
    name = rootfs.ensure_base(tmp_path / "probe").name
    (tmp_path / f"{name}.building" / "usr").mkdir(parents=True)
    with ThreadPoolExecutor(2) as builders:
        bases = list(builders.map(rootfs.ensure_base, [tmp_path, tmp_path]))
    assert bases == [tmp_path / name] * 2
    assert len(built) == 2  # the probe's, and one for the two
