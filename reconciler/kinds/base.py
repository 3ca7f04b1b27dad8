"""What every kind has in common: the model a person fills in, and how it becomes a resource."""

from __future__ import annotations

import base64
import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from reconciler import windows
from reconciler.model import (
    Change,
    CommonCause,
    Mode,
    Notice,
    Resource,
    ResourceId,
    Sample,
    Window,
)

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class FieldError(ValueError):
    """A value that a node cannot have; ``path`` leads from the declaration to the field at fault."""

    def __init__(self, path: str | tuple[str | int, ...], message: str, hint: str = "") -> None:
        super().__init__(message)
        self.path = (tuple(path.split(".")) if path else ()) if isinstance(path, str) else path
        self.hint = hint


def seconds(text: str) -> float:
    """Seconds of a duration such as ``90s``, ``5m``, ``1h30m``, ``2d``. Raises ValueError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise ValueError('write a duration such as "30s", "5m", "1h30m" or "2d"')
    return float(sum(float(number) * _UNITS[unit] for number, unit in parts))


def _duration(value: object) -> object:
    """Accept ``5m`` and plain seconds; anything else is left for pydantic to refuse."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value}s"
    return value


def _is_duration(text: str) -> str:
    seconds(text)
    return text


def _is_positive(text: str) -> str:
    if seconds(text) <= 0:
        raise ValueError("has to be longer than nothing")
    return text


def _mode(text: str) -> str:
    if not re.fullmatch(r"0?[0-7]{3,4}", text):
        raise ValueError('write permissions as an octal number in quotes, such as "0755"')
    return f"{int(text, 8):04o}"


Duration = Annotated[
    str,
    BeforeValidator(_duration, json_schema_input_type=str | int | float),
    AfterValidator(_is_duration),
]
PositiveDuration = Annotated[Duration, AfterValidator(_is_positive)]
FileMode = Annotated[str, AfterValidator(_mode)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9@._+:-]*$", max_length=128)]


class Strict(BaseModel):
    """No unknown keys, no conversions: a bare ``on`` is a boolean in YAML 1.1 and never a string here."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Suspend(Strict):
    """Leave a resource alone for a while, with the reason."""

    reason: str = Field(min_length=1, examples=["waiting for the vendor's fix"])
    """Why; shown wherever the resource is."""
    owner: str = Field("", examples=["dana"])
    """Who suspended it."""
    until: datetime | date | None = Field(None, examples=["2026-12-01"])
    """When it ends by itself; absent means until the entry is removed. Without a zone, UTC."""

    def expiry(self) -> datetime | None:
        """The end as an aware time."""
        if self.until is None:
            return None
        if not isinstance(self.until, datetime):
            return datetime(self.until.year, self.until.month, self.until.day, tzinfo=UTC)
        return self.until if self.until.tzinfo else self.until.replace(tzinfo=UTC)


class MaintenanceWindow(Strict):
    """When repairs may begin; drift is seen and told at any time."""

    cron: str = Field(min_length=1, max_length=100, examples=["0 2 * * 1-5"])
    """When it opens: minute, hour, day, month, weekday."""
    duration: Duration = Field(examples=["3h"])
    """How long it stays open."""
    timezone: str = Field("UTC", examples=["Europe/Berlin"])
    """Whose clock the expression means."""
    overrun: Literal["stop", "finish"] = Field("stop", examples=["finish"])
    """At its end: begin nothing new (stop), or finish the pass that began inside (finish)."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        found = windows.problem(self.window())
        if found:
            raise ValueError(f"{found[0]}: {found[1]}" + (f"; {found[2]}" if found[2] else ""))
        return self

    def window(self) -> Window:
        """As the plan understands it."""
        return Window(self.cron, seconds(self.duration), self.timezone, self.overrun == "finish")


class PolicyFields(Strict):
    """How drift of a resource is treated. Unset fields come from ``defaults``, then from the node's variables."""

    mode: Annotated[Mode | None, Field(strict=False)] = Field(None, examples=["warn"])
    """enforce: put right; warn: only tell; ignore: do not look."""
    interval: PositiveDuration | None = Field(None, examples=["5m"])
    """How often it is looked at in continuous mode."""
    retry_interval: Duration | None = Field(None, examples=["1m"])
    """How long after a failed repair the next one may start."""
    max_attempts: int | None = Field(None, ge=1, le=100, examples=[2])
    """Repairs tried within one episode before somebody is told."""
    window: MaintenanceWindow | None = None
    """When repairs may begin; at any time where nothing is said."""


