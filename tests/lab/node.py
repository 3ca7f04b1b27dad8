"""One node: a systemd of its own in an overlay over the base, its sshd on a port of the loopback range."""

import json
import os
import socket
import stat
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from tests.lab import trees
from tests.lab.cgroups import Group
from tests.lab.host import LabError, call, port_is_free, remove_tree

AGENT = "agent"
BOOT_DEADLINE = 60.0
STOP_DEADLINE = 15.0
POWEROFF_SIGNAL = "-RTMIN+4"  # systemd(1): start poweroff.target
REBOOT_STATUS = 133  # systemd-nspawn under --keep-unit asks its caller to start it again
# Run by sh: the overlay is mounted in a mount namespace of the node, so none is left behind by any death.
BOOT = f"""
mount -t overlay lab -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root" || exit 1
shift 2
while :; do "$@"; [ $? = {REBOOT_STATUS} ] || exit; done
"""
SSHD = """\
Port {port}
ListenAddress {listen}
UseDNS no
MaxStartups 1000:30:2000
HostKey /etc/ssh/ssh_host_ed25519_key
# Heard everywhere (aliases need that), answered on the loopback range only.
Match LocalAddress *,!127.0.0.0/8
    DenyUsers *
"""
AS_USER = 'export XDG_RUNTIME_DIR="/run/user/$(id -u)"; cd "$HOME" && exec bash -c "$0"'
WRITE = r"""
import os, pwd, sys
path, mode, owner = sys.argv[1], int(sys.argv[2], 8), pwd.getpwnam(sys.argv[3])
missing, parent = [], os.path.dirname(path)
while not os.path.isdir(parent):
    missing.append(parent)
    parent = os.path.dirname(parent)
for parent in reversed(missing):
    os.mkdir(parent, 0o755)
    os.chown(parent, owner.pw_uid, owner.pw_gid)
with open(path, "wb") as handle:
    handle.write(sys.stdin.buffer.read())
os.chown(path, owner.pw_uid, owner.pw_gid)
os.chmod(path, mode)
"""


