"""heartbeat (C10): an agent that looks at its tasks: HEARTBEAT.md, the program, its timer, and a beat that is fresh."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, ClassVar, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, model_validator

from reconciler import paths
from reconciler.kinds.base import (
    Context,
    Declaration,
    Duration,
    FieldError,
    Name,
    Resolved,
    Strict,
    body_change,
    encode,
    seconds,
)
from reconciler.kinds.heartbeat import notices, timers
from reconciler.kinds.heartbeat.sources import SOURCES, Commands, merged
from reconciler.model import Change, CommonCause, Notice, Resource, ResourceId, Sample

HERE = Path(__file__).parent
BASE = "~/.local/share/reconciler/heartbeat"
PROGRAM, LAUNCHER = f"{BASE}/heartbeat.py", f"{BASE}/heartbeat"
LINK = "~/.local/bin/heartbeat"
STATE = "~/.local/state/heartbeat"


class AgentClass(Strict):
    """What agents of one class have in common; each of these fields may stand in an entry, too."""

    every: Duration | None = Field(None, examples=["15m"])
    """How often the agent beats. (``interval``, as in every kind, is how often the reconciler looks.)"""
    suspected_after: Duration | None = Field(None, examples=["30m"])
    """A task in progress without progress for so long is flagged, and a full beat is run."""
    recover_after: Duration | None = Field(None, examples=["45m"])
    """A task without progress for so long is taken away from the agent, so that it can be scheduled again."""
    task_limit: Duration | None = Field(None, examples=["2h"])
    """The longest that a single task should take."""
    rounds: int | None = Field(None, ge=1, le=100_000, examples=[100])
    """Rounds that the agent may spend on a task; those in the table are told at 80 % and when it is paused there."""
    dependency_wait: Duration | None = Field(None, examples=["2h"])
    """The longest that a task should wait for another."""
    late_after: Duration | None = Field(None, examples=["30m"])
    """A beat is late when it is older; unset: two intervals."""
    tell: list[str] | None = Field(None, examples=[["coo", "creator"]])
    """Audiences that alerts about this agent are for; see the chapter on routes in docs/alerts.md."""


BUILT_IN: Mapping[str, AgentClass] = {
    "high-frequency": AgentClass(
        every="10m", suspected_after="20m", recover_after="30m", task_limit="1h", rounds=50, dependency_wait="1h",
        tell=["coo"],
    ),
    "development": AgentClass(
        every="15m", suspected_after="30m", recover_after="45m", task_limit="2h", rounds=100, dependency_wait="2h",
        tell=["coo", "creator"],
    ),
    "business": AgentClass(
        every="15m", suspected_after="30m", recover_after="45m", task_limit="90m", rounds=30, dependency_wait="2h",
        tell=["creator"],
    ),
}  # fmt: skip


class Conversation(Strict):
    """How it is known that the agent talks to somebody, who is not to be interrupted. Unset: it never does."""

    command: list[str] | None = Field(None, min_length=1, examples=[["openclaw", "sessions", "--json"]])
    """A command that succeeds while it does."""
    marker: str | None = Field(None, examples=["~/.openclaw/workspace-architect/.conversation"])
    """A file that is touched while it does."""
    fresh: Duration = Field("10m", examples=["10m"])
    """How long the marker counts."""


class Heartbeat(Declaration, AgentClass):
    """An agent that is made to look at its tasks, and what is done when it does not."""

    KIND: ClassVar[str] = "heartbeat"
    SECTION: ClassVar[str] = "heartbeats"
    CHECK_TYPE: ClassVar[str] = "C10"
    ORDER: ClassVar[int] = 60
    UNSTEADY: ClassVar[tuple[str, ...]] = ("beat", "tasks")
    RECURRING: ClassVar[tuple[str, ...]] = ("tasks",)
    NOTICES: ClassVar[tuple[str, ...]] = notices.REASONS
    COMMON_CAUSES: ClassVar[tuple[str, ...]] = (notices.NO_BEAT_ANYWHERE,)
    ASKS_PROVIDERS: ClassVar[bool] = True
    CLASSES: ClassVar[type[Strict] | None] = AgentClass

    name: Name = Field("", examples=["architect"])
    """What the resource is called; unset: as the agent."""
    agent: Name = Field(examples=["architect"])
    """The agent's id."""
    agent_class: str = Field(alias="class", examples=["development"])
    """Its class: ``high-frequency``, ``development``, ``business``, or one of ``classes.heartbeats``."""
    workspace: str = Field(min_length=1, examples=["~/.openclaw/workspace-architect"])
    """Its directory on the node, where HEARTBEAT.md, TODO.md and AGENTS.md are."""
    label: str | None = Field(None, examples=["梁思筑"])
    """Its name for people; unset: its id."""
    multica: str | None = Field(None, examples=["40abd41a-62d0-416d-bc44-92c1f758d87a"])
    """Its id in Multica; without one that source is left out."""
    checks: list[str] = Field(default_factory=list, examples=[["architecture progress", "design reviews"]])
    """Its own items of the checklist, after those that all agents have."""
    language: Literal["en", "zh"] = Field("en", examples=["zh"])
    """Which of the two templates that are shipped HEARTBEAT.md is rendered from."""
    template: str | None = Field(None, examples=["templates/HEARTBEAT.md.j2"])
    """A Jinja2 template of one's own beside the desired state, in place of those."""
    timezone: str = Field("UTC", examples=["Asia/Shanghai"])
    """Whose clock the agent and its program go by."""
    timer: Literal["systemd", "cron", "launchd"] = Field("systemd", examples=["cron"])
    """What starts the program."""
    scope: Literal["user", "system"] = Field("user", examples=["user"])
    """For systemd: the account's own manager (needs lingering), or the machine's (needs root)."""
    turn: list[str] | None = Field(
        None,
        min_length=1,
        examples=[["openclaw", "agent", "--agent", "{agent}", "--message", "Read HEARTBEAT.md"]],
    )
    """The command that starts the agent's turn after a beat; unset: nothing is started."""
    turn_timeout: Duration = Field("1h", examples=["1h"])
    """The longest that a turn may take."""
    turn_grace: Duration = Field("5m", examples=["5m"])
    """How long a running turn is waited for before the agent's service is restarted."""
    conversation: Conversation | None = None
    """How it is known that the agent talks to somebody."""
    service: str | None = Field(None, examples=["openclaw-gateway.service"])
    """The unit (or launchd label) that is restarted when a beat stays late; unset: nothing is."""
    sources: dict[Literal["workboard", "multica", "documents"], Commands | None] = Field(
        default_factory=dict, examples=[{"documents": {"files": ["TODO.md"]}}]
    )
    """Commands of the task sources where they are not the usual ones; ``null`` leaves a source out."""
    source_timeout: Duration = Field("20s", examples=["20s"])
    """The longest that one command of a source may take."""
    path: list[str] = Field(default_factory=list, examples=[["~/.npm-global/bin"]])
    """Directories in which commands are looked for first."""

    @model_validator(mode="before")
    @classmethod
    def _named_as_the_agent(cls, data: Any) -> Any:
        if isinstance(data, dict) and "name" not in data and isinstance(data.get("agent"), str):
            return {**data, "name": data["agent"]}
        return data

    @model_validator(mode="after")
    def _turn_may_end(self) -> Self:
        if seconds(self.turn_grace) > notices.LONGEST_GRACE:
            raise ValueError(
                f"turn_grace is at most {notices.LONGEST_GRACE // 60} minutes: a pass waits for it"
            )
        return self

    def resolve(self, context: Context) -> Resolved:
        """The files of this agent on one node, and how long is too long."""
        config = self._config(self._values(context))
        files = {
            "file": _file(f"{self.workspace.rstrip('/')}/HEARTBEAT.md", self._instructions(context, config)),
            "program": {**_file(PROGRAM, _shipped("heartbeat.py")), "mode": "0755"},
            "launcher": {**_file(LAUNCHER, _shipped("heartbeat")), "mode": "0755", "link": LINK},
            "config": _file(f"~/.config/heartbeat/{self.agent}.json", _json(config)),
        }
        plan = timers.Timer(
            self.agent, config["label"], config["interval"], self.timezone, LAUNCHER, context.node
        )
        timer = self._timer(plan)
        fields = {name: files[name]["sha256"] for name in ("file", "program", "config")}
        fields |= {
            "timer": timer["sha256"],
            "schedule": "active",
            "former": "none",
            "beat": "fresh",
            "tasks": "moving",
        }
        args = {
            "agent": self.agent, "settings": config, "files": files, "timer_files": timer, "manager": self.timer,
            "scope": self.scope, "state": f"{STATE}/{self.agent}.json",
            "ledger": f"{STATE}/{self.agent}.ledger.json", "provider": None,
            "other_timers": timers.others(plan, self.timer, self.scope),
        }  # fmt: skip
        written = {files["file"]["path"], files["config"]["path"]}
        return Resolved(fields, args, frozenset(written | set(timer["paths"])))

    # --- values ---

    def _values(self, context: Context) -> dict[str, Any]:
        """The class's values, then the agent's own."""
        declared = context.classes.get(self.SECTION) or {}
        known = {**BUILT_IN, **declared}
        if self.agent_class not in known:
            hint = f"known: {', '.join(sorted(known))}; others are declared under classes.heartbeats"
            raise FieldError("class", f"there is no class {self.agent_class!r}", hint)
        found: dict[str, Any] = {}
        for layer in (BUILT_IN.get(self.agent_class), declared.get(self.agent_class), self):
            for name in AgentClass.model_fields:
                value = getattr(layer, name, None)
                found |= {name: value} if value is not None else {}
        missing = [name for name in AgentClass.model_fields if name not in found and name != "late_after"]
        if missing:
            hint = f"set it here or in classes.heartbeats.{self.agent_class}"
            raise FieldError(missing[0], f"the class {self.agent_class} has no {missing[0]}", hint)
        return found

    def _config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the program reads; see docs/heartbeats.md."""
        times = {
            name: seconds(values[name])
            for name in ("suspected_after", "recover_after", "task_limit", "dependency_wait")
        }
        if times["suspected_after"] >= times["recover_after"]:
            message = "a task is recovered later than it is suspected"
            raise FieldError("recover_after", message, f"suspected_after is {values['suspected_after']}")
        interval = seconds(values["every"])
        if interval <= 0:
            raise FieldError("every", "has to be longer than nothing")
        talk = self.conversation
        return {
            "version": 1, "agent": self.agent, "label": self.label or self.agent, "class": self.agent_class,
            "multica": self.multica, "workspace": self.workspace, "timezone": self._zone(), "interval": interval,
            **times, "rounds_max": values["rounds"], "rounds_warn": 0.8,
            "late_after": seconds(values["late_after"]) if "late_after" in values else 2 * interval,
            "tell": values["tell"], "sources": self._sources(), "source_timeout": seconds(self.source_timeout),
            "cache_seconds": min(60.0, interval), "turn": self.turn,
            # Two calls per beat, and some more where beats are rare.
            "rate_limit": {"calls": max(6, ceil(120 / interval)), "per": 60},
            "turn_timeout": seconds(self.turn_timeout), "turn_grace": seconds(self.turn_grace),
            "service": self.service, "service_scope": self.scope, "path": self.path,
            "conversation": {**talk.model_dump(exclude_none=True), "fresh": seconds(talk.fresh)} if talk else None,
        }  # fmt: skip

    def _zone(self) -> str:
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            message = f"there is no time zone {self.timezone!r}"
            raise FieldError("timezone", message, "such as Asia/Shanghai, Europe/Berlin or UTC") from None
        return self.timezone

    def _sources(self) -> dict[str, Any]:
        usual = {name: source for name, source in SOURCES.items() if name != "multica" or self.multica}
        found = merged(usual, self.sources)
        if not found:
            raise FieldError("sources", "an agent without any source has nothing to look at")
        return found

    # --- files ---

    def _instructions(self, context: Context, config: Mapping[str, Any]) -> bytes:
        known = {
            "agent": self.agent, "label": config["label"], "agent_class": self.agent_class, "multica": self.multica,
            "workspace": self.workspace, "timezone": self.timezone, "checks": self.checks, "tell": config["tell"],
            "rounds": config["rounds_max"], "sources": config["sources"],
            "minutes": {
                name: f"{config[name] / 60:g}"
                for name in (
                    "interval", "suspected_after", "recover_after", "task_limit", "dependency_wait", "late_after",
                )
            },
        }  # fmt: skip
        if self.template is None:
            shipped = (HERE / "templates" / f"HEARTBEAT.{self.language}.md.j2").read_text(encoding="utf-8")
            return context.render(shipped, {**context.variables, **known}).encode()
        try:
            body = context.read(self.template)
            return context.render(body.decode(), {**context.variables, **known}).encode()
        except OSError as error:
            hint = "paths are relative to the directory of the desired state"
            raise FieldError("template", f"cannot read {self.template!r}: {error.strerror}", hint) from None
        except ValueError as error:
            raise FieldError("template", f"{self.template}: {error}") from None

    def _timer(self, plan: timers.Timer) -> dict[str, Any]:
        try:
            files = timers.files(plan, self.timer, self.scope)
        except ValueError as error:
            raise FieldError("every", str(error), "or let systemd be its timer") from None
        both = hashlib.sha256("".join(file["sha256"] for file in files).encode()).hexdigest()
        found = [file["path"] for file in files if file["path"]]
        return {"sha256": both, "paths": found, "files": files, "unit": plan.unit(self.timer)}

    # --- looking ---

    @classmethod
    def probe_args(cls, resource: Resource) -> dict[str, Any]:
        """Digests travel to the node, bodies do not."""
        given = {**resource.args, **resource.fields, "name": resource.id.name}
        given["files"] = {name: _without_body(file) for name, file in resource.args["files"].items()}
        timer = resource.args["timer_files"]
        given["timer_files"] = {**timer, "files": [_without_body(file) for file in timer["files"]]}
        config = resource.args["settings"]
        given["settings"] = {name: config[name] for name in notices.NEEDED}
        return given

    @classmethod
    def changes(cls, resource: Resource, facts: Mapping[str, Any]) -> tuple[Change, ...]:
        """As the node sees them, with a text diff for HEARTBEAT.md."""
        file = resource.args["files"]["file"]
        with_body = replace(resource, args=file)
        return tuple(
            body_change(with_body, facts["file"], change, file["path"]) if change.field == "file" else change
            for change in super().changes(resource, facts)
        )

    @classmethod
    def with_providers(cls, resource: Resource, providers: Mapping[str, Any]) -> Resource:
        """Whether every provider rests, and what the sidecar booked for the client key of this agent's name."""
        client = (providers.get("clients") or {}).get(resource.args["agent"])
        return replace(
            resource, args={**resource.args, "provider": {"outage": providers["outage"], "client": client}}
        )

    @classmethod
    def notices(cls, resource: Resource, facts: Mapping[str, Any]) -> tuple[Notice, ...]:
        """What those in the table have to hear."""
        return notices.of(resource.args["settings"], facts)

    @classmethod
    def common_cause(cls, seen: Mapping[ResourceId, Mapping[str, Any]]) -> CommonCause | None:
        """No timer has fired anywhere for too long."""
        return notices.common_cause(seen)

    @classmethod
    def samples(cls, name: str, node: str, observed: Mapping[str, Any]) -> Iterable[Sample]:
        """The five metrics of an agent."""
        return notices.samples(name, node, observed)


def _file(path: str, body: bytes) -> dict[str, Any]:
    return {"path": path, "sha256": hashlib.sha256(body).hexdigest(), "mode": "0644", "body": encode(body)}


def _without_body(file: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in file.items() if key != "body"}


def _json(value: Any) -> bytes:
    """The same text for the same value."""
    return (json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()


def _shipped(name: str) -> bytes:
    return (paths.ansible_home() / "roles" / "heartbeat" / "files" / name).read_bytes()


DECLARATION = Heartbeat
