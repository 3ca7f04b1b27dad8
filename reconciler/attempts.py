"""When a repair that failed is tried again, and when it is not tried at all. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

from reconciler.model import Limits, Policy, Repairs, Resource

BACK_OFF_CAP = 3600.0
# After this many failures in a row, or after the last attempt of the episode, it is tried slowly, never not at all.
ERROR_BUDGET = 3
REARM, REARM_CAP = 3600.0, 86400.0
# So many passes in a row that could not run end the process: a supervisor starts it anew.
LOOP_BUDGET = 10
# Waits are stretched by up to this share, so that what failed together is not tried together for ever.
JITTER = 0.25


def after_failure(before: Repairs, resource: Resource, now: datetime, spread: float) -> Repairs:
    """The state after one more failed attempt; ``spread`` is a random number in [0, 1)."""
    policy = resource.policy
    attempts = (before.attempts if before.digest == resource.digest else 0) + 1
    wait = delay(policy, attempts) * (1 + JITTER * spread)
    return Repairs(
        attempts=attempts,
        digest=resource.digest,
        last_attempt=now,
        next_attempt=now + timedelta(seconds=wait),
        exhausted=attempts >= policy.max_attempts,
        corrections=before.corrections,
        quarantined_until=before.quarantined_until,
    )


def delay(policy: Policy, attempts: int) -> float:
    """Seconds until the next attempt after ``attempts`` failures in a row, without jitter."""
    budget = min(policy.max_attempts, ERROR_BUDGET)
    if attempts < budget:
        return float(min(BACK_OFF_CAP, policy.retry_interval * 2 ** (attempts - 1)))
    return float(min(REARM_CAP, max(REARM, policy.retry_interval) * 2 ** min(attempts - budget, 20)))


def is_due(repairs: Repairs, resource: Resource, now: datetime) -> bool:
    """Whether it may be tried now: a new declaration always, else when its time has come.

    A last attempt in the future means that the clock was set back: nobody waits for that.
    """
    if repairs.digest != resource.digest or repairs.next_attempt is None or repairs.last_attempt is None:
        return True
    return now >= repairs.next_attempt or now < repairs.last_attempt


def is_flapping(repairs: Repairs, limits: Limits, now: datetime) -> bool:
    """Whether it was put right so often that something else must be changing it back."""
    quarantined = repairs.quarantined_until is not None and now < repairs.quarantined_until
    return quarantined or repairs.corrections >= limits.max_corrections


def loop_pause(interval: float, failures: int) -> float:
    """Seconds between passes when the last ``failures`` in a row could not run: longer from the third on."""
    return interval * 2.0 ** min(max(0, failures - ERROR_BUDGET + 1), 4)