@dataclass(frozen=True)
class Keys:
    """The lab's key pair (`private`, and `private`.pub), its known hosts, and each node's host key."""

    directory: Path

    @property
    def private(self) -> Path:
        """The key that opens every node, for root and the agent."""
        return self.directory / "key"

    @property
    def public(self) -> Path:
        """Its public half, in every node's authorized_keys."""
        return self.directory / "key.pub"

    @property
    def known_hosts(self) -> Path:
        """The nodes' host keys, each for its port on the whole loopback range."""
        return self.directory / "known_hosts"

    def host(self, name: str) -> Path:
        """A node's own host key; outlives resets."""
        return self.directory / "hosts" / name

    def ssh_options(self) -> list[str]:
        """Nothing of the person's or machine's own ssh configuration takes part."""
        settings = {
            "UserKnownHostsFile": self.known_hosts,
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "IdentitiesOnly": "yes",
        }
        return [
            "-F",
            "/dev/null",
            *(word for key, value in settings.items() for word in ("-o", f"{key}={value}")),
        ]

    def make(self, path: Path, comment: str) -> None:
        """Make a key pair where there is none."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path])


class Node:
    """A node of the lab; its state is read from the kernel each time, so any process can take it up again."""

    address = "127.0.0.1"
    user = AGENT

    def __init__(self, name: str, port: int, directory: Path, base: Path, group: Group) -> None:
        self.name = name
        self.port = port
        self.directory = directory
        self.base = base
        self.group = group
        self.keys = Keys(directory.parent.parent / "keys")
        self.machine = f"{name[:40]}-{group.unified.parent.name}"

    def __repr__(self) -> str:
        return f"Node({self.name!r}, {self.address}:{self.port}, {self.state})"

    # -- state ---------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """stopped, paused or running (which includes: booting, cut)."""
        if not self.group.populated:
            return "stopped"
        return "paused" if self.group.frozen else "running"

    @property
    def heard_everywhere(self) -> bool:
        """Whether sshd listens for aliases too; see hear_everywhere."""
        return (self.directory / "everywhere").exists()

    def start(self, *, deadline: float = BOOT_DEADLINE) -> None:
        """Boot on the overlay as it is, and return when sshd answers and systemd has finished starting."""
        self.launch()
        self.wait_ready(deadline)

    def launch(self) -> None:
        """Begin to boot; see start."""
        if self.state != "stopped":
            raise LabError(f"{self.name} is {self.state}, not stopped")
        if not port_is_free(self.port):
            raise LabError(f"port {self.port} for {self.name} is taken by another program")
        self._prepare()
        nspawn = [
            *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--settings=no", "--boot"),
            *("--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=pipe"),
            *(f"--machine={self.machine}", f"--hostname={self.name}", f"--directory={self.directory}/root"),
        ]
        isolated = ["unshare", "--mount", "sh", "-c", BOOT, "sh", str(self.base), str(self.directory)]
        self._detach([*isolated, *nspawn])

    def wait_ready(self, deadline: float = BOOT_DEADLINE) -> None:
        """Return when systemd, the agent's user manager and sshd are up; LabError says which one is not."""
        until = time.monotonic() + deadline
        while self.group.init() is None or not self._systemd_listens():
            if time.monotonic() > until or not self.group.populated:
                raise LabError(f"{self.name} did not boot: {self._last_words()}")
            time.sleep(0.02)
        remaining = max(1.0, until - time.monotonic())
        state = self.run("systemctl is-system-running --wait", check=False, deadline=remaining).stdout.strip()
        # Degraded is what a test's own broken service makes of a node when it boots again.
        if state not in {"running", "degraded"}:
            failed = self.run("systemctl list-units --failed --plain --no-legend", check=False).stdout
            raise LabError(f"{self.name} is {state}: {failed.strip() or self._last_words()}")
        self.run(f"systemctl start user@$(id -u {AGENT}).service", deadline=remaining)
        if not self.answers(timeout=remaining):
            raise LabError(f"{self.name}: no sshd answers on port {self.port}")

    def stop(self) -> None:
        """Power off in order, as quickly as the node's services let it; killed after 15 s."""
        init = self.group.init()
        if init is not None and not self.group.frozen:
            call(["kill", POWEROFF_SIGNAL, str(init)])
            self.group.wait_empty(STOP_DEADLINE)
        self.kill()

    def kill(self) -> None:
        """Take the power away: every process of the node, paused or not, is gone on return."""
        self.group.kill()

    def pause(self) -> None:
        """Freeze every process: connections are still accepted (by the kernel) and never answered."""
        if self.state != "running":
            raise LabError(f"{self.name} is {self.state}, not running")
        self.group.freeze(wanted=True)

    def resume(self) -> None:
        """Let a paused node go on where it was; harmless on one that runs."""
        self.group.freeze(wanted=False)

    def reset(self) -> None:
        """Throw away everything written since the first boot and boot afresh; keeps port and host key."""
        self.kill()
        self.discard()
        self.start()

    def discard(self) -> None:
        """Throw the stopped node's overlay away."""
        if self.state != "stopped":
            raise LabError(f"{self.name} is {self.state}, not stopped")
        for part in ("upper", "work", "root"):
            remove_tree(self.directory / part)

    def cut(self) -> None:
        """Make the node unreachable: new connections are refused and open ones, masters' too, are dead.

        As after a cable is pulled, what the sessions had started goes on.
        """
        self.run("systemctl stop ssh.service; pkill -KILL -x sshd; true")

    def uncut(self) -> None:
        """Make a cut node reachable again."""
        self.run("systemctl start ssh.service")

    def hear_everywhere(self) -> None:
        """Let sshd answer on the whole loopback range; survives a reset."""
        if self.heard_everywhere:
            return
        (self.directory / "everywhere").touch()
        self.write("/etc/ssh/sshd_config.d/10-lab.conf", self._sshd(), mode="0644")
        self.run("systemctl restart ssh.service")

    # -- inside --------------------------------------------------------------------------------

    def run(
        self, command: str, *, user: str = "root", check: bool = True, deadline: float = 60.0, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a bash command line inside, without ssh: works on a cut node too, not on a paused one.

        Its processes belong to the node: they are paused and killed with it. LabError when it fails
        (unless `check` is false) or exceeds the deadline.
        """
        if self.group.frozen:
            raise LabError(f"{self.name} is paused: nothing runs on it")
        home = "/root" if user == "root" else f"/home/{user}"
        identity = [f"HOME={home}", f"USER={user}", f"LOGNAME={user}", "SHELL=/bin/bash", "LANG=C.UTF-8"]
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        inside = [*become, "env", "-i", *identity, path, "bash", "-c", AS_USER, command]
        enter = [*self.group.enter("run"), "nsenter", "-t", self._init(), "--all", "--root", "--wd"]
        try:
            done = subprocess.run(
                [*enter, *inside], input=stdin, capture_output=True, text=True, timeout=deadline, check=False
            )
        except subprocess.TimeoutExpired as late:
            raise LabError(f"{self.name}: {command!r} did not finish within {deadline:g} s") from late
        if check and done.returncode != 0:
            raise LabError(
                f"{self.name}: {command!r} failed ({done.returncode}): {done.stderr or done.stdout}"
            )
        return done

    def ssh(
        self, command: str, *, user: str = AGENT, check: bool = True, deadline: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command over a new ssh connection; LabError as for run, also when the node hangs."""
        argv = [*self.ssh_command(user), "-o", "BatchMode=yes", "-n", command]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=deadline, check=False)
        except subprocess.TimeoutExpired as late:
            raise LabError(f"{self.name}: ssh did not answer within {deadline:g} s") from late
        if check and done.returncode != 0:
            raise LabError(f"{self.name}: ssh {command!r} failed ({done.returncode}): {done.stderr}")
        return done

    def ssh_command(self, user: str = AGENT) -> list[str]:
        """The start of an ssh command line to this node."""
        login = ["-i", str(self.keys.private), "-p", str(self.port), f"{user}@{self.address}"]
        return ["ssh", *self.keys.ssh_options(), *login]

    def answers(self, timeout: float = 2.0) -> bool:
        """Whether an sshd greets within the time: false for stopped, cut and paused nodes alike."""
        try:
            with socket.create_connection((self.address, self.port), timeout) as connection:
                connection.settimeout(timeout)
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def read(self, path: str) -> bytes:
        """A file's contents; works on a paused node too."""
        return self._file_access(["cat", "--", path])

    def write(self, path: str, content: str | bytes, *, mode: str = "0644", owner: str = "root") -> None:
        """Write a file in place, with missing directories (the owner's, 0755); works on a paused node too."""
        data = content.encode() if isinstance(content, str) else content
        self._file_access(["python3", "-I", "-S", "-c", WRITE, path, mode, owner], data)

    def tree(self, *paths: str, without: tuple[str, ...] = ()) -> trees.Tree:
        """Every path at and below the given ones, absent ones left out; works on a paused node too."""
        request = json.dumps([paths, without])
        return trees.parse(self._file_access(["python3", "-I", "-S", "-c", trees.SCRIPT, request]).decode())

    # -- private -------------------------------------------------------------------------------

    def _init(self) -> str:
        if (init := self.group.init()) is None:
            raise LabError(f"{self.name} is not running")
        return str(init)

    def _file_access(self, command: list[str], data: bytes = b"") -> bytes:
        """Only the node's files, none of its control groups: that is what works while it is frozen."""
        enter = ["nsenter", "-t", self._init(), "--mount", "--root", "--wd"]
        try:
            done = subprocess.run(
                [*enter, *command], input=data, capture_output=True, timeout=60, check=False
            )
        except subprocess.TimeoutExpired as late:
            raise LabError(f"{self.name}: {command[0]} did not finish within 60 s") from late
        if done.returncode != 0:
            raise LabError(f"{self.name}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout

    def _detach(self, command: list[str]) -> None:
        """Start it in the node's group and a session of its own: neither our end nor Ctrl-C ends it."""
        with (self.directory / "console.log").open("ab") as console:
            try:
                subprocess.run(
                    [*self.group.enter(), "setsid", "--fork", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    env={"PATH": os.environ.get("PATH", os.defpath), "SYSTEMD_NSPAWN_LOCK": "0"},
                    cwd="/",
                    timeout=10,
                    check=True,
                )
            except subprocess.SubprocessError as error:
                raise LabError(f"{self.name} could not be started: {self._last_words()}") from error

    def _systemd_listens(self) -> bool:
        """Whether systemctl would find somebody to talk to."""
        return Path(f"/proc/{self.group.init()}/root/run/systemd/private").exists()

    def _last_words(self) -> str:
        log = self.directory / "console.log"
        return (
            " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:])
            if log.exists()
            else "no output"
        )

    def _sshd(self) -> str:
        return SSHD.format(port=self.port, listen="0.0.0.0" if self.heard_everywhere else self.address)

    def _prepare(self) -> None:
        """What must differ between nodes and be there before the first boot, in a fresh overlay."""
        self.group.create()
        upper = self.directory / "upper"
        if upper.exists():
            return
        for part in ("upper", "work", "root"):
            (self.directory / part).mkdir(parents=True)
        authorized = self.keys.public.read_text()
        host_key = self.keys.host(self.name)
        # The same after a reset: it is the same machine. None at all would make ssh.socket take port 22.
        self._seed("etc/machine-id", uuid.uuid5(uuid.NAMESPACE_DNS, self.machine).hex + "\n", 0o444)
        self._seed("etc/hostname", f"{self.name}\n")
        self._seed("etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n::1 localhost ip6-localhost\n")
        self._seed("etc/ssh/sshd_config.d/10-lab.conf", self._sshd())
        self._seed("etc/ssh/ssh_host_ed25519_key", host_key.read_text(), 0o600)
        self._seed("etc/ssh/ssh_host_ed25519_key.pub", host_key.with_name(f"{self.name}.pub").read_text())
        self._seed("root/.ssh/authorized_keys", authorized, 0o600)
        self._seed("home/agent/.ssh/authorized_keys", authorized, 0o600)

    def _seed(self, name: str, text: str, mode: int = 0o644) -> None:
        """Put a file into the overlay from outside; directories are as in the base, new ones private."""
        upper, owner = self.directory / "upper", self.base
        for parent in reversed(Path(name).parents):
            below = self.base / parent
            owner = below if below.exists() else owner
            there = upper / parent
            if not there.exists():
                there.mkdir()
            seen = owner.stat()
            there.chmod(stat.S_IMODE(seen.st_mode) if below.exists() else 0o700)
            os.chown(there, seen.st_uid, seen.st_gid)
        path, seen = upper / name, owner.stat()
        path.write_text(text)
        path.chmod(mode)
        os.chown(path, seen.st_uid, seen.st_gid)
