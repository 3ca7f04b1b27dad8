"""service (C9): a systemd or launchd unit with the declared file, enabled, running, and restarted when due."""

from __future__ import annotations

import hashlib
import plistlib
import posixpath
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from pydantic import Field

from reconciler.kinds.base import (
    BodyFields,
    Context,
    Declaration,
    FieldError,
    Resolved,
    Strict,
    body_change,
    encode,
)
from reconciler.model import Change, Resource

LOGIN_UNITS = (
    "ssh", "sshd", "ssh.socket", "networking", "systemd-networkd*", "NetworkManager*", "wpa_supplicant*", "nftables",
    "ufw", "firewalld", "iptables", "wg-quick@*", "tailscaled", "openvpn*", "systemd-resolved", "systemd-logind",
    "dhcpcd",
)  # fmt: skip
SUFFIXES = (".service", ".timer", ".socket", ".path", ".target", ".mount")


class Program(Strict):
    """A program to keep running, for which the unit file or plist is written from here."""

    command: list[str] = Field(min_length=1, examples=[["/home/agent/task-watcher.sh", "--poll", "5"]])
    """Program (absolute path) and arguments."""
    environment: dict[str, str] = Field(default_factory=dict, examples=[{"TZ": "Asia/Shanghai"}])
    """Environment variables."""
    directory: str | None = Field(None, examples=["/home/agent"])
    """Working directory (absolute)."""
    description: str | None = Field(None, examples=["Watches the task directory"])
    """One line for people."""