class Declaration(PolicyFields):
    """One entry of the desired state; each kind adds its fields and says what it is in the class variables."""

    KIND: ClassVar[str]
    SECTION: ClassVar[str]
    CHECK_TYPE: ClassVar[str]
    ORDER: ClassVar[int]
    """Within a node, lower numbers are put right first."""
    PROBE_SECONDS: ClassVar[float] = 10.0
    NO_ROLLBACK: ClassVar[str] = ""
    """Why the role has no rollback, where it has none."""
    VERIFY_FRESH: ClassVar[bool] = False
    """Whether a repair is verified over a new connection, because it could have cut us off."""
    UNSTEADY: ClassVar[tuple[str, ...]] = ()
    """Fields whose observed value moves by itself (a service that keeps dying): an undo need not restore it exactly."""
    RECURRING: ClassVar[tuple[str, ...]] = ()
    """Fields that differ again and again in the ordinary course of things: no sign that something changes them back."""
    CHANGES_NODE: ClassVar[bool] = True
    """Whether a repair changes the node itself, so that it is tried on one node before the others."""
    SHARES_PATHS: ClassVar[bool] = False
    """Whether several resources may write the same path, each its own part of it."""
    OBSERVE_PRIVILEGED: ClassVar[bool] = True
    """Whether looking needs the privilege that fixing needs (where ``allow_become`` grants it)."""
    NOTICES: ClassVar[tuple[str, ...]] = ()
    """Every reason that ``notices`` may give: these alerts end when their notice does, and not by a repair."""
    COMMON_CAUSES: ClassVar[tuple[str, ...]] = ()
    """Every reason that ``common_cause`` may give."""
    CLASSES: ClassVar[type[Strict] | None] = None
    """What a class of entries (``classes:`` in the desired state) may hold, for kinds whose entries have classes."""
    ASKS_PROVIDERS: ClassVar[bool] = False
    """Whether ``with_providers`` has a use for what the sidecar says of the language-model providers."""
    PROPOSABLE: ClassVar[str] = ""
    """The field that an analyzer may propose a value for where the declaration has none; this model validates it."""

    name: Name = Field(examples=["task-wrapper"])
    """What the resource is called; unique per kind and node."""
    nodes: str = Field(min_length=1, examples=["workers", "node-1,node-2", "all:!mac"])
    """Ansible host pattern against the inventory."""
    depends_on: list[str] = Field(default_factory=list, examples=[["tool/claude"]])
    """Resources that have to be as desired first: KIND/NAME on the same node, or NODE/KIND/NAME."""
    suspend: Suspend | None = None
    """Leave this resource alone for a while."""
    ignore: list[str] = Field(default_factory=list, examples=[["mode"]])
    """Fields that are neither compared nor changed."""
    allow_become: bool = Field(default=False, examples=[True])
    """Let the role use privilege escalation (Ansible's become) for this resource."""

    confirm_within: Duration | None = Field(None, examples=["1m", "0s"])
    """After a change the node undoes it by itself unless it was confirmed over a new login in time.
    Unset: 1m for files and units that decide over logins and the network, never for others; 0s: never."""
    secret: bool = Field(default=False, examples=[True])
    """Show none of its values anywhere; so it is anyway where it refers to $secret, $env, $file or vaulted values."""

    def resolve(self, context: Context) -> Resolved:
        """Everything about this declaration that one node needs. Raises FieldError."""
        raise NotImplementedError

    def can_lock_out(self) -> bool:
        """Whether a wrong change of it can keep everybody from logging in."""
        return False

    @classmethod
    def probe_args(cls, resource: Resource) -> dict[str, Any]:
        """What the probe is told: no more than it needs to look and to compare."""
        return {**resource.args, **resource.fields, "name": resource.id.name}

    @classmethod
    def changes(cls, resource: Resource, facts: Mapping[str, Any]) -> tuple[Change, ...]:
        """Declared fields that differ, by the same code that the node uses before it acts."""
        probe = importlib.import_module(f"reconciler.kinds.{cls.KIND}.probe")
        return tuple(Change(**found) for found in probe.changes(dict(resource.fields), facts))

    @classmethod
    def consequence(cls, resource: Resource, facts: Mapping[str, Any], path: str) -> Change | None:  # noqa: ARG003
        """The change that becomes due when the file at ``path``, which the resource reads, is replaced."""
        return None

    @classmethod
    def notices(cls, resource: Resource, facts: Mapping[str, Any]) -> tuple[Notice, ...]:  # noqa: ARG003
        """What people have to hear of as long as the facts say it; at most one per reason."""
        return ()

    @classmethod
    def common_cause(cls, seen: Mapping[ResourceId, Mapping[str, Any]]) -> CommonCause | None:  # noqa: ARG003
        """One reason behind the state of all resources of this kind, from the facts of those that are known."""
        return None

    @classmethod
    def with_providers(cls, resource: Resource, providers: Mapping[str, Any]) -> Resource:  # noqa: ARG003
        """The resource, told what the sidecar says; see :mod:`reconciler.providers`."""
        return resource

    @classmethod
    def samples(cls, name: str, node: str, observed: Mapping[str, Any]) -> Iterable[Sample]:  # noqa: ARG003
        """Measurements in what was last observed (``details.observed`` of the condition); absent means no sample."""
        return ()


