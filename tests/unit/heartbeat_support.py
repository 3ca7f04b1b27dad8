"""An account with agents, the stand-in commands on its PATH, and the heartbeat program as it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from tests.unit.support import ROOT

FILES = ROOT / "roles" / "heartbeat" / "files"
STAND_INS = ROOT / "tests" / "stand_ins"
# Nodes have other Pythons than the controller: name one to run the program with it.
PYTHON = os.environ.get("RECONCILER_NODE_PYTHON") or sys.executable
Found = TypeVar("Found")
UUID = "40abd41a-62d0-416d-bc44-92c1f758d87a"
MULTICA = ["multica", "issue", "list", "--output", "json"]


def program() -> ModuleType:
    """The program as a module, for what is pure; nothing compiled is left beside the source."""
    module = ModuleType("heartbeat_program")
    exec(compile((FILES / "heartbeat.py").read_text(), "heartbeat.py", "exec"), module.__dict__)
    return module


def iso(epoch: float) -> str:
    """A time as Multica prints it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))


def card(name: str, **given: Any) -> dict[str, Any]:
    """A card as `openclaw workboard list --json` prints it; times in milliseconds."""
    now = int(time.time() * 1000)
    base = {
        "id": name, "title": f"Card {name}", "status": "todo", "priority": "normal", "labels": [],
        "agentId": "architect", "position": 1000, "createdAt": now - 3_600_000, "updatedAt": now - 60_000,
        "events": [{"id": "e1", "kind": "created", "at": now - 3_600_000}],
        "metadata": {"automation": {"boardId": "default"}},
    }  # fmt: skip
    return {**base, **given}


def claimed(name: str, minutes: float = 5, agent: str = "architect", **given: Any) -> dict[str, Any]:
    """A card that an agent has claimed and works on."""
    at = int((time.time() - 60 * minutes) * 1000)
    claim = {"ownerId": agent, "token": "[redacted]", "claimedAt": at, "lastHeartbeatAt": at}
    return card(
        name, status="running", agentId=agent, startedAt=at, updatedAt=at, metadata={"claim": claim}, **given
    )


def linked(*names: str) -> dict[str, Any]:
    """The metadata of a card that waits for others."""
    return {"links": [{"id": "l", "type": "blocked_by", "targetCardId": n, "createdAt": 1} for n in names]}


def issue(name: str, **given: Any) -> dict[str, Any]:
    """An issue as `multica issue list --output json` prints it."""
    base = {
        "id": name, "workspace_id": "w", "number": 7, "identifier": f"MUL-{name}", "title": f"Issue {name}",
        "description": None, "status": "todo", "priority": "none", "assignee_type": "agent", "assignee_id": UUID,
        "creator_type": "member", "creator_id": "m", "parent_issue_id": None, "project_id": None, "position": 0,
        "start_date": None, "due_date": None, "created_at": iso(time.time() - 3600), "updated_at": iso(time.time() - 60),
    }  # fmt: skip
    return {**base, **given}


def issues(*found: dict[str, Any], more: bool = False) -> dict[str, Any]:
    """The whole answer."""
    return {"issues": list(found), "total": len(found), "limit": 50, "offset": 0, "has_more": more}


@dataclass
class Said:
    """What a call of the program printed, and how it ended."""

    code: int
    out: str
    err: str


