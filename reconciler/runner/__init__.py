"""The one door to ansible-runner: runs a playbook in a supervised child and hands on its results.

The child has a session of its own, so that everything Ansible starts can be ended together, and a
private directory (mode 0700) that is deleted afterwards. Desired values travel in request files in it,
never as extra variables: those land on the command line and are templated.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from configparser import ConfigParser, Error
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from reconciler import early, systemd
from reconciler.mailbox import Mailbox
from reconciler.model import RunError
from reconciler.paths import ansible_home, control_sockets, playbook

# -n: never read the terminal. ServerAlive*: a connection whose other end vanished ends within 15 s.
# ControlPersist outlives the usual interval, so that a pass finds its sockets open.
SSH_ARGS = (
    "-o ControlMaster=auto -o ControlPersist=30m -o ConnectTimeout=6 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
    " -o PreferredAuthentications=publickey,keyboard-interactive,password"
)
PREFIX, OWNER = "reconciler-", "owner"
REMOVE_SECONDS = 5.0


@dataclass(frozen=True)
class Result:
    """One task's result on one node: ``status`` is ok, failed or unreachable."""

    node: str
    status: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """How Ansible is run. ``timeout`` and ``idle_timeout`` are seconds for a whole playbook."""

    inventory: Path
    forks: int = 25
    timeout: float = 3600.0
    idle_timeout: float = 1200.0