@dataclass(frozen=True)
class Resolved:
    """A declaration for one node; the parts have the meaning they have in ``model.Resource``."""

    fields: Mapping[str, Any]
    args: Mapping[str, Any] = field(default_factory=dict)
    paths_written: frozenset[str] = frozenset()
    paths_read: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Context:
    """What resolving may use: the node, its variables, and files of the desired state."""

    node: str
    variables: Mapping[str, Any]
    read: Callable[[str], bytes]
    render: Callable[[str, Mapping[str, Any]], str]
    classes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By section, what entries that name a class have in common."""

    def body(self, owner: BodyFields, extra: Mapping[str, Any] | None = None) -> bytes | None:
        """The bytes that ``src``, ``template`` or ``content`` stand for, or None where none is given."""
        if owner.content is not None:
            return owner.content.encode()
        if owner.src is not None:
            return self._from("src", owner.src)
        if owner.template is not None:
            body = self._from("template", owner.template)
            try:
                text = body.decode("utf-8")
                return self.render(text, {**self.variables, **(extra or {})}).encode()
            except UnicodeDecodeError:
                raise FieldError("template", f"{owner.template} is not UTF-8 text") from None
            except ValueError as error:
                raise FieldError("template", f"{owner.template}: {error}") from None
        return None

    def _from(self, key: str, path: str) -> bytes:
        try:
            return self.read(path)
        except OSError as error:
            hint = "paths are relative to the directory of the desired state"
            raise FieldError(key, f"cannot read {path!r}: {error.strerror}", hint) from None


class BodyFields(BaseModel):
    """Where the content of a managed file comes from."""

    src: str | None = Field(None, examples=["files/task-wrapper.sh"])
    """File beside the desired state; its bytes arrive unchanged."""
    template: str | None = Field(None, examples=["templates/agent.conf.j2"])
    """Jinja2 template beside the desired state, rendered with the node's variables."""
    content: str | None = Field(None, examples=["export AGENT=architect\n"])
    """The content itself; never templated."""

    def sources(self) -> list[str]:
        """Which of the three are given."""
        return [key for key in ("src", "template", "content") if getattr(self, key) is not None]


def encode(body: bytes) -> str:
    """Bytes as text for JSON."""
    return base64.b64encode(body).decode()


def body_change(resource: Resource, facts: Mapping[str, Any], change: Change, label: str) -> Change:
    """The change of a file's content with a readable diff, where both sides are short text."""
    if resource.secret:
        return change  # its values are taken out where drift is made
    observed = facts.get("text")
    try:
        desired = base64.b64decode(resource.args["body"]).decode()
    except (KeyError, UnicodeDecodeError):
        return change
    if observed is None or len(desired) > 64 * 1024:
        return change
    lines = difflib.unified_diff(
        observed.splitlines(keepends=True),
        desired.splitlines(keepends=True),
        f"{label} (observed)",
        f"{label} (desired)",
    )
    text = "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )
    return Change(change.field, change.desired, change.observed, change.fixable, change.note, text)
