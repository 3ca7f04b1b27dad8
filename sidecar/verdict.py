"""What an upstream answer means for the request and for the backend: the error table."""

import email.utils
import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import StrEnum

from sidecar.lane import NEAR_LIMIT_FRACTION, Hints

_QUOTA_WORDS = (
    b"insufficient_quota",
    b"insufficient balance",
    b"quota_exceeded",
    b"exceeded your current quota",
)
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_EPOCH_FROM = 1_000_000_000.0
_DEFAULT_RESET_SECONDS = 60.0
Headers = Mapping[str, str]


class Verdict(StrEnum):
    """The class of an attempt's end."""

    OK = "ok"
    RATE_LIMITED = "rate_limited"
    QUOTA = "quota"
    KEY = "key_refused"
    FAILED = "failed"
    RETURN = "return"


_BY_STATUS = {
    400: Verdict.RETURN,
    401: Verdict.KEY,
    402: Verdict.QUOTA,
    403: Verdict.KEY,
    404: Verdict.RETURN,
    413: Verdict.RETURN,
    422: Verdict.RETURN,
    429: Verdict.RATE_LIMITED,
}
_OK = 200
_REDIRECT = 300
_CLIENT_ERROR = 400
_SERVER_ERROR = 500


def of_status(status: int, body: bytes) -> Verdict:
    """Classify a status; `body` tells a spent plan from a busy minute."""
    if _OK <= status < _REDIRECT:
        return Verdict.OK
    verdict = _BY_STATUS.get(status)
    if verdict is Verdict.RATE_LIMITED and any(word in body.lower() for word in _QUOTA_WORDS):
        return Verdict.QUOTA
    if verdict is not None:
        return verdict
    # Redirects are never followed: they would carry the key to another address.
    return Verdict.RETURN if _CLIENT_ERROR <= status < _SERVER_ERROR else Verdict.FAILED


def retry_after(headers: Headers, now: float) -> float | None:
    """Seconds from now that `Retry-After` asks for, in either form; None if absent or senseless."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - now
        except (ValueError, OverflowError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def reset_in(text: str, now: float) -> float | None:
    """Seconds until a rate header's reset: `6m0s`, `12.5`, an epoch or a date-time."""
    text = text.strip()
    try:
        number = float(text)
    except ValueError:
        parts = _DURATION.findall(text)
        if parts and "".join(a + b for a, b in parts) == text:
            return sum(float(amount) * _UNIT_SECONDS[unit] for amount, unit in parts)
        try:
            when = datetime.fromisoformat(text)
        except ValueError:
            return None
        return max(0.0, (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - now)
    if not math.isfinite(number):
        return None
    return max(0.0, number - now if number > _EPOCH_FROM else number)


def quota_resets_in(headers: Headers, now: float) -> float | None:
    """When a spent plan's window resets, where the provider says so (seconds from now)."""
    wait = retry_after(headers, now)
    if wait is not None:
        return wait
    for name in ("x-ratelimit-reset", "anthropic-ratelimit-unified-reset"):
        if name in headers:
            return reset_in(headers[name], now)
    return None


def hints(headers: Headers, now: float) -> Hints | None:
    """What the rate headers of an answer say about the next minute; None when it has none."""
    if not any("ratelimit" in name for name in headers):
        return None
    spent = near = 0.0
    for kind in ("requests", "tokens", "input-tokens", "output-tokens"):
        for remaining, limit, reset in (
            (f"x-ratelimit-remaining-{kind}", f"x-ratelimit-limit-{kind}", f"x-ratelimit-reset-{kind}"),
            (
                f"anthropic-ratelimit-{kind}-remaining",
                f"anthropic-ratelimit-{kind}-limit",
                f"anthropic-ratelimit-{kind}-reset",
            ),
        ):
            left = _number(headers, remaining)
            if left is None:
                continue
            wait = reset_in(headers.get(reset, ""), now)
            until = now + min(_DEFAULT_RESET_SECONDS if wait is None else wait, 86_400.0)
            total = _number(headers, limit)
            if left <= 0:
                spent = max(spent, until)
            elif (total and left <= total * NEAR_LIMIT_FRACTION) or left <= 1:
                near = max(near, until)
    return Hints(spent_until=spent, near_until=near)


def _number(headers: Headers, name: str) -> float | None:
    read: Callable[[str], float] = float
    try:
        number = read(headers[name])
    except (KeyError, ValueError):
        return None
    return number if math.isfinite(number) else None
