"""Rate windows, the cooldown ladder and the circuit breaker: pure, with time as an argument.

Nothing here awaits, sleeps or reads a clock, so taking a token is atomic on the
event loop and every rule can be tested by moving a number.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

WINDOW_SECONDS = 60.0
# A provider counts arrivals, we count departures. The difference is the time on the
# wire, which this margin absorbs; opening a connection is handled by `sent`.
WIRE_MARGIN_SECONDS = 0.1
_SLOTS_PER_SECOND = 4


class Start:
    """One start inside a window; `at` moves when the request really leaves."""

    __slots__ = ("at",)

    def __init__(self, at: float) -> None:
        self.at = at


class StartWindow:
    """Never more than `limit` starts in any `period` seconds, with no other cap on bursts.

    A start that was taken but has not left yet (its connection is being opened) holds its
    place however long that takes, and is counted from when it leaves.
    """

    __slots__ = ("_sent", "_slots", "_taken", "limit", "period")

    def __init__(self, limit: int, period: float = WINDOW_SECONDS) -> None:
        self.limit = limit
        self.period = period
        self._sent: deque[Start] = deque()
        self._taken: set[Start] = set()
        self._slots: deque[list[int]] = deque()

    def used(self, now: float) -> int:
        """Starts still inside the window, and those that have not left yet."""
        sent, edge = self._sent, now - self.period
        while sent and sent[0].at <= edge:
            sent.popleft()
        return len(sent) + len(self._taken)

    def take(self, now: float) -> Start | None:
        """A start, or None when the window is full."""
        if self.used(now) >= self.limit:
            return None
        start = Start(now)
        self._taken.add(start)
        return start

    def sent(self, start: Start, now: float) -> None:
        """The request leaves now: count it from here."""
        self._taken.discard(start)
        start.at = now
        self._sent.append(start)
        self._tally(now, 1)

    def give_back(self, start: Start) -> None:
        """The request was never sent."""
        self._taken.discard(start)

    def free_at(self, now: float, ahead: int = 0) -> float:
        """When a start becomes free for one who has `ahead` others before him (seconds, epoch)."""
        free = self.limit - self.used(now)
        if ahead < free:
            return now
        rounds, index = divmod(ahead - max(0, free), self.limit)
        index += max(0, -free)
        if index >= len(self._sent):
            return now + (rounds + 1) * self.period
        return self._sent[index].at + (rounds + 1) * self.period

    def _tally(self, at: float, count: int) -> None:
        """Count in quarters of a second, each rounded up: forgotten late, never early."""
        slot = math.ceil(at * _SLOTS_PER_SECOND)
        if self._slots and self._slots[-1][0] >= slot:
            self._slots[-1][1] += count
        else:
            self._slots.append([slot, count])

    def tally(self, now: float) -> list[tuple[float, int]]:
        """The starts inside the window as (seconds epoch, count), for keeping them across a restart.

        Summed up, because it is written several times a second and there may be thousands.
        """
        slots, edge = self._slots, (now - self.period) * _SLOTS_PER_SECOND
        while slots and slots[0][0] <= edge:
            slots.popleft()
        out = [(slot / _SLOTS_PER_SECOND, count) for slot, count in slots]
        return [*out, (now, len(self._taken))] if self._taken else out

    def restore(self, tally: Iterable[tuple[float, int]]) -> None:
        """Take over the starts of an earlier process."""
        self._sent, self._slots = deque(), deque()
        for at, count in sorted(tally):
            self._sent.extend(Start(at) for _ in range(count))
            self._tally(at, count)


class Reservation:
    """Tokens held for one request until its real usage is known."""

    __slots__ = ("amount", "at")

    def __init__(self, at: float, amount: int) -> None:
        self.at = at
        self.amount = amount


class TokenWindow:
    """At most `limit` tokens reserved or used in any `period` seconds."""

    __slots__ = ("_held", "_sum", "limit", "period")

    def __init__(self, limit: int, period: float = WINDOW_SECONDS) -> None:
        self.limit = limit
        self.period = period
        self._held: deque[Reservation] = deque()
        self._sum = 0

    def used(self, now: float) -> int:
        """Tokens still inside the window."""
        held, edge = self._held, now - self.period
        while held and held[0].at <= edge:
            self._sum -= held.popleft().amount
        return self._sum

    def fits(self, now: float, amount: int) -> bool:
        """Whether `amount` could be reserved; more than the limit fits an empty window."""
        return self.used(now) + min(amount, self.limit) <= self.limit

    def reserve(self, now: float, amount: int) -> Reservation | None:
        """Hold `amount` tokens, or None when they do not fit."""
        if not self.fits(now, amount):
            return None
        reservation = Reservation(now, min(amount, self.limit))
        self._held.append(reservation)
        self._sum += reservation.amount
        return reservation

    def settle(self, reservation: Reservation, amount: int, now: float) -> None:
        """Replace the estimate by what was really used (0 for a request never sent)."""
        self.used(now)
        if reservation.at > now - self.period:
            self._sum += amount - reservation.amount
        reservation.amount = amount

    def free_at(self, now: float, amount: int) -> float:
        """When `amount` tokens will fit (seconds, epoch)."""
        need = self.used(now) + min(amount, self.limit) - self.limit
        if need <= 0:
            return now
        for held in self._held:
            need -= held.amount
            if need <= 0:
                return held.at + self.period
        return now + self.period


@dataclass(frozen=True, slots=True)
class CooldownPolicy:
    """How long a 429 rests a backend; all in seconds."""

    base: float = 30.0
    cap: float = 600.0
    decay: float = 600.0
    exponential: bool = True
    quota: float = 3600.0
    quota_cap: float = 7 * 86_400.0

    def length(self, level: int) -> float:
        """Cooldown at a rung of the ladder, first rung 1."""
        if not self.exponential:
            return min(self.base, self.cap)
        # 2**40 is far beyond any cap; the bound keeps a huge level from overflowing.
        return min(self.cap, self.base * 2.0 ** min(40, max(0, level - 1)))


@dataclass(frozen=True, slots=True)
class Cooldown:
    """The ladder of one backend.

    A 429 climbs a rung only when its request started after the deadline in force: those
    that were already on their way fail together and count as the same episode. A rung is
    lost per `decay` seconds of success without another 429.
    """

    level: int = 0
    until: float = 0.0
    reason: str = ""
    recovered_at: float | None = None

    def cooling(self, now: float) -> bool:
        """Whether the backend rests."""
        return now < self.until

    def settled(self, now: float, policy: CooldownPolicy) -> "Cooldown":
        """The same ladder with the rungs that sustained success has taken off."""
        if self.recovered_at is None or self.level == 0:
            return self
        steps = int((now - self.recovered_at) // policy.decay)
        if steps <= 0:
            return self
        return replace(
            self, level=max(0, self.level - steps), recovered_at=self.recovered_at + steps * policy.decay
        )

    def hit(
        self, started: float, now: float, policy: CooldownPolicy, retry_after: float | None = None
    ) -> "Cooldown":
        """After a 429 of a request that started at `started`; `retry_after` in seconds from now."""
        current = self.settled(now, policy)
        level, until = current.level, current.until
        if started >= current.until or level == 0:
            level += 1
            until = max(until, now + policy.length(level))
        if retry_after is not None:
            until = max(until, now + min(retry_after, policy.cap))
        return Cooldown(level=level, until=until, reason=current.reason if until == current.until else "429")

    def exhausted(self, now: float, policy: CooldownPolicy, resets_in: float | None) -> "Cooldown":
        """After the plan's quota is used up: a long rest that leaves the ladder alone."""
        length = policy.quota if resets_in is None else min(resets_in, policy.quota_cap)
        until = max(self.until, now + length)
        return replace(self, until=until, reason="quota", recovered_at=None)

    def success(self, started: float, now: float) -> "Cooldown":
        """After a success: the first one begun after the deadline ends the episode."""
        if self.until == 0.0 or self.recovered_at is not None or started < self.until:
            return self
        return replace(self, recovered_at=now, reason="")