class Service(Declaration):
    """A unit of the node's service manager."""

    KIND: ClassVar[str] = "service"
    SECTION: ClassVar[str] = "services"
    CHECK_TYPE: ClassVar[str] = "C9"
    ORDER: ClassVar[int] = 50
    OBSERVE_PRIVILEGED: ClassVar[bool] = False
    UNSTEADY: ClassVar[tuple[str, ...]] = ("state", "fresh")

    state: Literal["running", "stopped"] = Field("running", examples=["running"])
    """Whether it should run. For timers and sockets, running means waiting for their event."""
    enabled: bool | None = Field(None, examples=[True])
    """Whether it starts by itself; absent means it is left as it is."""
    unit: str | None = Field(None, examples=["files/task-watcher.service"])
    """Unit file (systemd) or plist (launchd) beside the desired state; its bytes arrive unchanged."""
    unit_template: str | None = Field(None, examples=["templates/task-watcher.service.j2"])
    """The same as a Jinja2 template, rendered with the node's variables."""
    run: Program | None = None
    """A program, from which the unit file or plist is written."""
    scope: Literal["system", "user"] = Field("system", examples=["user"])
    """systemd's or launchd's system manager (needs privilege), or that of the connected account."""
    manager: Literal["systemd", "launchd"] = Field("systemd", examples=["launchd"])
    """The node's service manager."""
    restart_on: list[str] = Field(default_factory=list, examples=[["~/task-watcher.sh"]])
    """Files on the node; the service is restarted when one is newer than the running process."""
    settle: float = Field(1.5, ge=0, le=120, examples=[5.0], strict=False)
    """Seconds it has to stay up after a start before the start is believed."""

    def can_lock_out(self) -> bool:
        """The login daemon, the network and what filters it."""
        name = self.name.removesuffix(".service")
        return self.scope == "system" and any(fnmatchcase(name, pattern) for pattern in LOGIN_UNITS)

    def resolve(self, context: Context) -> Resolved:
        """Unit name, file and wanted state."""
        unit_name = (
            self.name if self.name.endswith(SUFFIXES) or self.manager == "launchd" else f"{self.name}.service"
        )
        body = self._body(context)
        path = self._unit_path(unit_name)
        fields: dict[str, Any] = {"state": self.state, "fresh": True}
        if body is not None:
            fields["unit"] = hashlib.sha256(body).hexdigest()
        if self.enabled is not None:
            fields["enabled"] = self.enabled
        args: dict[str, Any] = {
            "unit_name": unit_name,
            "unit_path": path,
            "scope": self.scope,
            "manager": self.manager,
        }
        args |= {
            "restart_on": self.restart_on,
            "settle": self.settle,
            "body": encode(body) if body is not None else None,
        }
        reads = {posixpath.normpath(entry) for entry in self.restart_on}
        return Resolved(fields, args, frozenset() if body is None else frozenset({path}), frozenset(reads))

    def _unit_path(self, unit_name: str) -> str:
        if self.manager == "launchd":
            base = "/Library/LaunchDaemons" if self.scope == "system" else "~/Library/LaunchAgents"
            return f"{base}/{unit_name}.plist"
        base = "/etc/systemd/system" if self.scope == "system" else "~/.config/systemd/user"
        return f"{base}/{unit_name}"

    def _body(self, context: Context) -> bytes | None:
        given = [key for key in ("unit", "unit_template", "run") if getattr(self, key) is not None]
        if len(given) > 1:
            raise FieldError(given[1], "a service takes at most one of unit, unit_template and run")
        if self.run is not None:
            return self._rendered(self.run)
        source = BodyFields(src=self.unit, template=self.unit_template)
        try:
            return context.body(source)
        except FieldError as error:
            key = {"src": "unit", "template": "unit_template"}[str(error.path[0])]
            raise FieldError(key, str(error), error.hint) from None

    def _rendered(self, program: Program) -> bytes:
        if not program.command[0].startswith("/"):
            raise FieldError(
                "run.command", f"{program.command[0]!r} is not absolute", "name the program's full path"
            )
        return self._plist(program) if self.manager == "launchd" else self._unit_file(program)

    def _unit_file(self, program: Program) -> bytes:
        target = "multi-user.target" if self.scope == "system" else "default.target"
        lines = ["[Unit]", f"Description={_unit_text(program.description or self.name)}", "", "[Service]"]
        lines += [f"ExecStart={' '.join(_unit_word(word, command=True) for word in program.command)}"]
        lines += [
            f"Environment={_unit_word(f'{key}={value}')}"
            for key, value in sorted(program.environment.items())
        ]
        lines += [f"WorkingDirectory={_unit_text(program.directory)}"] if program.directory else []
        lines += ["Restart=on-failure", "RestartSec=5", "", "[Install]", f"WantedBy={target}", ""]
        return "\n".join(lines).encode()

    def _plist(self, program: Program) -> bytes:
        content: dict[str, Any] = {"Label": self.name, "ProgramArguments": program.command}
        content |= {"RunAtLoad": True, "KeepAlive": {"SuccessfulExit": False}}
        content |= {"EnvironmentVariables": program.environment} if program.environment else {}
        content |= {"WorkingDirectory": program.directory} if program.directory else {}
        return plistlib.dumps(content)

    @classmethod
    def probe_args(cls, resource: Resource) -> dict[str, Any]:
        """How to look; the unit's digest travels, its content does not."""
        keys = ("unit_name", "unit_path", "scope", "manager", "restart_on")
        return {**{key: resource.args[key] for key in keys}, "unit": resource.fields.get("unit")}

    @classmethod
    def changes(cls, resource: Resource, facts: Mapping[str, Any]) -> tuple[Change, ...]:
        """As the node sees them, with a text diff for the unit file."""
        return tuple(
            body_change(resource, facts.get("file", {}), change, resource.args["unit_path"])
            if change.field == "unit"
            else change
            for change in super().changes(resource, facts)
        )

    @classmethod
    def consequence(cls, resource: Resource, facts: Mapping[str, Any], path: str) -> Change | None:
        """A running service restarts when an input is replaced."""
        if (
            facts["state"] != "running"
            or resource.fields.get("state") != "running"
            or "fresh" not in resource.fields
        ):
            return None
        return Change("fresh", "started after its inputs", f"{path} is newer than the running process")


def _unit_text(text: str) -> str:
    """A value in a unit file: one line, with systemd's specifiers taken literally."""
    if "\n" in text:
        raise FieldError("run", "a unit file's values have one line each")
    return text.replace("%", "%%")


def _unit_word(text: str, *, command: bool = False) -> str:
    """One word in systemd's quoting; in commands a dollar sign is doubled too."""
    escaped = _unit_text(text).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + (escaped.replace("$", "$$") if command else escaped) + '"'


DECLARATION = Service
