"""The values that flow through a pass: frozen, free of I/O, known to every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from typing import Any

SECRET = "(secret)"  # noqa: S105 - what is shown instead of one


class ExitCode(IntEnum):
    """What a pass answers to the shell. Precedence when several apply: 1, 3, 4, 2, 0."""

    AS_DESIRED = 0
    CONFIGURATION = 1
    DRIFT = 2
    NOT_FIXED = 3
    UNKNOWN = 4


@dataclass(frozen=True, slots=True, order=True)
class ResourceId:
    """Identity of one resource on one node; its text form is the issue key of events and alerts."""

    node: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.node}/{self.kind}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> ResourceId:
        """Read ``node/kind/name``; the name may itself contain slashes. Raises ValueError."""
        node, kind, name = text.split("/", 2)
        if not (node and kind and name):
            raise ValueError(text)
        return cls(node, kind, name)


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a file: line and column count from 1, as editors show them."""

    file: str
    line: int = 1
    column: int = 1
    length: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with what a person wrote, and the way out."""

    message: str
    mark: Mark | None = None
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.mark}: " if self.mark else ""
        return f"{place}{self.message}" + (f" ({self.hint})" if self.hint else "")


class ConfigurationError(Exception):
    """What a person wrote cannot be used: nothing has been touched. Carries every problem found."""

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        self.problems = [Problem(problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))


class RunError(Exception):
    """Ansible itself could not run (not: a node failed). The message says what it printed."""


class LeaseLostError(Exception):
    """Another controller has taken over: this one may change nothing any more and record nothing."""


class Mode(StrEnum):
    """What to do about drift: put it right, only tell, or not even look."""

    ENFORCE = "enforce"
    WARN = "warn"
    IGNORE = "ignore"


@dataclass(frozen=True, slots=True)
class Suspension:
    """Why a resource is left alone, by whose word and until when (None: until resumed)."""

    reason: str
    owner: str = ""
    until: datetime | None = None

    def holds(self, now: datetime) -> bool:
        """Whether the suspension still counts at ``now`` (aware, any zone)."""
        return self.until is None or now < self.until


@dataclass(frozen=True, slots=True)
class Window:
    """When repairs may begin: from every time that ``cron`` names in ``timezone``, for ``duration`` seconds.

    ``finish`` lets a pass that began inside go on after the end; otherwise it begins nothing new then. What has
    begun is always verified, and undone where it does not hold.
    """

    cron: str
    duration: float
    timezone: str = "UTC"
    finish: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """How a resource is treated, whatever its kind. Durations are seconds."""

    mode: Mode = Mode.ENFORCE
    interval: float | None = None
    """None: as often as the loop looks at anything."""
    retry_interval: float = 60.0
    max_attempts: int = 2
    depends_on: tuple[str, ...] = ()
    suspend: Suspension | None = None
    ignore: frozenset[str] = frozenset()
    allow_become: bool = False
    window: Window | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Guards over a whole pass. Shares are ``30%`` or a number of nodes; durations are seconds."""

    max_changed_nodes: str = "100%"
    batch_size: str = "50%"
    max_corrections: int = 5
    corrections_window: float = 3600.0
    quarantine: float = 86400.0
    unknown_alert_after: float = 900.0


