"""Which backend gets a request, and why the others do not: one pure decision.

Primary pool, then fallback pool, then the emergency lane (or the least bad when
everything is merely ejected), else wait for a token, else refuse.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from sidecar.lane import Lane, Query
from sidecar.model import Pool


class Way(StrEnum):
    """How the chosen candidates may be used."""

    POOL = "pool"
    EMERGENCY = "emergency"
    FAIL_OPEN = "fail-open"
    WAIT = "wait"
    NONE = "none"


class Why(StrEnum):
    """Why a backend is, or is not, a candidate."""

    OK = "ok"
    DISABLED = "disabled"
    API = "other api"
    MODEL = "does not serve the model"
    KEY = "key refused by the provider"
    KEY_UNREADABLE = "key cannot be decrypted"
    TRIED = "already tried"
    COOLING = "cooling"
    EJECTED = "ejected"
    NO_START = "no request token left"
    NO_TOKENS = "no token budget left"


@dataclass(frozen=True, slots=True)
class Decision:
    """Candidates in order, how to use them, and a reason for every backend."""

    way: Way
    order: tuple[Lane, ...]
    reasons: tuple[tuple[str, Why], ...]
    known: bool


def judge(lane: Lane, query: Query, now: float) -> Why:  # noqa: C901, PLR0911 - a table of reasons, in order
    """One backend against one request."""
    backend = lane.backend
    if backend.api != query.api:
        return Why.API
    if not backend.serves(query.model):
        return Why.MODEL
    if not backend.enabled:
        return Why.DISABLED
    if backend.key_error:
        return Why.KEY_UNREADABLE
    if lane.quarantine:
        return Why.KEY
    if backend.id in query.tried:
        return Why.TRIED
    if now < lane.cooldown.until:
        return Why.COOLING
    if lane.breaker.refuses(now):
        return Why.EJECTED
    if lane.starts.used(now) >= lane.starts.limit:
        return Why.NO_START
    if lane.tokens is not None and not lane.tokens.fits(now, query.tokens):
        return Why.NO_TOKENS
    return Why.OK


def rank(lane: Lane, now: float) -> tuple[bool, bool, bool, int, int, str]:
    """Order among candidates: spent last of all, then pool, near its limit, priority, least used."""
    hints, backend = lane.hints, lane.backend
    return (
        now < hints.spent_until,
        backend.pool is Pool.FALLBACK,
        now < hints.near_until,
        backend.priority,
        lane.starts.used(now) + lane.count.in_flight,
        backend.id,
    )


def decide(lanes: Iterable[Lane], query: Query, now: float, precheck: float = 0.0) -> Decision:
    """The decision for one request at one instant.

    `precheck`: when every backend rests and the nearest recovers within this many
    seconds, waiting for it is kinder to the provider than the emergency lane.
    """
    judged = [(lane, judge(lane, query, now)) for lane in lanes]
    reasons = tuple((lane.backend.id, why) for lane, why in judged)
    known = any(why not in (Why.API, Why.MODEL) for _, why in judged)
    ready = [lane for lane, why in judged if why is Why.OK]
    if ready:
        if len(ready) > 1:
            ready.sort(key=lambda lane: rank(lane, now))
        return Decision(Way.POOL, tuple(ready), reasons, known)
    if any(why in (Why.NO_START, Why.NO_TOKENS) for _, why in judged):
        return Decision(Way.WAIT, (), reasons, known)
    resting = [lane for lane, why in judged if why in (Why.COOLING, Why.EJECTED)]
    if not resting:
        return Decision(Way.NONE, (), reasons, known)
    resting.sort(key=lambda lane: (lane.rests_until(), lane.backend.id))
    if all(now >= lane.cooldown.until for lane in resting):
        return Decision(Way.FAIL_OPEN, tuple(resting), reasons, known)
    if resting[0].rests_until() - now <= precheck:
        return Decision(Way.WAIT, (), reasons, known)
    return Decision(Way.EMERGENCY, (resting[0],), reasons, known)
