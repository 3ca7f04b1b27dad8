"""Puts a pass together from settings: the one place where the parts meet."""

from __future__ import annotations

import logging
import secrets
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Self

from reconciler import providers, runner
from reconciler.alerts import Alerts
from reconciler.analyze import Analyzer
from reconciler.converge import Converger
from reconciler.desired.load import Desired, load
from reconciler.desired.places import pattern_hint, suggestion
from reconciler.inventory import Inventory
from reconciler.kinds.base import seconds
from reconciler.kinds.registry import kinds
from reconciler.lease import Lease
from reconciler.loop import Pass, Wishes
from reconciler.model import ConfigurationError, Event, NodeState, Problem, Report, ResourceId, Run
from reconciler.notify import Notifier
from reconciler.observe import PLAYBOOK, Observer
from reconciler.plan import covers
from reconciler.proposals import Judge, overlaid
from reconciler.record import Context, Recorder
from reconciler.revisions import Follower
from reconciler.settings import AnalysisSettings, Settings
from reconciler.store import Store, StoreError

TELL_SECONDS = 10.0


@dataclass(frozen=True)
class Scope:
    """Which part of the fleet a pass looks at, and whether it may change anything."""

    limit: str | None = None
    kinds: tuple[str, ...] | None = None
    check: bool = False
    retry: bool = False
    allow_mass_change: bool = False
    next_in: float | None = None
    """Seconds from the start of this pass to the next one, where there will be one."""
    targets: tuple[str, ...] = ()
    """Only what one of these covers: NODE, NODE/KIND or NODE/KIND/NAME."""
    rested: frozenset[ResourceId] = frozenset()
    """What was looked at lately and may be left out."""
    revision: str | None = None
    """The revision of the desired state, where whoever chose it knows; else its repository is asked."""

    @property
    def is_limited(self) -> bool:
        """Whether the pass is over a part of the fleet."""
        return self.limit is not None or self.kinds is not None or bool(self.targets or self.rested)


def located(settings: Settings) -> Settings:
    """Settings whose paths lead to the desired state: where it lives in git, to the revision in force.

    Raises ConfigurationError.
    """
    if not settings.git.url:
        return settings
    follower = Follower.of(settings)
    if follower.mirror.fetched() is None:
        follower.fetch()
    return follower.in_force().settings


def desired_state(settings: Settings, scope: Scope) -> tuple[Desired, Desired, Inventory]:
    """Everything declared, the part in scope, and the inventory. Raises ConfigurationError."""
    inventory = Inventory(settings.inventory)
    desired = load(settings.desired, inventory)
    if scope.kinds == ():
        raise ConfigurationError([Problem("--kind names no kind", hint="known: " + ", ".join(kinds()))])
    for kind in scope.kinds or ():
        if kind not in kinds():
            raise ConfigurationError(
                [Problem(f"--kind: there is no kind {kind!r}", hint=suggestion(kind, list(kinds())))]
            )
    nodes = inventory.nodes
    if scope.limit is not None:
        try:
            nodes = inventory.match(scope.limit)
        except LookupError as error:
            hint = pattern_hint(scope.limit, [*inventory.nodes, *inventory.groups])
            raise ConfigurationError([Problem(f"--limit: {error}", hint=hint)]) from None
    return desired, desired.of(nodes, scope.kinds), inventory


def _selected(wanted: Desired, scope: Scope) -> Desired:
    """What this pass looks at of what is in scope. Raises ConfigurationError."""
    if scope.targets:
        wanted = _covered(wanted, scope.targets)
    return wanted.without(scope.rested) if scope.rested else wanted


def _covered(wanted: Desired, targets: Sequence[str]) -> Desired:
    """What somebody asked for by name. Raises ConfigurationError where a name means nothing."""
    for target in targets:
        if not any(covers(target, rid) for rid in wanted.resources):
            known = [*{rid.node for rid in wanted.resources}, *map(str, wanted.resources)]
            hint = suggestion(target, sorted(known))
            raise ConfigurationError([Problem(f"nothing that is declared is called {target}", hint=hint)])
    kept = {
        rid: found
        for rid, found in wanted.resources.items()
        if any(covers(target, rid) for target in targets)
    }
    return replace(wanted, resources=kept)


