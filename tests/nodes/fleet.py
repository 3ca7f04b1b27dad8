"""What tests of whole passes share: a desired state in a directory, and the real command run over it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.lab import Node
from tests.lab.trees import Tree

COMMAND = [sys.executable, "-m", "reconciler"]
WATCHED = ("/home", "/etc", "/opt", "/usr/local", "/root", "/var/lib/dpkg")
# systemd and PAM write here by themselves while nothing is asked of them.
ALIVE = ("/etc/.pwd.lock", "/etc/mtab")
WATCHER = """\
[Unit]
Description=Watches tasks

[Service]
ExecStart=/home/agent/task-watcher.sh
Restart=on-failure

[Install]
WantedBy=default.target
"""


@dataclass(frozen=True)
class Answer:
    """How one `reconcile` run ended."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        assert self.out, self.err
        document: dict[str, Any] = json.loads(self.out)
        return document

    @property
    def outcomes(self) -> dict[str, str]:
        return {row["id"]: row["status"] for row in self.report["outcomes"]}


class Fleet:
    """A project directory with a desired state, an inventory and a database of its own."""

    def __init__(self, directory: Path, inventory: Path) -> None:
        self.directory, self.inventory = directory, inventory
        self.desired = directory / "desired_state"
        (self.desired / "files").mkdir(parents=True)
        self.db = directory / "state.db"
        # Sockets of one test must not serve the next one's nodes; the path has to stay short.
        self.runtime = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))

    def close(self) -> None:
        """End the SSH masters that passes left open on purpose."""
        for socket in (self.runtime / "reconciler-ssh").glob("*"):
            if socket.suffix != ".fresh":
                for pid in self.masters(socket.name):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.runtime, ignore_errors=True)

    def masters(self, name: str = "") -> list[int]:
        """Process ids of open control masters of this fleet."""
        rows = subprocess.run(
            ["ps", "-e", "-o", "pid=,args="], capture_output=True, text=True, timeout=10, check=True
        )
        wanted = f"ssh: {self.runtime}/reconciler-ssh/{name}"
        return [int(row.split()[0]) for row in rows.stdout.splitlines() if wanted in row]

    def ansible(self) -> list[int]:
        """Process ids of whatever Ansible runs for this fleet, its workers included."""
        return [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if b"ansible-playbook" in _read(path)
            and str(self.runtime).encode() in _read(path.with_name("environ"))
        ]

    def check_ended(self) -> None:
        """Ansible ends with its pass, however that ended; what has not is ended here, and described."""
        deadline = time.monotonic() + 30
        while self.ansible() and time.monotonic() < deadline:
            time.sleep(0.1)
        left = self.ansible()
        described = "\n".join(_described(pid) for pid in left)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not left, f"Ansible outlived its controller:\n{described}"

    def file(self, name: str, content: str | bytes) -> str:
        path = self.desired / "files" / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return f"files/{name}"

    def declare(self, sections: Mapping[str, Any], name: str = "state.yml") -> None:
        (self.desired / name).write_text(yaml.safe_dump(dict(sections), allow_unicode=True, sort_keys=False))

    def command(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        paths = ["--desired", str(self.desired), "--inventory", str(self.inventory), "--db", str(self.db)]
        env = {**os.environ, "XDG_RUNTIME_DIR": str(self.runtime), "NO_COLOR": "1"}
        return [*COMMAND, *arguments, *paths], env

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        argv, env = self.command(*arguments)
        return subprocess.Popen(
            argv, env=env, cwd=self.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str, timeout: float = 300) -> Answer:
        argv, env = self.command(*arguments)
        done = subprocess.run(
            argv, env=env, cwd=self.directory, capture_output=True, text=True, timeout=timeout, check=False
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def once(self, *arguments: str, timeout: float = 300) -> Answer:
        return self.run("--once", "--output", "json", *arguments, timeout=timeout)

    def check(self, *arguments: str) -> Answer:
        return self.run("--check", "--output", "json", *arguments)

    def events(self) -> list[dict[str, Any]]:
        argv = [*COMMAND, "events", "--db", str(self.db), "--output", "json", "-n", "100000"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows


def trees(nodes: Iterable[Node]) -> dict[str, Tree]:
    """Every file that a pass could touch."""
    return {node.name: node.tree(*WATCHED, without=ALIVE) for node in nodes}


def kinds_of(report: dict[str, Any]) -> set[str]:
    return {row["kind"] for row in report["outcomes"]}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _described(pid: int) -> str:
    """What a process is about: its parents, what it waits for, and what it was started with."""
    argv = ["ps", "-o", "pid,ppid,pgid,sid,stat,etimes,wchan:24,args", "-p", str(pid)]
    shown = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False).stdout
    place = Path("/proc") / str(pid)
    told = [word.decode() for word in _read(place / "environ").split(b"\0") if word.startswith(b"RECONCILER")]
    return f"{shown}{told}\n{_read(place / 'stack').decode()}{_read(place / 'status').decode()}"
