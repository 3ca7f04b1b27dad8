"""``reconcile suspend`` and ``resume``: what people say about resources besides what git declares."""

from __future__ import annotations

import getpass
import os
import socket
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

from reconciler import assemble
from reconciler.desired.places import suggestion
from reconciler.kinds.base import seconds
from reconciler.model import ConfigurationError, Limits, Problem, ResourceId, Suspension
from reconciler.plan import covers
from reconciler.settings import Settings
from reconciler.store import Store, now_text


def suspend(
    settings: Settings, target: str, reason: str, *, until: str | None, owner: str | None
) -> dict[str, Any]:
    """Suspend what ``target`` covers. Raises ConfigurationError where that is nothing, or the end is past."""
    if not reason.strip():
        raise ConfigurationError("--reason: say why, for whoever finds it suspended")
    covered = _covered(settings, target)
    end = _moment(until) if until else None
    found = Suspension(reason.strip(), owner or _account(), end)
    with closing(Store(settings.db)) as store:
        store.suspend(target, found)
    how_long = f"until {now_text(end)}" if end else f"until: reconcile resume {target}"
    return {
        "target": target,
        "resources": [str(rid) for rid in covered],
        "reason": found.reason,
        "owner": found.owner,
        "until": now_text(end) if end else None,
        "said": f"{target}: {_count(covered)} left alone {how_long}",
    }


def resume(settings: Settings, target: str, reason: str) -> dict[str, Any]:
    """End the suspension of ``target``, and quarantine and waiting of what it covers. Raises ConfigurationError."""
    now = datetime.now(UTC)
    with closing(Store(settings.db)) as store, store.transaction():
        others = [t for t in store.suspensions() if t != target]
        was_suspended = store.resume(target)
        covered = _covered(settings, target) if not was_suspended else _covered_or_none(settings, target)
        known = store.history(Limits(), now)
        waiting = [rid for rid in covered if rid in known]
        for rid in waiting:
            store.forget_repairs(rid, counted_from=now)
    still = [other for other in others if any(covers(other, rid) for rid in covered)]
    said = f"{target}: " + ("no longer suspended" if was_suspended else "was not suspended")
    said += f"; {_count(waiting)} tried anew" if waiting else ""
    said += f"; still suspended by: {', '.join(still)}" if still else ""
    return {
        "target": target,
        "was_suspended": was_suspended,
        "begin_anew": [str(rid) for rid in waiting],
        "still_suspended_by": still,
        "reason": reason or None,
        "said": said,
    }


def _covered(settings: Settings, target: str) -> list[ResourceId]:
    desired, _wanted, inventory = assemble.desired_state(assemble.located(settings), assemble.Scope())
    found = [rid for rid in desired.resources if covers(target, rid)]
    if not found:
        known = [*inventory.nodes, *(str(rid) for rid in desired.resources)]
        hint = suggestion(target, known) or "NODE, NODE/KIND or NODE/KIND/NAME; * stands for any"
        raise ConfigurationError([Problem(f"{target!r} covers nothing that is declared", hint=hint)])
    return found


def _covered_or_none(settings: Settings, target: str) -> list[ResourceId]:
    """A suspension can be ended also where what it covered is not declared any more, or nothing is valid."""
    try:
        return _covered(settings, target)
    except ConfigurationError:
        return []


def _moment(text: str) -> datetime:
    now = datetime.now(UTC)
    try:
        found = now + timedelta(seconds=seconds(text))
    except ValueError:
        try:
            found = datetime.fromisoformat(text)
        except ValueError:
            raise ConfigurationError(
                f"--until: {text!r} is neither a duration (2h, 3d) nor an ISO date"
            ) from None
    found = found if found.tzinfo else found.replace(tzinfo=UTC)
    if found <= now:
        raise ConfigurationError(f"--until: {text} is over already")
    return found


def _count(found: list[ResourceId]) -> str:
    return "1 resource is" if len(found) == 1 else f"{len(found)} resources are"


def _account() -> str:
    return f"{os.environ.get('SUDO_USER') or getpass.getuser()}@{socket.gethostname()}"
