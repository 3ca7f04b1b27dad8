"""When what is looked at again in continuous mode. Pure: times are seconds of a clock that nobody can set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from reconciler.model import Mode, Resource, ResourceId


@dataclass
class Schedule:
    """Every resource is looked at once per its own interval, or per ``interval`` where it declares none.

    When what is looked at least often has its turn, so has everything else: a pass over the whole fleet comes
    at least that often. Intervals are multiplied by ``jitter``, which whoever runs the passes draws anew after each,
    so that controllers that were started together do not beat in step.
    """

    interval: float
    jitter: float = 1.0
    intervals: dict[ResourceId, float] = field(default_factory=dict)
    looked: dict[ResourceId, float] = field(default_factory=dict)
    retries: dict[ResourceId, float] = field(default_factory=dict)
    last: float | None = None

    def seen(
        self,
        resources: Iterable[ResourceId],
        everything: Iterable[Resource],
        began: float,
        retries: Mapping[ResourceId, float],
    ) -> None:
        """A pass that began at ``began`` looked at ``resources``; ``retries`` says when what failed may be tried."""
        self.intervals = {
            resource.id: resource.policy.interval or self.interval
            for resource in everything
            if resource.policy.mode is not Mode.IGNORE
        }
        self.looked |= dict.fromkeys(resources, began)
        self.looked = {rid: when for rid, when in self.looked.items() if rid in self.intervals}
        self.retries = {rid: when for rid, when in retries.items() if rid in self.intervals}
        self.last = began

    def missed(self, began: float, pause: float) -> None:
        """A pass that was to begin at ``began`` could not be made: the next may, after ``pause`` seconds, over all."""
        self.intervals, self.looked, self.retries = {}, {}, {}
        self.last = began + pause - self.interval * self.jitter

    def next_at(self) -> float | None:
        """When something is due; None before the first pass: now."""
        if self.last is None:
            return None
        turns = [*map(self._turn, self.intervals), *self.retries.values()]
        return min(turns, default=self.last + self.interval * self.jitter)

    def rested(self, now: float) -> frozenset[ResourceId] | None:
        """What a pass that begins now may leave out; None where nothing is due."""
        at = self.next_at()
        if at is not None and now < at:
            return None
        late = {rid for rid in self.intervals if self._turn(rid) <= now}
        longest = max(self.intervals.values(), default=0.0)
        if at is None or not self.intervals or any(self.intervals[rid] == longest for rid in late):
            return frozenset()
        late |= {rid for rid, when in self.retries.items() if when <= now}
        return frozenset(self.intervals) - late

    def _turn(self, rid: ResourceId) -> float:
        """When it is this one's turn; what was never looked at has its turn at once."""
        looked = self.looked.get(rid)
        return 0.0 if looked is None else looked + self.intervals[rid] * self.jitter
