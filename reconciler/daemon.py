"""Continuous mode: a pass whenever something is due, until asked to end.

One thread waits and runs the passes; Ansible runs in supervised children. Whoever wants something of it (a signal,
the store's requests, a new revision, the clock) only makes it wake up.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from types import FrameType

from reconciler import asks, assemble, systemd
from reconciler.api.server import Server
from reconciler.api.state import DaemonState
from reconciler.asks import Ask
from reconciler.assemble import Scope
from reconciler.attempts import LOOP_BUDGET, loop_pause
from reconciler.instance import instance
from reconciler.kinds.base import seconds
from reconciler.lease import BusyError
from reconciler.logs import Log
from reconciler.model import (
    Alert,
    ConfigurationError,
    ExitCode,
    LeaseLostError,
    Report,
    ResourceId,
    RunError,
)
from reconciler.revisions import Follower, InForce
from reconciler.schedule import Schedule
from reconciler.settings import Settings
from reconciler.store import Store, StoreError

JITTER = 0.1
# Somebody is told of a repository that cannot be asked for so long.
UNREACHABLE_SECONDS = 900.0
SHOWN_PROBLEMS = 5


class _AbandonedError(BaseException):
    """The pass under way did not end in the time it was given: unwind, and leave the rest to the next start."""


@dataclass(frozen=True)
class Wish:
    """Why a pass is made and over what."""

    why: str
    rested: frozenset[ResourceId] = frozenset()
    asked: tuple[Ask, ...] = ()
    retry: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        """Empty: everything."""
        return tuple({ask.target for ask in self.asked if ask.target})


@dataclass(frozen=True)
class Ended:
    """How a pass ended. ``could_run`` is False where it is our own trouble that it could not be made."""

    result: str
    code: int
    report: Report | None = None
    problem: str = ""
    could_run: bool = True


@dataclass
class Counts:
    """Since the start."""

    passes: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    failures: int = 0
    """In a row."""


class Daemon:
    """One per database. ``reload`` reads the settings; ``hear`` is told of every report.

    With ``pull`` the repository around the desired state is followed where the settings name none.
    """

    def __init__(
        self,
        reload: Callable[[], Settings],
        scope: Scope,
        hear: Callable[[Report], None],
        log: Log,
        *,
        pull: bool = False,
    ) -> None:
        self.reload, self.scope, self.hear, self.log, self.pull = reload, scope, hear, log, pull
        self.settings = reload()
        self.schedule = Schedule(seconds(self.settings.interval))
        self.counts = Counts()
        self.running_since: datetime | None = None
        self.problems: dict[str, str] = {}
        self.revision = ""
        self.stopping = False
        self._follower: Follower | None = None
        self._fetch_at = 0.0
        self._reachable = time.monotonic()
        self._silent: set[str] = set()
        self._wake = threading.Event()
        self._signals: set[int] = set()
        self._waiting = 0

    # --- from start to end ---

    def run(self) -> int:
        """Until SIGTERM or SIGINT. The exit code of the last pass; 3 where passes kept failing. Raises BusyError."""
        with instance(self.settings.db), self._signalled(), self._serving():
            self._follow()
            systemd.notify("READY=1", "STATUS=looking for the first time")
            self.log.say("info", "started", interval=self.settings.interval, db=str(self.settings.db))
            code = int(ExitCode.AS_DESIRED)
            while (wish := self._next()) is not None:
                ended = self._pass(wish)
                code = ended.code
                if self.counts.failures >= LOOP_BUDGET:
                    self.log.say(
                        "error", "ending, for a supervisor to start anew", failures=self.counts.failures
                    )
                    return int(ExitCode.NOT_FIXED)
            systemd.notify("STOPPING=1")
            self.log.say("info", "ended in order")
            return code

    @contextmanager
    def _signalled(self) -> Iterator[None]:
        handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM)
        before = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """Answer over HTTP meanwhile, from a thread that only reads the store. Raises ConfigurationError."""
        if not self.settings.http.enabled:
            yield
            return
        server = Server(self.settings, self.state)
        server.start()
        self.log.say("info", "answering over HTTP", url=server.url)
        try:
            yield
        finally:
            server.stop()

    def state(self) -> DaemonState:
        """For whoever looks from another thread: nothing here changes under them."""
        passes = self.counts.passes
        return DaemonState(
            running_since=self.running_since, next_pass=self.next_pass(), queue=self._waiting, revision=self.revision,
            problems=tuple(self.problems.values()), errors=self.counts.errors,
            passes={result: passes[result] for result in UNRECORDED if passes[result]}, stopping=self.stopping,
        )  # fmt: skip

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            if self.running_since is not None and (self.stopping or number == signal.SIGALRM):
                raise _AbandonedError  # asked twice, or out of time
            if number != signal.SIGALRM and not self.stopping:
                self.stopping = True
                signal.setitimer(signal.ITIMER_REAL, seconds(self.settings.stop_timeout))
        else:
            self._signals.add(number)
        self._wake.set()

    def _taken(self, number: int) -> bool:
        """Whether this signal has come since it was last asked for."""
        found = number in self._signals
        self._signals.discard(number)
        return found

    # --- what is next ---

    def _next(self) -> Wish | None:
        """Wait until something is wanted; None to end."""
        while not self.stopping:
            systemd.alive()
            if self._taken(signal.SIGHUP):
                self._reload()
            wish = self._wanted()
            if wish is not None:
                return wish
            self._wake.wait(1.0)
            self._wake.clear()
        return None

    def _wanted(self) -> Wish | None:
        asked = self._asked()
        if asked:
            return Wish("asked for", asked=asked, retry=True)
        if self._taken(signal.SIGUSR1):
            return Wish("signal", retry=True)
        if self._fetched():
            return Wish("new revision", retry=True)
        rested = self.schedule.rested(time.monotonic())
        return None if rested is None else Wish("due", rested)

    def _asked(self) -> tuple[Ask, ...]:
        """The oldest request, with those for the same: what one asker mistyped is no other's trouble."""
        if not self.settings.db.exists():
            return ()
        with suppress(StoreError, ConfigurationError), closing(Store(self.settings.db)) as store:
            found = asks.waiting(store)
            self._waiting = len(found)
            return tuple(ask for ask in found if ask.target == found[0].target)
        return ()

    def _fetched(self) -> bool:
        """Whether the repository, asked when it is time to, holds another revision now."""
        now = time.monotonic()
        if self._follower is None or now < self._fetch_at:
            return False
        self._fetch_at = now + seconds(self.settings.git.interval)
        is_new = self._follower.fetch()
        if not self._follower.unreachable:
            self._reachable = now
        why = self._follower.unreachable
        lasting = why if now - self._reachable >= UNREACHABLE_SECONDS else ""
        advice = (
            "passes go on with the last good revision; is the address right, and does git fetch work here?"
        )
        self._tell("RepositoryUnreachable", lasting, advice)
        if why != self.problems.get("fetch", ""):
            event = "repository unreachable" if why else "repository is back"
            self.log.say("warning" if why else "info", event, reason=why)
        self._problem("fetch", why)
        return is_new

    def _reload(self) -> None:
        systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            self.settings = self.reload()
            self._follow()
            self.schedule = Schedule(seconds(self.settings.interval))
            self._problem("settings", "")
            self.log.say("info", "settings read again")
        except ConfigurationError as error:
            self._problem("settings", str(error))
            self.log.say("error", "the settings are wrong; going on with those before", reason=str(error))
        systemd.notify("READY=1")

    def _follow(self) -> None:
        """Follow the repository of the settings, or none."""
        self._follower = Follower.of(self.settings) if self.pull or self.settings.git.url else None
        self._fetch_at = 0.0

    # --- one pass ---

    def _pass(self, wish: Wish) -> Ended:
        began = time.monotonic()
        self.running_since = datetime.now(UTC)
        systemd.notify("STATUS=a pass is under way")
        self._mark_taken(wish.asked)
        try:
            ended = self._attempted(wish)
        except _AbandonedError:
            ended = Ended("abandoned", int(ExitCode.NOT_FIXED), problem="it was left for the next start")
        finally:
            self.running_since = None
        self._note(wish, ended, began)
        return ended

    def _attempted(self, wish: Wish) -> Ended:
        """Make the pass; what it raises becomes how it ended, here and nowhere else."""
        try:
            found = self._in_force()
            scope = replace(
                self.scope, retry=wish.retry, targets=wish.targets, rested=wish.rested, next_in=self.schedule.interval,
                revision=found.revision if self._follower else None,
            )  # fmt: skip
            report = assemble.one_pass(found.settings, scope, _ignore, _ignore, self.log.event)
        except ConfigurationError as error:
            return self._invalid(error, wish)
        except BusyError as error:
            return Ended("busy", int(ExitCode.CONFIGURATION), problem=str(error))
        except LeaseLostError as error:
            return Ended("lease_lost", int(ExitCode.NOT_FIXED), problem=str(error))
        except (RunError, StoreError) as error:
            return Ended("error", int(ExitCode.CONFIGURATION), problem=str(error), could_run=False)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this pass and not the others
            self.log.say("error", "the pass ended with an error of its own", exc_info=True)
            return Ended("error", int(ExitCode.NOT_FIXED), problem=repr(error), could_run=False)
        self.revision = report.revision
        self.hear(report)
        self._tell("DesiredStateInvalid", "")
        return Ended(RESULTS[report.exit_code], int(report.exit_code), report)

    def _in_force(self) -> InForce:
        if self._follower is None:
            return InForce(self.settings, "")
        found = self._follower.in_force()
        told = _listed(found.problems)
        kept = f"revision {found.rejected} is not carried out, {found.revision} stays in force"
        detail = f"{kept}: {told}" if told else ""
        if detail and detail != self.problems.get("revision"):
            self.log.say(
                "error", "revision rejected", revision=found.rejected, kept=found.revision, reason=told
            )
        self._problem("revision", detail)
        self._tell(
            "RevisionRejected", detail, "mend it in the repository; until then the last good revision counts"
        )
        return found

    def _invalid(self, error: ConfigurationError, wish: Wish) -> Ended:
        """Nothing was touched. A request for what does not exist is the asker's mistake, anything else is told."""
        told = _listed(tuple(error.problems))
        if wish.targets and all("nothing that is declared" in problem.message for problem in error.problems):
            return Ended("refused", int(ExitCode.CONFIGURATION), problem=told)
        self._tell("DesiredStateInvalid", told, "mend it: reconcile validate; until then nothing is touched")
        return Ended("invalid", int(ExitCode.CONFIGURATION), problem=told)

    def _note(self, wish: Wish, ended: Ended, began: float) -> None:
        """What follows from how a pass ended: when the next one is, what is logged, who is told."""
        counts = self.counts
        counts.passes[ended.result] += 1
        counts.errors += not ended.could_run
        counts.failures = 0 if ended.could_run else counts.failures + 1
        self._problem("pass", "" if ended.report else ended.problem)
        self.schedule.jitter = random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - spreads load, guards nothing
        if ended.report:
            self._plan_next(ended.report, began)
        elif ended.result != "refused":
            self.schedule.missed(began, loop_pause(self.schedule.interval, counts.failures))
        self._mark_done(wish.asked, ended)
        self._log_end(wish, ended, time.monotonic() - began)
        if not self.stopping:
            assemble.tell(self.settings)
        systemd.notify(f"STATUS=last pass: {ended.result}")

    def _plan_next(self, report: Report, began: float) -> None:
        retries: dict[ResourceId, float] = {}
        now = datetime.now(UTC)
        with suppress(StoreError, ConfigurationError), closing(Store(self.settings.db)) as store:
            for rid, repairs in store.history(report.limits, now).items():
                # What was due and was not tried has a reason to wait that no clock ends: its own turn will do.
                if repairs.next_attempt and repairs.next_attempt > now:
                    retries[rid] = time.monotonic() + (repairs.next_attempt - now).total_seconds()
        self.schedule.seen(report.observed.observations, report.declared.values(), began, retries)

    def next_pass(self) -> datetime | None:
        """When the next pass is due by the clock; None while nothing is known or one is under way."""
        at = self.schedule.next_at()
        if at is None or self.running_since is not None:
            return None
        return datetime.now(UTC) + timedelta(seconds=max(0.0, at - time.monotonic()))

    # --- words ---

    def _problem(self, name: str, text: str) -> None:
        """What ``/readyz`` gives as a reason; empty: it is over. Replaced, never changed: another thread reads it."""
        others = {key: value for key, value in self.problems.items() if key != name}
        self.problems = {**others, name: text} if text else others

    def _tell(self, reason: str, detail: str, advice: str = "") -> None:
        """Open an alert about the fleet as a whole, or end it (no detail); delivered with those of the pass."""
        with suppress(StoreError, ConfigurationError), closing(Store(self.settings.db)) as store:
            bell, now = assemble.bell(self.settings, store), datetime.now(UTC)
            if detail:
                bell.raise_(Alert("fleet", reason, 4, detail, advice), {"revision": self.revision}, now)
            elif "fleet" in bell.open_keys():
                bell.resolve("fleet", now, only=reason)

    def _mark_taken(self, asked: tuple[Ask, ...]) -> None:
        if asked:
            with suppress(StoreError, ConfigurationError), closing(Store(self.settings.db)) as store:
                asks.take(store, asked)

    def _mark_done(self, asked: tuple[Ask, ...], ended: Ended) -> None:
        if asked:
            run_id = ended.report.run_id if ended.report else ""
            with suppress(StoreError, ConfigurationError), closing(Store(self.settings.db)) as store:
                asks.done(store, asked, run_id, ended.code, ended.problem)

    def _log_end(self, wish: Wish, ended: Ended, took: float) -> None:
        report = ended.report
        if report is None:
            level = "info" if ended.result in ("busy", "abandoned") else "error"
            self.log.say(level, "no pass", why=wish.why, result=ended.result, reason=ended.problem)
            return
        silent = {name: state.reason for name, state in report.observed.nodes.items() if not state.reachable}
        for name in sorted(silent.keys() - self._silent):
            self.log.say("warning", "node unknown", run=report.run_id, node=name, reason=silent[name])
        back = {name for name in self._silent if name in report.observed.nodes} - silent.keys()
        for name in sorted(back):
            self.log.say("info", "node answers again", run=report.run_id, node=name)
        self._silent = (self._silent - back) | silent.keys()
        outcomes = Counter(outcome.status.value for outcome in report.outcomes)
        self.log.say(
            "info", "pass", run=report.run_id, why=wish.why, result=ended.result, revision=report.revision,
            seconds=round(took, 2), nodes=len(report.observed.nodes), resources=len(report.observed.observations),
            unknown=len(report.unknown) or None, left=len(report.plan.skips) or None, **outcomes,
        )  # fmt: skip


# Ends of passes that left no record in the store.
UNRECORDED = ("abandoned", "busy", "error", "invalid", "lease_lost", "refused")
RESULTS = {
    ExitCode.AS_DESIRED: "as_desired",
    ExitCode.CONFIGURATION: "invalid",
    ExitCode.DRIFT: "drift",
    ExitCode.NOT_FIXED: "not_fixed",
    ExitCode.UNKNOWN: "unknown",
}


def _listed(problems: tuple[object, ...]) -> str:
    """Problems in one line, the first few."""
    shown = "; ".join(map(str, problems[:SHOWN_PROBLEMS]))
    more = len(problems) - SHOWN_PROBLEMS
    return shown + (f"; and {more} more" if more > 0 else "")


def _ignore(*_values: object) -> None:
    """Progress is for people who watch."""