class Account:
    """A home directory in which agents are declared."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.stand_ins = home / ".stand_ins"
        self.bin = home / ".local" / "bin"
        self.installed = home / ".local" / "share" / "reconciler" / "heartbeat"
        for directory in (self.stand_ins, self.bin, self.installed, home / ".config" / "heartbeat"):
            directory.mkdir(parents=True)
        for name in ("openclaw", "multica"):
            shutil.copy(STAND_INS / name, self.bin)
        for name in ("heartbeat", "heartbeat.py"):
            shutil.copy(FILES / name, self.installed)
        self.workspace = home / "workspace"
        self.workspace.mkdir()
        self.cards()

    def declare(self, agent: str = "architect", **given: Any) -> dict[str, Any]:
        """A configuration file; what is given replaces what usually stands there, None removes it."""
        base: dict[str, Any] = {
            "version": 1, "agent": agent, "label": "梁思筑", "class": "development", "multica": UUID,
            "workspace": "~/workspace", "timezone": "Asia/Shanghai", "interval": 900, "source_timeout": 10,
            "cache_seconds": 60, "turn": ["openclaw", "agent", "--agent", "{agent}", "--task", "{task}"],
            "turn_timeout": 60,
            "sources": {
                "workboard": {
                    "list": ["openclaw", "workboard", "list", "--json"],
                    "show": ["openclaw", "workboard", "show", "{id}", "--json"],
                    "release": ["openclaw", "workboard", "release", "{id}"],
                    "comment": ["openclaw", "workboard", "comment", "{id}", "{reason}"],
                },
                "multica": {
                    "list": [*MULTICA, "--assignee-id", "{multica}", "--status", "todo"],
                    "list_in_progress": [*MULTICA, "--assignee-id", "{multica}", "--status", "in_progress"],
                    "show": ["multica", "issue", "get", "{id}", "--output", "json"],
                    "block": ["multica", "issue", "status", "{id}", "blocked"],
                    "comment": ["multica", "issue", "comment", "add", "{id}", "--content", "{reason}"],
                },
                "documents": {"files": ["TODO.md", "AGENTS.md"]},
            },
        }  # fmt: skip
        base.update(given)
        base = {key: value for key, value in base.items() if value is not None}
        self.config(agent).write_text(json.dumps(base))
        return base

    def config(self, agent: str = "architect") -> Path:
        return self.home / ".config" / "heartbeat" / f"{agent}.json"

    def cards(self, *found: dict[str, Any]) -> None:
        """What the board holds."""
        (self.stand_ins / "cards.json").write_text(json.dumps({"cards": list(found)}, indent=2))

    def issues(self, *found: dict[str, Any], status: str = "todo", more: bool = False) -> None:
        """What Multica lists."""
        (self.stand_ins / f"issues-{status}.json").write_text(json.dumps(issues(*found, more=more)))

    def todo(self, text: str, name: str = "TODO.md") -> Path:
        """A document of the workspace."""
        (self.workspace / name).write_bytes(text.encode())
        return self.workspace / name

    def mode(self, command: str, mode: str) -> None:
        """How a stand-in behaves."""
        (self.stand_ins / f"{command}.mode").write_text(mode + "\n")

    def turn(self, text: str) -> None:
        """What the agent's turn is: a shell script."""
        path = self.stand_ins / "turn"
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(0o755)

    def calls(self, word: str = "") -> list[str]:
        """Calls of the stand-ins so far."""
        path = self.stand_ins / "calls"
        return [line for line in path.read_text().splitlines() if word in line] if path.exists() else []

    def environment(self) -> dict[str, str]:
        """A session as a timer has it: a short PATH and no locale."""
        return {"HOME": str(self.home), "PATH": "/usr/bin:/bin"}

    def start(self, *words: str, limits: str = "", **given: Any) -> subprocess.Popen[bytes]:
        """Start the program, its output left aside; ``limits`` are words of the shell's ulimit."""
        argv = [PYTHON, "-IS", str(self.installed / "heartbeat"), *words]
        if limits:
            argv = ["/bin/sh", "-c", f'ulimit {limits}; exec "$@"', "sh", *argv]
        given = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **given}
        return subprocess.Popen(argv, env=self.environment(), stdin=subprocess.DEVNULL, **given)

    def beat(self, *words: str, limits: str = "") -> Said:
        """Run the program to its end; without words one beat of the architect."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.start(*(words or ("architect",)), limits=limits, **pipes) as process:
            out, err = process.communicate(timeout=120)
        return Said(process.returncode, out.decode(), err.decode())

    def file(self, ending: str, agent: str = "architect") -> Path:
        """A file of the agent's beside its state file."""
        return self.home / ".local" / "state" / "heartbeat" / f"{agent}.{ending}"

    def state(self, agent: str = "architect") -> dict[str, Any]:
        """The state file."""
        found: dict[str, Any] = json.loads(self.file("json", agent).read_text())
        return found

    def see(self, *words: str) -> dict[str, Any]:
        """One good beat, and the state that it left."""
        said = self.beat(*words)
        assert said.code == 0, said
        return self.state(words[0] if words else "architect")

    def ended(self) -> dict[str, Any]:
        """The record of the last turn, once it ended."""
        path = self.file("turn.json")

        def look() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
            return found if "ended" in found else {}

        return until(look)

    def look(self) -> dict[str, Any]:
        """A beat that looks at everything anew, and starts no turn."""
        self.declare(turn=None)
        return self.see("architect", "--full")


def codes(state: dict[str, Any]) -> list[str]:
    """What was warned of."""
    return [warning["code"] for warning in state["warnings"]]


def warning(state: dict[str, Any], code: str) -> dict[str, Any]:
    """The one warning of that code."""
    (found,) = [item for item in state["warnings"] if item["code"] == code]
    return dict(found)


def ids(found: Iterable[dict[str, Any]]) -> list[str]:
    """Which tasks."""
    return [item["id"] for item in found]


def until(condition: Callable[[], Found], seconds: float = 60) -> Found:
    """Wait for what must come, and give it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def number(path: Path) -> int:
    """The process id that a stand-in wrote."""
    return int(until(lambda: path.exists() and path.read_text().strip()))


def everything(home: Path) -> dict[str, tuple[int, int]]:
    """Every file below a directory, to see whether any was written; the log of calls aside."""
    found = [path for path in home.rglob("*") if path.name != "calls" and "__pycache__" not in path.parts]
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_ino) for path in found if not path.is_dir()}
