"""A backend at run time: its configuration and everything the limits know about it."""

from dataclasses import dataclass, field

from sidecar.limits import (
    WINDOW_SECONDS,
    WIRE_MARGIN_SECONDS,
    Breaker,
    BreakerPolicy,
    Cooldown,
    CooldownPolicy,
    Reservation,
    Start,
    StartWindow,
    TokenWindow,
)
from sidecar.model import Backend
from sidecar.settings import HotSettings

_PERIOD = WINDOW_SECONDS + WIRE_MARGIN_SECONDS
NEAR_LIMIT_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class Hints:
    """What a provider's rate headers said: how much is left and until when (seconds, epoch)."""

    spent_until: float = 0.0
    near_until: float = 0.0


@dataclass(frozen=True, slots=True)
class Grant:
    """Leave to send one request to one backend; given back or settled exactly once."""

    lane: "Lane"
    at: float
    start: Start
    reservation: Reservation | None
    emergency: Start | None
    probe: bool
    generation: int


@dataclass(slots=True)
class Counters:
    """What the dashboard shows of a backend since the start."""

    in_flight: int = 0
    attempts: int = 0
    errors: int = 0
    last_error: str = ""
    last_status: int = 0
    last_probe: str = ""


class Lane:
    """One backend's windows, ladder, breaker and key state."""

    def __init__(self, backend: Backend, hot: HotSettings) -> None:
        self.backend = backend
        self.starts = StartWindow(backend.rpm_limit, _PERIOD)
        self.emergency = StartWindow(1, _PERIOD)
        self.tokens: TokenWindow | None = None
        self.cooldown = Cooldown()
        self.breaker = Breaker(BreakerPolicy())
        self.policy = CooldownPolicy()
        self.quarantine = ""
        self.generation = 0
        self.hints = Hints()
        self.count = Counters()
        self.apply(hot)

    def apply(self, hot: HotSettings) -> None:
        """Take over changed settings without losing what is counted."""
        self.policy = CooldownPolicy(
            base=hot.cooldown_base_seconds,
            cap=hot.cooldown_max_seconds,
            decay=hot.cooldown_decay_seconds,
            exponential=hot.exponential_backoff,
            quota=hot.cooldown_quota_seconds,
        )
        self.breaker.policy = BreakerPolicy(
            window=hot.breaker_window_seconds,
            min_samples=hot.breaker_min_samples,
            ratio=hot.breaker_error_ratio,
            base=hot.breaker_base_seconds,
            cap=hot.breaker_max_seconds,
            lease=hot.request_timeout_seconds,
        )
        limit = self.backend.rpm_limit
        self.starts.limit = limit
        self.emergency.limit = min(limit, max(1, int(limit * hot.emergency_rpm_fraction)))
        if self.backend.tpm_limit is None:
            self.tokens = None
        elif self.tokens is None:
            self.tokens = TokenWindow(self.backend.tpm_limit, _PERIOD)
        else:
            self.tokens.limit = self.backend.tpm_limit

    def configure(self, backend: Backend, hot: HotSettings) -> None:
        """Take over a changed backend; a new key or address lifts a quarantine."""
        old, self.backend = self.backend, backend
        if (old.api_key, old.api_base_url) != (backend.api_key, backend.api_base_url):
            self.quarantine = ""
            self.generation += 1
        self.apply(hot)

    def resting(self, now: float) -> bool:
        """Cooling after a 429, or ejected after failures."""
        return now < self.cooldown.until or self.breaker.refuses(now)

    def rests_until(self) -> float:
        """When ordinary traffic may come again (seconds, epoch; 0 when it may now)."""
        return max(self.cooldown.until, self.breaker.recovers_at())

    def take(self, now: float, tokens: int, *, emergency: bool) -> Grant | None:
        """Take a start (and token reservation) at once, or nothing at all."""
        lane_start = None
        if emergency and (lane_start := self.emergency.take(now)) is None:
            return None
        start = self.starts.take(now)
        reservation = self.tokens.reserve(now, tokens) if start and self.tokens else None
        if start is None or (self.tokens is not None and reservation is None):
            if start is not None:
                self.starts.give_back(start)
            if lane_start is not None:
                self.emergency.give_back(lane_start)
            return None
        probe = self.breaker.lease(now)
        self.count.in_flight += 1
        return Grant(self, now, start, reservation, lane_start, probe, self.generation)

    def sent(self, grant: Grant, now: float) -> None:
        """The request leaves now: the windows count it from here."""
        self.starts.sent(grant.start, now)
        if grant.emergency is not None:
            self.emergency.sent(grant.emergency, now)

    def give_back(self, grant: Grant, now: float) -> None:
        """The request was never sent."""
        self.starts.give_back(grant.start)
        if grant.emergency is not None:
            self.emergency.give_back(grant.emergency)
        self.settle(grant, 0, now)

    def settle(self, grant: Grant, tokens: int, now: float) -> None:
        """The attempt is over, with this many tokens really used."""
        self.count.in_flight -= 1
        if grant.reservation is not None and self.tokens is not None:
            self.tokens.settle(grant.reservation, tokens, now)
        if grant.probe:
            self.breaker.release(now)

    def free_at(self, now: float, tokens: int, ahead: int) -> float:
        """When one with `ahead` others before him could start here (seconds, epoch)."""
        at = max(self.starts.free_at(now, ahead), self.rests_until())
        return at if self.tokens is None else max(at, self.tokens.free_at(now, tokens))

    def status(self, now: float) -> str:
        """One word: healthy, cooling, error or disabled."""
        if not self.backend.enabled:
            return "disabled"
        if self.quarantine or self.backend.key_error:
            return "error"
        return "cooling" if self.resting(now) else "healthy"


@dataclass(frozen=True, slots=True)
class Query:
    """What routing needs to know of a request."""

    model: str
    api: str
    tokens: int = 0
    tried: frozenset[str] = field(default_factory=frozenset)