def share(text: str, of: int) -> int:
    """How many of ``of`` nodes a share is: ``30%`` rounded down, but one at least."""
    return max(1, int(text[:-1]) * of // 100 if text.endswith("%") else int(text))


@dataclass(frozen=True, slots=True)
class Resource:
    """What git declares for one resource on one node, resolved: no references, patterns or files left.

    ``fields`` are compared with the node's facts; ``args`` only say how to look and how to fix.
    ``paths_written`` and ``paths_read`` are node paths: a change of the one makes the other's reader stale.
    """

    id: ResourceId
    check_type: str
    fields: Mapping[str, Any]
    args: Mapping[str, Any]
    policy: Policy = field(default_factory=Policy)
    depends_on: tuple[ResourceId, ...] = ()
    paths_written: frozenset[str] = frozenset()
    paths_read: frozenset[str] = frozenset()
    secret: bool = False
    declared_at: Mark | None = None
    digest: str = ""
    proposed: tuple[tuple[str, ...], ...] = ()
    """Commands of an analyzer that the policy lets run in place of the role's own fix."""
    confirm_within: float = 0.0
    """Seconds after which the node undoes a change by itself unless it was confirmed over a new login; 0: never."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What a node said of one resource: facts, or the reason why they are unknown (never both)."""

    id: ResourceId
    facts: Mapping[str, Any] | None = None
    unknown: str = ""

    @property
    def is_known(self) -> bool:
        """Whether there are facts to compare with."""
        return self.facts is not None


@dataclass(frozen=True, slots=True)
class NodeState:
    """How looking at one node went. ``seconds`` is None when it never answered."""

    node: str
    reachable: bool
    reason: str = ""
    transport: str = ""
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything one look brought back."""

    nodes: Mapping[str, NodeState]
    observations: Mapping[ResourceId, Observation]

    def merged(self, newer: Observed) -> Observed:
        """One look with what a newer one says in its place."""
        return Observed({**self.nodes, **newer.nodes}, {**self.observations, **newer.observations})


@dataclass(frozen=True, slots=True)
class Change:
    """One declared field that the node does not have as declared.

    ``fixable`` is False where the product only reports (a column of another type); ``note`` then says why.
    ``diff`` is a unified text diff, observed to desired, where both are text.
    """

    field: str
    desired: Any
    observed: Any
    fixable: bool = True
    note: str = ""
    diff: str = ""


@dataclass(frozen=True, slots=True)
class Drift:
    """The declared fields of one resource that differ; never empty."""

    id: ResourceId
    changes: tuple[Change, ...]

    @property
    def fixable(self) -> tuple[Change, ...]:
        """The changes that a role may make."""
        return tuple(change for change in self.changes if change.fixable)

    @property
    def reported(self) -> tuple[Change, ...]:
        """The changes that only a person may make."""
        return tuple(change for change in self.changes if not change.fixable)


@dataclass(frozen=True, slots=True)
class Action:
    """Something that will be done: make these changes, once everything in ``after`` is as desired.

    ``because`` names the resource whose repair makes this one necessary; empty for drift that was seen.
    ``attempt`` names backups and journal on the node; ``number`` counts attempts within the episode, from 1.
    ``resumed`` says that the attempt was begun by a pass that did not live to its end.
    """

    id: ResourceId
    changes: tuple[Change, ...]
    after: frozenset[ResourceId] = frozenset()
    because: str = ""
    attempt: str = ""
    number: int = 1
    resumed: bool = False
    is_risky: bool = False
    """Whether it could lock us out: it is done apart from what takes long, as it has to be confirmed in time."""
    writers: frozenset[ResourceId] = frozenset()
    """Those of ``after`` that are going to write a file which this one reads."""
    before: tuple[Change, ...] = ()
    """What differed when the attempt began, where it is ``resumed``: what its undo has to bring back."""


@dataclass(frozen=True, slots=True)
class OpenAttempt:
    """An attempt that was begun and has no end on record: whoever began it is still at it, or died.

    ``before`` is what differed when it was begun, to tell whether an undo brought that back.
    """

    id: ResourceId
    attempt: str
    number: int
    digest: str
    is_undoing: bool = False
    before: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class Repairs:
    """What has been tried on one resource. ``attempts`` failed in a row, for the declaration ``digest``.

    ``corrections`` counts how often it was put right lately though nobody had changed its declaration.
    """

    attempts: int = 0
    digest: str = ""
    last_attempt: datetime | None = None
    next_attempt: datetime | None = None
    exhausted: bool = False
    corrections: int = 0
    quarantined_until: datetime | None = None
    open: OpenAttempt | None = None


@dataclass(frozen=True, slots=True)
class Skip:
    """Something that will not be done, and why, though the node is not as declared.

    ``code`` is the reason as a constant, for conditions, alerts and programs; ``reason`` is for people.
    """

    id: ResourceId
    reason: str
    changes: tuple[Change, ...] = ()
    is_failure: bool = False
    code: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pass is going to do, in order, and what it leaves alone."""

    actions: tuple[Action, ...] = ()
    skips: tuple[Skip, ...] = ()


class Status(StrEnum):
    """The statuses of events; the last three are terminal."""

    DETECTED = "detected"
    FIXING = "fixing"
    FIXED = "fixed"
    FAILED = "failed"
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one action ended. ``fixed`` is said only after the node was looked at again.

    ``backup`` names the copies that were made on the node before anything was changed.
    """

    id: ResourceId
    status: Status
    detail: str = ""
    changes: tuple[Change, ...] = ()
    severity: int = 2
    number: int = 1
    backup: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """One row of ``guardian_events``: the durable record. Severity 1 (note) to 5 (act now)."""

    id: ResourceId
    check_type: str
    status: Status
    severity: int
    details: Mapping[str, Any]
    fix_attempts: int = 0
    timestamp: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that a person has to hear of, once per episode. Severity as in events: 3 to 5.

    ``key`` is what it is about: an issue key, the name of a node, or ``fleet``. ``reason`` is a constant in
    CamelCase; ``detail`` says it in words. ``advice`` is the next step for a person.
    """

    key: str
    reason: str
    severity: int
    detail: str
    advice: str = ""
    node: str = ""
    changes: tuple[Change, ...] = ()
    to: tuple[str, ...] = ()
    """Audiences that it is for; empty: for everybody."""


@dataclass(frozen=True, slots=True)
class Notice:
    """What people have to hear of as long as a node says it, repaired or not; its fields are those of an alert."""

    reason: str
    severity: int
    detail: str
    advice: str = ""
    to: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CommonCause:
    """One reason why many differ, told once for the fleet, and not for each that differs in nothing but ``fields``."""

    notice: Notice
    fields: frozenset[str]


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured value as Prometheus has it: name, labels, number, and what the name means."""

    name: str
    labels: Mapping[str, str]
    value: float
    help: str


@dataclass(frozen=True, slots=True)
class Question:
    """What an analyzer is asked about one new or recurring issue. Already redacted: no secrets, no file contents.

    ``desired`` is what is declared, less bodies; ``recurrence`` counts the episodes of this issue key, this one
    included; ``history`` are its last events, newest first, each ``{timestamp, status, reason}``.
    ``needs_plan`` is set where no rule of the product covers the fix.
    """

    id: ResourceId
    check_type: str
    desired: Mapping[str, Any]
    changes: tuple[Change, ...]
    reason: str = ""
    recurrence: int = 1
    history: tuple[Mapping[str, Any], ...] = ()
    needs_plan: bool = False


@dataclass(frozen=True, slots=True)
class Analysis:
    """An analyzer's judgement, validated. Data: nothing in it ever runs without the policy's leave.

    ``install`` is an install method in the words of the desired state (``{"npm": "jq-cli"}``); ``commands`` are
    argument vectors. ``prevention`` is filled from the third recurrence on. ``backend`` says who judged.
    """

    severity: int
    root_cause: str
    plan: str = ""
    install: Mapping[str, Any] | None = None
    commands: tuple[tuple[str, ...], ...] = ()
    prevention: str = ""
    backend: str = "rules"


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a playbook within a pass, for the report: what ran and what it cost in seconds."""

    playbook: str
    nodes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """All that one pass has to say."""

    run_id: str
    revision: str
    check: bool
    started: datetime
    seconds: float
    observed: Observed
    drifts: Mapping[ResourceId, Drift]
    plan: Plan
    outcomes: tuple[Outcome, ...]
    runs: tuple[Run, ...]
    resources: Mapping[ResourceId, Resource]
    limited: bool = False
    """Whether it looked at a part of the fleet only."""
    declared: Mapping[ResourceId, Resource] = field(default_factory=dict)
    """Everything that passes of this scope look at, also what was left out this time."""
    limits: Limits = field(default_factory=Limits)

    @property
    def unknown(self) -> tuple[Observation, ...]:
        """Resources whose state the pass could not learn."""
        return tuple(o for o in self.observed.observations.values() if not o.is_known)

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of the pass, by the precedence 3, 4, 2, 0 (1 never gets as far as a report)."""
        failed = any(o.status in (Status.FAILED, Status.ROLLED_BACK) for o in self.outcomes)
        reported = any(skip.is_failure for skip in self.plan.skips)
        if (failed or reported) and not self.check:
            return ExitCode.NOT_FIXED
        if self.unknown:
            return ExitCode.UNKNOWN
        # What is only warned about or suspended is drift all the same: 0 would say that all is as desired.
        if (self.check and self.drifts) or self.plan.skips:
            return ExitCode.DRIFT
        return ExitCode.AS_DESIRED