def one_pass(
    settings: Settings,
    scope: Scope,
    on_run: Callable[[str, int], None],
    on_node: Callable[[NodeState], None],
    on_event: Callable[[Event], None] = lambda _event: None,
) -> Report:
    """Run one pass; ``on_event`` hears of everything that is put on record.

    Raises ConfigurationError, BusyError (another pass is under way), RunError or LeaseLostError.
    """
    how = runner.Settings(
        settings.inventory, settings.forks, seconds(settings.timeout), seconds(settings.idle_timeout)
    )
    with ExitStack() as stack:
        ahead = stack.enter_context(runner.Workspace())
        ahead.start_ahead(PLAYBOOK, how)  # it takes as long to start as the desired state takes to read
        desired, in_scope, inventory = desired_state(settings, scope)
        wanted = _selected(in_scope, scope)
        run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        # Looking disturbs nobody: only a pass that may act has to be alone.
        lease = None
        if not scope.check:
            lease = stack.enter_context(Lease(settings.db, run_id, seconds(settings.lease)))
        store = stack.enter_context(closing(Store(settings.db)))
        proposals = store.proposals()
        desired, wanted = overlaid(desired, proposals), overlaid(wanted, proposals)
        revision = git_revision(settings.desired) if scope.revision is None else scope.revision
        context = Context(run_id, revision, lease.epoch if lease else None, scope.next_in, on_event)
        known = providers.asked(settings.sidecar, wanted)
        desired, wanted = providers.overlaid(desired, known), providers.overlaid(wanted, known)
        runs: list[Run] = []
        clock = stack.enter_context(_RunClock(runs, on_run))
        observer = Observer(how, inventory.variables, clock.start, on_node, ahead)
        stack.enter_context(closing(observer))
        if lease and lease.fence_due:
            # A pass over a part of the fleet tells that part, and leaves it to a whole one to tell all.
            observer.fence(lease.epoch, lambda: None if scope.is_limited else lease.fenced())
        fleet = providers.standing(settings.sidecar, known)
        recorder = Recorder(store, desired, context, bell(settings, store), fleet)
        converger = Converger(how, observer, desired, recorder, clock.start)
        wishes = Wishes(
            check=scope.check, retry=scope.retry, allow_mass_change=scope.allow_mass_change,
            limited=scope.is_limited, fleet=len({rid.node for rid in desired.resources}),
        )  # fmt: skip
        judge = Judge(_analyzer(settings.analysis), settings.analysis, store, desired)
        report = Pass(wanted, observer, converger, recorder, wishes, runs, judge.judge).run()
        return replace(report, declared=in_scope.resources, limits=desired.limits)


@cache
def _analyzer(settings: AnalysisSettings) -> Analyzer:
    """One for the life of the process: it remembers which backends are not worth a call."""
    return Analyzer(settings)


def bell(settings: Settings, store: Store) -> Alerts:
    """Where alerts go: rows of the store, files, routes."""
    return Alerts(store, settings.alert_dir, settings.notify)


def tell(settings: Settings, deadline_seconds: float = TELL_SECONDS) -> None:
    """Bring alert files and notifications up to what is known, after the pass: it neither fails nor delays one."""
    now = datetime.now(UTC)
    try:
        with closing(Store(settings.db)) as store:
            bell(settings, store).settle(now)
            Notifier(store, settings.notify).deliver(now, deadline_seconds)
    except (StoreError, ConfigurationError) as error:
        logging.getLogger(__name__).warning("nobody could be told: %s; the next pass tries again", error)


class _RunClock:
    """Notes which playbooks ran and for how long: each lasts until the next begins."""

    def __init__(self, runs: list[Run], on_run: Callable[[str, int], None]) -> None:
        self.runs, self.on_run = runs, on_run
        self.started: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end()

    def start(self, playbook: str, nodes: int) -> None:
        self._end()
        self.started = time.monotonic()
        self.runs.append(Run(playbook, nodes, 0.0))
        self.on_run(playbook, nodes)

    def _end(self) -> None:
        if self.started is not None and self.runs:
            last = self.runs[-1]
            self.runs[-1] = Run(last.playbook, last.nodes, time.monotonic() - self.started)
        self.started = None


def git_revision(directory: Path) -> str:
    """The commit that the desired state is at, with ``+changes`` where files differ from it; empty outside git."""
    git = ["git", "-C", str(directory)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
        if head.returncode != 0:
            return ""
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", "."],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
