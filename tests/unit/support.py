"""What several test files need: a fleet on disk, the command, values, and nodes that are this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from reconciler import node
from reconciler.cli import app
from reconciler.desired.load import Desired, load
from reconciler.inventory import Inventory
from reconciler.kinds import probe_path
from reconciler.model import (
    Change,
    Drift,
    Observation,
    Policy,
    Resource,
    ResourceId,
)

ROOT = Path(__file__).parent.parent.parent
HOSTS = """\
all:
  vars: {ansible_connection: local}
  children:
    workers: {hosts: {node-1: {}, node-2: {}}}
    macs: {hosts: {mac: {}}}
"""


@dataclass
class Fleet:
    """A directory with an inventory and a desired state."""

    directory: Path

    def __post_init__(self) -> None:
        self.desired = self.directory / "desired_state"
        self.desired.mkdir()
        self.inventory = self.directory / "inventory"
        self.inventory.mkdir()
        (self.inventory / "hosts.yml").write_text(HOSTS)

    def write(self, text: str | bytes, name: str = "a.yml") -> None:
        """A file of the desired state."""
        path = self.desired / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    def variables(self, host: str, text: str) -> None:
        """``host_vars`` of one node."""
        (self.inventory / "host_vars").mkdir(exist_ok=True)
        (self.inventory / "host_vars" / f"{host}.yml").write_text(text)

    def load(self) -> Desired:
        """The desired state as the product reads it."""
        return load(self.desired, Inventory(self.inventory))

    def resource(self, text: str) -> Resource:
        """The resource NODE/KIND/NAME."""
        return self.load().resources[ResourceId.parse(text)]


@dataclass
class Said:
    """What the command printed."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one document on standard output."""
        return json.loads(self.out)


def reconcile(*words: str, env: Mapping[str, str] | None = None) -> Said:
    """The command, in this process."""
    result = CliRunner().invoke(app, list(words), env=dict(env or {}))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Said(result.exit_code, result.stdout, result.stderr)


@dataclass(frozen=True)
class Shown:
    """One problem as it stands on the terminal."""

    place: str
    message: str
    marked: str
    hint: str


def shown_problems(text: str) -> list[Shown]:
    """Problems read back from what was printed; ``marked`` is what the caret points at."""
    found = []
    lines = text.splitlines()
    for index, line in enumerate(lines):
        head = re.match(r"(?:(\S+:\d+:\d+): )?error: (.*)", line)
        if not head:
            continue
        marked = hint = ""
        for offset, later in enumerate(lines[index + 1 : index + 4], start=index + 1):
            if re.match(r"(\S+: )?error: ", later):
                break
            if re.fullmatch(r" *\^+", later):
                start = later.index("^")
                marked = lines[offset - 1][start : len(later)]
            if later.startswith("  hint: "):
                hint = later.removeprefix("  hint: ")
        found.append(Shown((head[1] or "").removeprefix("desired_state/"), head[2], marked, hint))
    return found


# --- values -----------------------------------------------------------------------------------------


def rid(text: str) -> ResourceId:
    """NODE/KIND/NAME."""
    return ResourceId.parse(text)


def wrapper(text: str = "node-1/wrapper/w", **given: Any) -> Resource:
    """A file with the content digest ``new``."""
    policy = given.pop("policy", Policy())
    fields = given.pop("fields", {"type": "file", "content": "new"})
    args = {"dest": f"~/{text.replace('/', '-')}", "body": "", "validate": []}
    return Resource(rid(text), "C2", fields, args, policy, digest=given.pop("digest", "d1"), **given)


FILE = {"type": "file", "mode": "0644", "owner": "a", "group": "a"}


def known(resource: Resource, content: str = "old") -> Observation:
    """What a node says of a file with that content."""
    return Observation(resource.id, {**FILE, "content": content})


def drift(resource: Resource) -> Drift:
    """One changed field."""
    return Drift(resource.id, (Change("content", "new", "old"),))


# --- nodes that are this machine --------------------------------------------------------------------

NONCE = "@@nonce@@"


def on_node(sources: Mapping[str, Path], request: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """Run one bundled script as a node would and return its answer."""
    script = node.bundle(sources, {"nonce": NONCE, **request})
    payload = node.call(script, given.get("connection", {}))
    python = given.get("python", sys.executable)
    env = {**os.environ, **given.get("env", {})}
    done = subprocess.run(
        [python, *node.INTERPRETER_FLAGS.split()],
        input=payload,
        capture_output=True,
        env=env,
        cwd="/",
        timeout=60,
        check=False,
    )
    return node.parse(NONCE, done.returncode, done.stdout.decode(), done.stderr.decode())


def look(kind: str, args: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """One probe's answer: ``facts`` or ``error``."""
    request = {"probes": [{"kind": kind, "args": args, "timeout": given.pop("timeout", 20)}]}
    answer: dict[str, Any] = on_node({kind: probe_path(kind)}, request, **given)["probes"][0]
    return answer


def step(name: str, kind: str, resource: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """One step of a role: ``result`` or ``failed``."""
    request = {
        "step": name,
        "kind": kind,
        "resource": {"name": "thing", **resource},
        "attempt": given.pop("attempt", "a1"),
        "check": given.pop("check", False),
        "protected": given.pop("protected", []),
        "lock_timeout": given.pop("lock_timeout", 20),
        "keep_days": given.pop("keep_days", 7),
        **{key: given.pop(key) for key in ("epoch", "keep", "confirm_within", "proposed") if key in given},
    }
    roles = given.pop("roles", ROOT / "roles")
    sources = {"probe": probe_path(kind), "steps": roles / kind / "files" / "steps.py"}
    return on_node(sources, request, **given)


def converge(kind: str, resource: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """Back up and apply; the answer of the last step taken."""
    saved = step("backup", kind, resource, **given)
    return saved if "failed" in saved else step("apply", kind, resource, **given)