class Workspace:
    """A private directory for one run, with one request file per node; gone when the run is over."""

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._owner = _locked(self.directory / OWNER)
        self.requests = self.directory / "requests"
        self.requests.mkdir(mode=0o700)
        self.gate = self.directory / "gate"
        self.mailbox = Mailbox(self.directory)
        self._ahead: subprocess.Popen[bytes] | None = None
        self._ahead_of = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._ahead:
            _discard(self._ahead)
            self._ahead = None
        self.mailbox.close()
        _remove(self.directory)
        if self._owner is not None:
            os.close(self._owner)
            self._owner = None

    def start_ahead(self, name: str, settings: Settings) -> None:
        """Start a playbook before its requests are written: it loads everything and then waits for :func:`run`."""
        self._ahead, self._ahead_of = _start(_specification(name, self, settings)), name

    def started(self, name: str) -> subprocess.Popen[bytes] | None:
        """The process that was started ahead for this playbook; None where there is none, or not any more."""
        found, self._ahead = self._ahead, None
        if found is None or (self._ahead_of == name and found.poll() is None):
            return found
        _discard(found)
        return None

    def admit(self, nodes: Sequence[str]) -> None:
        """All requests are written: let plays run, on these nodes."""
        beside = self.gate.with_name("gate.new")
        beside.write_text("\n".join(nodes), encoding="utf-8")
        beside.rename(self.gate)

    def request(self, node: str, content: Any) -> None:
        """Write one node's request, readable by this account only."""
        handle = os.open(self.requests / f"{node}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream)


def _remove(directory: Path) -> None:
    """All of it. Ansible that was ended a moment ago may still be writing there, which spoils a single try."""
    deadline = time.monotonic() + REMOVE_SECONDS
    while True:
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists() or time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _locked(path: Path) -> int | None:
    """The file, locked for the life of this process; None where another process has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@cache
def _sweep(temporary: Path) -> None:
    """Once per process: remove what passes that were killed left behind; request files may hold secrets."""
    for directory in temporary.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if directory.stat().st_uid != os.getuid() or not (directory / OWNER).exists():
                continue
            handle = _locked(directory / OWNER)
            if handle is not None:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(handle)


def run(
    name: str,
    nodes: Sequence[str],
    workspace: Workspace,
    settings: Settings,
    on_result: Callable[[Result], None],
    *,
    become: bool = False,
    one_each: bool = False,
) -> None:
    """Run a playbook on ``nodes``; every result is handed to ``on_result`` as it arrives.

    ``become`` lets the observing task use privilege escalation for those looks that ask for it. ``one_each`` says
    that each node has exactly one answer to give, which its worker may leave in the mailbox before Ansible knows of it:
    with the last one nobody waits for Ansible to tidy up.

    Raises RunError when Ansible could not do its work (not: when a node failed). A node that yields no
    result was not reached by the play; the caller decides what that means.
    """
    # One that was started ahead could not know that it would need privilege.
    process = workspace.started("" if become else name)
    if process is None:
        # --become is for tasks that do not say otherwise themselves.
        more = {"cmdline": "--become"} if become else {}
        process = _start({**_specification(name, workspace, settings), **more})
    workspace.admit(nodes)
    missing = set(nodes)
    try:
        for line in _lines(process, workspace.mailbox, time.monotonic() + settings.timeout + 30):
            if "error" in line:
                raise RunError(f"{name}: {line['error']}")
            if one_each and (line["node"] not in missing or line["data"].get("delivered")):
                continue
            on_result(Result(line["node"], line["status"], line["data"]))
            missing.discard(line["node"])
            if one_each and not missing:
                _discard(process)
                return
    finally:
        _end_session(process)


def _specification(name: str, workspace: Workspace, settings: Settings) -> dict[str, Any]:
    """The arguments of ``ansible_runner.run``."""
    return {
        "private_data_dir": str(workspace.directory),
        "project_dir": str(Path.cwd()),
        "playbook": str(playbook(name)),
        "inventory": str(settings.inventory.resolve()),
        "extravars": {"reconciler_requests": str(workspace.requests)},
        "envvars": {**_environment(settings), "RECONCILER_GATE": str(workspace.gate)},
        "settings": {
            "job_timeout": int(settings.timeout),
            "idle_timeout": int(settings.idle_timeout),
            "pexpect_timeout": 1,
            "suppress_env_files": True,
        },
    }


def _environment(settings: Settings) -> dict[str, str]:
    """Ansible's settings: what correctness needs is set, what is taste is left to the user's ansible.cfg."""
    own = Path(__file__).parent.parent / "plugins"
    roles = [str(ansible_home() / "roles"), os.environ.get("ANSIBLE_ROLES_PATH", "")]
    found = {
        "ANSIBLE_ROLES_PATH": os.pathsep.join(entry for entry in roles if entry),
        "ANSIBLE_ACTION_PLUGINS": str(own / "action"),
        "ANSIBLE_CALLBACK_PLUGINS": str(own / "callback"),
        "ANSIBLE_FORKS": str(settings.forks),
        "ANSIBLE_GATHERING": "explicit",
        "ANSIBLE_INJECT_FACT_VARS": "False",
        "ANSIBLE_NOCOWS": "1",
        "ANSIBLE_RETRY_FILES_ENABLED": "False",
        "ANSIBLE_HOST_PATTERN_MISMATCH": "ignore",
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(control_sockets()),
        "ANSIBLE_PYTHON_INTERPRETER": "python3",
        "RECONCILER_VARS": "off",  # the request files carry what the vars plugin would load again
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        # macOS ends forked processes that touch Objective-C, which Python's proxy look-up does.
        "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES",
        "no_proxy": os.environ.get("no_proxy", "*"),
    }
    configuration = user_configuration()
    if configuration:
        found["ANSIBLE_CONFIG"] = str(configuration)
    said = ConfigParser(interpolation=None, strict=False)
    with contextlib.suppress(Error, OSError):
        said.read([configuration] if configuration else [])
    taste = {"ssh_args": ("ANSIBLE_SSH_ARGS", SSH_ARGS), "pipelining": ("ANSIBLE_PIPELINING", "True")}
    for key, (variable, value) in taste.items():
        if variable not in os.environ and not said.has_option("ssh_connection", key):
            found[variable] = value
    # ansible-runner turns this off where the environment says nothing, whatever ansible.cfg says: any machine
    # in between could then pass for a node.
    checking = said.get("defaults", "host_key_checking", fallback="True")
    found["ANSIBLE_HOST_KEY_CHECKING"] = os.environ.get("ANSIBLE_HOST_KEY_CHECKING", checking)
    return found


def user_configuration() -> Path | None:
    """The ansible.cfg that Ansible would use if it were started here."""
    for candidate in (os.environ.get("ANSIBLE_CONFIG", ""), "ansible.cfg", "~/.ansible.cfg"):
        path = Path(candidate).expanduser()
        if candidate and path.is_file():
            return path.resolve()
    return None


def _start(specification: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    """Start the child. Whoever started it ends its whole session, whatever happens."""
    process = early.child()
    assert process.stdin  # noqa: S101 - for the type checker
    # It stays open: the child ends Ansible when it closes, which a killed controller does too.
    with contextlib.suppress(BrokenPipeError):  # it died at once; how, its exit status and last words say
        process.stdin.write(json.dumps(specification).encode() + b"\n")
        process.stdin.flush()
    return process


def _lines(process: subprocess.Popen[bytes], mailbox: Mailbox, deadline: float) -> Iterator[dict[str, Any]]:
    """What is in the mailbox and on standard output until the child is done; its standard error explains a bad end."""
    out, err = process.stdout, process.stderr
    assert out  # noqa: S101 - for the type checker
    assert err  # noqa: S101 - the same
    buffers = {out: b"", err: b""}
    with selectors.DefaultSelector() as selector:
        for stream in buffers:
            selector.register(stream, selectors.EVENT_READ)
        selector.register(mailbox, selectors.EVENT_READ)
        while len(selector.get_map()) > 1:
            if time.monotonic() > deadline:
                raise RunError("the playbook did not end in time and was ended")
            systemd.alive()
            ready = selector.select(timeout=1)
            # Before Ansible's own lines: a worker is done with its letter when Ansible hears of it.
            yield from mailbox.arrived()
            for key, _mask in ready:
                if key.fileobj is mailbox:
                    continue
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                buffers[key.fileobj] += chunk  # type: ignore[index]
            *lines, buffers[out] = buffers[out].split(b"\n")
            yield from map(_read, lines)
    if process.wait() != 0:
        raise RunError(
            f"Ansible's process ended badly: {buffers[err].decode(errors='replace').strip()[-800:]}"
        )


def _read(line: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        raise RunError(f"Ansible's process printed what is no result: {line[:200]!r}") from None
    return found


def _discard(process: subprocess.Popen[bytes]) -> None:
    """End one that waits at its gate, or has nothing more to say: Ansible ends by itself when it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    _end_session(process)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End whatever of the child's session still runs. Open SSH masters have sessions of their own and stay."""
    for number, grace in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what outlived the child itself
    for stream in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(BrokenPipeError):
            if stream:
                stream.close()
