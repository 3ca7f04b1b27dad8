"""Episodes of drift, read back from events: when something was detected, when it was as desired again, and how."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from reconciler.model import ResourceId, Status
from reconciler.store import Store, now_text

PERIOD = timedelta(days=30)
_NEWEST = 20_000
"""So many events are read at most: a store that nobody prunes stays readable."""


@dataclass(frozen=True, slots=True)
class Episode:
    """From ``detected`` to the ``fixed`` that ended it.

    One with neither an end nor ``is_open`` was given up on: its declaration went away. ``attempts`` counts what was
    tried, ``failed`` what of that did not hold.
    """

    id: ResourceId
    began: datetime
    ended: datetime | None = None
    is_open: bool = False
    attempts: int = 0
    failed: int = 0
    cause: str = ""
    reason: str = ""

    @property
    def seconds(self) -> float | None:
        """How long it took, nothing where a clock was set back; None while it has no end."""
        return max(0.0, (self.ended - self.began).total_seconds()) if self.ended else None

    @property
    def state(self) -> str:
        """``fixed``, ``open`` or ``over``."""
        return "fixed" if self.ended else "open" if self.is_open else "over"


@dataclass(frozen=True, slots=True)
class Repair:
    """Times to repair of one kind, in seconds; None where nothing has been repaired. ``open`` ones are apart."""

    kind: str
    count: int
    open: int
    mean: float | None
    median: float | None
    p95: float | None
    longest: float | None


def episodes(rows: Iterable[Mapping[str, Any]], open_keys: AbstractSet[str]) -> list[Episode]:
    """Episodes of events in their order, oldest beginning first; ``open_keys`` are what is not as desired now.

    Rows that others wrote into the table, with times or keys that are none, belong to no episode.
    """
    running: dict[str, Episode] = {}
    ended: list[Episode] = []
    for row in rows:
        key = row["issue_key"]
        try:
            rid, moment = ResourceId.parse(key), _moment(row["timestamp"])
        except ValueError:
            continue
        if row["status"] == Status.DETECTED:
            if key in running:
                ended.append(running.pop(key))
            running[key] = Episode(rid, moment, cause=row["cause"] or "", reason=row["reason"] or "")
        elif key in running:
            running[key] = _after(running[key], row, moment)
            if running[key].ended:
                ended.append(running.pop(key))
    ended += [replace(episode, is_open=key in open_keys) for key, episode in running.items()]
    return sorted(ended, key=lambda episode: (episode.began, episode.id))


def _moment(text: str) -> datetime:
    """A time; one that says no zone is taken for UTC, as we write it. Raises ValueError."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _after(before: Episode, row: Mapping[str, Any], moment: datetime) -> Episode:
    is_fixed = row["status"] == Status.FIXED
    tried = 1 if row["fix_attempts"] else 0
    return replace(
        before,
        ended=moment if is_fixed else None,
        attempts=before.attempts + tried,
        failed=before.failed + (0 if is_fixed else tried),
        reason=row["reason"] or before.reason,
    )


def episodes_since(store: Store, since: datetime) -> list[Episode]:
    """Every episode that was going on at ``since`` or later."""
    open_keys = {
        row["issue_key"]
        for row in store.db.query("SELECT issue_key FROM conditions WHERE json_extract(details, '$.open')")
    }
    moment = since.astimezone(UTC).isoformat(timespec="milliseconds")
    rows = store.db.query(_EVENTS, {"since": moment, "newest": _NEWEST})
    found = episodes(rows, open_keys)
    return [e for e in found if e.is_open or (e.ended or e.began) >= since]


# Of everything that had an event since then, and of what is open, also the detection that lies further back.
_EVENTS = """
WITH concerned AS (
    SELECT DISTINCT issue_key FROM guardian_events WHERE timestamp >= :since
    UNION SELECT issue_key FROM conditions WHERE json_extract(details, '$.open')
), begun AS (
    SELECT (SELECT max(id) FROM guardian_events d WHERE d.issue_key = c.issue_key AND d.status = 'detected'
            AND d.timestamp < :since) AS id FROM concerned c
), chosen AS (
    SELECT e.id, e.timestamp, e.issue_key, e.status, e.fix_attempts,
        json_extract(e.details, '$.cause') AS cause, json_extract(e.details, '$.reason') AS reason
    FROM guardian_events e LEFT JOIN begun b ON b.id = e.id
    WHERE e.status != 'fixing' AND (b.id IS NOT NULL OR e.timestamp >= :since)
    ORDER BY e.id DESC LIMIT :newest
) SELECT * FROM chosen ORDER BY id
"""


def repairs(found: Iterable[Episode]) -> list[Repair]:
    """Times to repair per kind, by name."""
    by_kind: dict[str, list[Episode]] = {}
    for episode in found:
        by_kind.setdefault(episode.id.kind, []).append(episode)
    return [_repair(kind, rows) for kind, rows in sorted(by_kind.items())]


def _repair(kind: str, found: Iterable[Episode]) -> Repair:
    rows = list(found)
    times = sorted(e.seconds for e in rows if e.seconds is not None)
    mean = sum(times) / len(times) if times else None
    still = sum(e.is_open for e in rows)
    return Repair(kind, len(times), still, mean, _rank(times, 0.5), _rank(times, 0.95), _rank(times, 1.0))


def _rank(times: list[float], share: float) -> float | None:
    """The value that ``share`` of all do not exceed (nearest rank)."""
    return times[math.ceil(share * len(times)) - 1] if times else None


def as_json(episode: Episode) -> dict[str, Any]:
    """An episode as programs and the page get it."""
    return {
        "resource": str(episode.id),
        "node": episode.id.node,
        "kind": episode.id.kind,
        "name": episode.id.name,
        "state": episode.state,
        "began": now_text(episode.began),
        "ended": now_text(episode.ended) if episode.ended else None,
        "seconds": episode.seconds,
        "attempts": episode.attempts,
        "failed": episode.failed,
        "cause": episode.cause,
        "reason": episode.reason,
    }


def repair_json(found: Repair) -> dict[str, Any]:
    """Times to repair as programs and the page get them."""
    return {
        "kind": found.kind,
        "count": found.count,
        "open": found.open,
        "mean_seconds": found.mean,
        "median_seconds": found.median,
        "p95_seconds": found.p95,
        "longest_seconds": found.longest,
    }


def took(seconds: float | None) -> str:
    """A length of time for people: ``4.2 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 d 4 h``."""
    if seconds is None:
        return "-"
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"  # noqa: PLR2004 - two digits are enough
    units = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
    large, name, small, rest = next(unit for unit in units if seconds >= unit[0])
    whole, left = divmod(int(seconds), large)
    return f"{whole} {name}" + (f" {left // small} {rest}" if left // small else "")