class Circuit(StrEnum):
    """State of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When failures eject a backend; durations in seconds."""

    window: float = 60.0
    min_samples: int = 5
    ratio: float = 0.5
    base: float = 15.0
    cap: float = 300.0
    lease: float = 120.0
    decay: float = 600.0


class Breaker:
    """Ejects a backend whose error ratio is too high, for a growing time.

    When the time is over one request at a time may probe it; the probe holds a lease, so
    that a probe which never reports does not close the door for ever.
    """

    __slots__ = ("_lease_until", "_samples", "ejections", "policy", "recovered_at", "until")

    def __init__(self, policy: BreakerPolicy) -> None:
        self.policy = policy
        self._samples: deque[tuple[float, bool]] = deque(maxlen=1000)
        self.until = 0.0
        self.ejections = 0
        self.recovered_at = 0.0
        self._lease_until = 0.0

    def state(self, now: float) -> Circuit:
        """Closed, open, or half-open once the ejection's time is over."""
        if self.until == 0.0:
            return Circuit.CLOSED
        return Circuit.OPEN if now < self.until else Circuit.HALF_OPEN

    def refuses(self, now: float) -> bool:
        """Whether ordinary traffic must stay away (a held lease refuses too)."""
        if self.until == 0.0:
            return False
        return now < self.until or now < self._lease_until

    def recovers_at(self) -> float:
        """When the next request may come (seconds, epoch)."""
        return max(self.until, self._lease_until)

    def lease(self, now: float) -> bool:
        """Mark a start; True when it is the probe of a half-open circuit."""
        if self.until == 0.0 or now < self.until or now < self._lease_until:
            return False
        self._lease_until = now + self.policy.lease
        return True

    def release(self, now: float) -> None:
        """The probe ended without a verdict (its caller left, or it was a 429)."""
        if self.until:
            self._lease_until = min(self._lease_until, now)

    def success(self, started: float, now: float) -> None:
        """A good answer; closes the circuit when it began after the ejection."""
        if self.until == 0.0:
            if self._samples:
                self._samples.append((now, True))
            return
        if started >= self.until:
            self.until = self._lease_until = 0.0
            self.recovered_at = now
            self._samples.clear()

    def failure(self, started: float, now: float) -> bool:
        """A failure that was the backend's fault; True when it ejected the backend."""
        if self.until:
            if started < self.until:
                return False
            return self._eject(now)
        self._samples.append((now, False))
        while self._samples and self._samples[0][0] <= now - self.policy.window:
            self._samples.popleft()
        bad = sum(1 for _, good in self._samples if not good)
        if len(self._samples) >= self.policy.min_samples and bad / len(self._samples) >= self.policy.ratio:
            return self._eject(now)
        return False

    def _eject(self, now: float) -> bool:
        if self.ejections and self.recovered_at:
            self.ejections = max(0, self.ejections - int((now - self.recovered_at) // self.policy.decay))
        self.ejections += 1
        self.recovered_at = 0.0
        self.until = now + min(self.policy.cap, self.policy.base * 2.0 ** min(40, self.ejections - 1))
        self._lease_until = 0.0
        self._samples.clear()
        return True

    def reset(self) -> None:
        """Forget everything (an admin cleared it)."""
        self._samples.clear()
        self.until = self._lease_until = self.recovered_at = 0.0
        self.ejections = 0
