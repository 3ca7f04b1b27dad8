"""All lanes together, and the bounded, deadline-aware queue in front of them."""

import asyncio
import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sidecar.clock import Clock
from sidecar.lane import Grant, Lane, Query
from sidecar.model import Backend
from sidecar.routing import Decision, Way, decide
from sidecar.settings import HotSettings

_LEAST_TICK_SECONDS = 0.001


@dataclass(eq=False)
class NoRoom(Exception):  # noqa: N818 - an answer to give, not a fault
    """The request cannot be admitted in time.

    `retry_after` is when it could be (seconds from now), `code` a constant word.
    """

    code: str
    message: str
    retry_after: float


class NoBackend(Exception):  # noqa: N818 - the same
    """Nothing is left to try; `decision` says why."""

    def __init__(self, decision: Decision) -> None:
        super().__init__("no backend left")
        self.decision = decision


class Waiter:
    """One queued request."""

    __slots__ = ("future", "query")

    def __init__(self, query: Query, future: "asyncio.Future[tuple[Grant, Decision]]") -> None:
        self.query = query
        self.future = future


class Fleet:
    """The lanes and the queue. Everything but `admit` is synchronous, hence atomic."""

    def __init__(self, clock: Clock, hot: HotSettings) -> None:
        self.clock = clock
        self.hot = hot
        self.lanes: dict[str, Lane] = {}
        self.draining = False
        self.emergencies = 0
        self.on_wait: Callable[[float], None] = lambda _seconds: None
        self._waiters: dict[int, Waiter] = {}
        self._tickets = 0
        self._timer: asyncio.TimerHandle | None = None

    # -- configuration -------------------------------------------------------------

    def replace(self, backends: Iterable[Backend]) -> None:
        """Take over a new list of backends, keeping what is known of those that stay."""
        wanted = {backend.id: backend for backend in backends}
        for gone in self.lanes.keys() - wanted.keys():
            del self.lanes[gone]
        for backend in wanted.values():
            lane = self.lanes.get(backend.id)
            if lane is None:
                self.lanes[backend.id] = Lane(backend, self.hot)
            elif lane.backend is not backend:
                lane.configure(backend, self.hot)
        self.wake()

    def apply(self, hot: HotSettings) -> None:
        """Take over changed settings."""
        self.hot = hot
        for lane in self.lanes.values():
            lane.apply(hot)
        self.wake()

    def drain(self) -> None:
        """Refuse everything that still waits, and everything that would have to."""
        self.draining = True
        for waiter in self._waiters.values():
            if not waiter.future.done():
                waiter.future.set_exception(NoRoom("draining", "the sidecar is shutting down", 1.0))

    # -- admission -------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """Requests waiting."""
        return len(self._waiters)

    def look(self, query: Query) -> Decision:
        """What would be decided now, without taking anything."""
        return decide(self.lanes.values(), query, self.clock.now(), self.hot.cooldown_precheck_seconds)

    def try_take(self, query: Query) -> tuple[Grant | None, Decision]:
        """Decide and take at once; no grant means wait or give up, as the decision says."""
        now = self.clock.now()
        decision = decide(self.lanes.values(), query, now, self.hot.cooldown_precheck_seconds)
        emergency = decision.way is Way.EMERGENCY
        for lane in decision.order:
            grant = lane.take(now, query.tokens, emergency=emergency)
            if grant is not None:
                self.emergencies += emergency
                return grant, decision
        return None, decision

    async def admit(self, query: Query, budget: float) -> tuple[Grant, Decision]:
        """A grant, after waiting in line if need be, for at most `budget` seconds.

        Raises NoBackend when nothing is left to try, NoRoom when the wait would be too long.
        """
        if not self._line_before(query):
            grant, decision = self.try_take(query)
            if grant is not None:
                return grant, decision
            if decision.way is Way.NONE:
                raise NoBackend(decision)
        return await self._wait(query, budget)

    async def _wait(self, query: Query, budget: float) -> tuple[Grant, Decision]:
        wait = self.estimate(query)
        limit = min(self.hot.queue_timeout_seconds, budget)
        if self.draining:
            raise NoRoom("draining", "the sidecar is shutting down", 1.0)
        if len(self._waiters) >= self.hot.queue_max_depth:
            raise NoRoom("queue_full", "too many requests are waiting already", wait)
        if wait > limit:
            raise NoRoom("rate_limited", f"no backend has a token for the next {math.ceil(wait)} s", wait)
        began = self.clock.now()
        self._tickets += 1
        ticket = self._tickets
        waiter = Waiter(query, asyncio.get_running_loop().create_future())
        self._waiters[ticket] = waiter
        self._arm()
        taken = None
        try:
            async with asyncio.timeout(limit):
                taken = await waiter.future
                return taken
        except TimeoutError:
            raise NoRoom("queue_timeout", "no token came free in time", self.estimate(query)) from None
        finally:
            del self._waiters[ticket]
            self.on_wait(self.clock.now() - began)
            if taken is None:
                self._return_unused(waiter.future)

    def _return_unused(self, future: "asyncio.Future[tuple[Grant, Decision]]") -> None:
        """A grant that came in the same instant as a timeout or the caller's leaving goes to the next."""
        if future.cancel() or future.cancelled() or future.exception() is not None:
            return
        grant, _ = future.result()
        grant.lane.give_back(grant, self.clock.now())
        self.wake()

    def _line_before(self, query: Query) -> bool:
        if not self._waiters:
            return False
        return any(w.query.model == query.model and w.query.api == query.api for w in self._waiters.values())

    def estimate(self, query: Query) -> float:
        """Seconds until this request could start, counting those who wait before it."""
        now = self.clock.now()
        lanes = [lane for lane in self.lanes.values() if self._usable(lane, query)]
        ahead = sum(1 for w in self._waiters.values() if any(self._usable(lane, w.query) for lane in lanes))
        if not lanes:
            return 1.0
        slots = heapq.merge(*(self._slots(lane, query, now) for lane in lanes))
        at = next(at for index, at in enumerate(slots) if index >= ahead)
        return max(0.0, min(at, self._emergency_at(lanes, now, ahead)) - now)

    @staticmethod
    def _emergency_at(lanes: list[Lane], now: float, ahead: int) -> float:
        """When the emergency lane has a start, if every lane rests; else never."""
        if not lanes or any(not lane.resting(now) for lane in lanes):
            return math.inf
        nearest = min(lanes, key=lambda lane: (lane.rests_until(), lane.backend.id))
        return max(nearest.emergency.free_at(now, ahead), nearest.starts.free_at(now, ahead))

    @staticmethod
    def _slots(lane: Lane, query: Query, now: float) -> Iterator[float]:
        ahead = 0
        while True:
            yield lane.free_at(now, query.tokens, ahead)
            ahead += 1

    @staticmethod
    def _usable(lane: Lane, query: Query) -> bool:
        backend = lane.backend
        return (
            backend.enabled
            and not lane.quarantine
            and not backend.key_error
            and backend.api == query.api
            and backend.serves(query.model)
            and backend.id not in query.tried
        )

    # -- waking ------------------------------------------------------------------------

    def wake(self) -> None:
        """Something changed (a token came back, a cooldown was cleared): serve the line."""
        if not self._waiters:
            return
        blocked: set[Query] = set()
        for waiter in list(self._waiters.values()):
            if waiter.future.done():
                continue
            # First in first out per model: whoever could not start blocks those behind
            # him who want the same, whatever they would need of it.
            key = Query(waiter.query.model, waiter.query.api, 0, waiter.query.tried)
            if key in blocked:
                continue
            grant, decision = self.try_take(waiter.query)
            if grant is not None:
                waiter.future.set_result((grant, decision))
            elif decision.way is Way.NONE:
                waiter.future.set_exception(NoBackend(decision))
            else:
                blocked.add(key)
        self._arm()

    def _arm(self) -> None:
        """One timer, set to when the next waiter can start."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self.clock.now()
        times: list[float] = []
        for waiter in self._heads():
            lanes = [lane for lane in self.lanes.values() if self._usable(lane, waiter.query)]
            times.extend(lane.free_at(now, waiter.query.tokens, 0) for lane in lanes)
            times.append(self._emergency_at(lanes, now, 0))
        times = [at for at in times if at < math.inf]
        if times:
            delay = max(_LEAST_TICK_SECONDS, min(times) - now)
            self._timer = asyncio.get_running_loop().call_later(delay, self.wake)

    def _heads(self) -> list[Waiter]:
        seen: dict[Query, Waiter] = {}
        for waiter in self._waiters.values():
            if not waiter.future.done():
                key = Query(waiter.query.model, waiter.query.api, 0, waiter.query.tried)
                seen.setdefault(key, waiter)
        return list(seen.values())

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
