"""What an attempt cost, summed up in memory between two writes."""

from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from sidecar.model import Usage

_HOUR_SECONDS = 3600


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


class Ledger:
    """Sums waiting to be written. Adding costs microseconds; the writer takes all at once.

    The lock is held for the addition alone: the writer runs in its own thread.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._sums: dict[Key, Sum] = {}
        self.total = Sum()

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
