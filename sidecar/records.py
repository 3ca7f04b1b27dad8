"""What an attempt cost, summed up in memory between two writes."""

from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from sidecar.model import Usage

_HOUR_SECONDS = 3600
_MINUTE_SECONDS = 60


class Key(NamedTuple):
    """The row a record belongs to. `hour` is an epoch in seconds."""

    hour: int
    backend_id: str
    model: str
    client_id: str
    pool: str


@dataclass(slots=True)
class Sum:
    """Sums of one row; latencies in milliseconds, cost in US dollars."""

    requests: int = 0
    errors: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    estimated: int = 0
    cost: float = 0.0
    latency_ms: float = 0.0
    ttft_ms: float = 0.0
    ttft_count: int = 0

    def add(self, other: "Sum") -> None:
        """Add another row's sums."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class RecentCalls:
    """One client's attempts of the last while; the share and the mean (seconds) are None where there were none."""

    attempts: int = 0
    rate_429: float | None = None
    response_seconds: float | None = None


@dataclass(slots=True)
class _Minute:
    attempts: int = 0
    limited: int = 0
    answered: int = 0
    seconds: float = 0.0


class Recent:
    """Attempts per client over the last `minutes`, by the minute: 15 small rows for a client, however busy it is.

    The mean is over answers alone: a refusal takes no time and would make a provider look fast.
    """

    def __init__(self, minutes: int = 15) -> None:
        self.minutes = minutes
        self._rows: dict[str, dict[int, _Minute]] = {}

    def add(self, client_id: str, now: float, seconds: float, *, limited: bool, answered: bool) -> None:
        """Count one attempt that was sent; `limited` when it was answered with 429."""
        rows = self._rows.setdefault(client_id, {})
        minute = int(now) // _MINUTE_SECONDS
        row = rows.get(minute)
        if row is None:
            row = rows[minute] = _Minute()
            self._drop_old(rows, minute)
        row.attempts += 1
        row.limited += limited
        if answered:
            row.answered += 1
            row.seconds += seconds

    def _drop_old(self, rows: dict[int, _Minute], minute: int) -> None:
        for old in [number for number in rows if number <= minute - self.minutes]:
            del rows[old]

    def of(self, client_id: str, now: float) -> RecentCalls:
        """What is known of a client now."""
        rows = self._rows.get(client_id, {})
        self._drop_old(rows, int(now) // _MINUTE_SECONDS)
        attempts = sum(row.attempts for row in rows.values())
        if not attempts:
            self._rows.pop(client_id, None)
            return RecentCalls()
        answered = sum(row.answered for row in rows.values())
        mean = sum(row.seconds for row in rows.values()) / answered if answered else None
        return RecentCalls(attempts, sum(row.limited for row in rows.values()) / attempts, mean)


class Ledger:
    """Sums waiting to be written. Adding costs microseconds; the writer takes all at once.

    The lock is held for the addition alone: the writer runs in its own thread.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._sums: dict[Key, Sum] = {}
        self.total = Sum()
        self.recent = Recent()

    def add(
        self, key: Key, usage: Usage, *, cost: float, latency_ms: float, ttft_ms: float | None, error: bool
    ) -> None:
        """Book one attempt that was sent."""
        with self._lock:
            row = self._sums.get(key)
            if row is None:
                row = self._sums[key] = Sum()
            for one in (row, self.total):
                one.requests += 1
                one.errors += error
                one.prompt += usage.prompt
                one.completion += usage.completion
                one.cached += usage.cache_read
                one.estimated += usage.estimated
                one.cost += cost
                one.latency_ms += latency_ms
                if ttft_ms is not None:
                    one.ttft_ms += ttft_ms
                    one.ttft_count += 1

    def take(self) -> dict[Key, Sum]:
        """Everything since the last take."""
        with self._lock:
            taken, self._sums = self._sums, {}
            return taken

    def put_back(self, taken: dict[Key, Sum]) -> None:
        """A write failed: keep its sums for the next."""
        with self._lock:
            for key, row in taken.items():
                if key in self._sums:
                    self._sums[key].add(row)
                else:
                    self._sums[key] = row


def hour_of(now: float) -> int:
    """The start of the hour of an instant (seconds, epoch)."""
    return int(now) // _HOUR_SECONDS * _HOUR_SECONDS
