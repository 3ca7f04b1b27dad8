"""Maintenance windows: cron expressions in a time zone. The only importer of cronsim. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from reconciler.model import Window


def problem(window: Window) -> tuple[str, str, str] | None:
    """What is wrong with it: the field, the message and a hint; None where nothing is."""
    try:
        zone = ZoneInfo(window.timezone)
    except (LookupError, ValueError, OSError):
        return (
            "timezone",
            f"{window.timezone!r} is no time zone",
            'write one such as "Europe/Berlin" or "UTC"',
        )
    try:
        next(CronSim(window.cron, datetime(2026, 1, 1, tzinfo=zone)))
    except StopIteration:
        return "cron", f"{window.cron!r} names no time that ever comes", ""
    except CronSimError as error:
        hint = 'five fields: minute hour day month weekday, such as "0 2 * * 1-5"'
        return "cron", f"{window.cron!r} is no cron expression: {error}", hint
    return None


def is_open(window: Window, now: datetime) -> bool:
    """Whether a repair may begin at ``now`` (aware)."""
    opened = next_opening(window, now - timedelta(seconds=window.duration))
    return opened is not None and opened <= now


def next_opening(window: Window, now: datetime) -> datetime | None:
    """The first opening after ``now``, or None where none ever comes."""
    try:
        return next(CronSim(window.cron, now.astimezone(ZoneInfo(window.timezone))))
    except StopIteration:
        return None
