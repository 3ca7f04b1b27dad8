"""``reconcile now``: ask the running service for a pass, and say what became of it."""

from __future__ import annotations

import getpass
import time
from contextlib import closing
from typing import Any

from reconciler import asks
from reconciler.desired.places import suggestion
from reconciler.instance import running
from reconciler.kinds.base import seconds
from reconciler.model import ConfigurationError, Problem, ResourceId
from reconciler.plan import covers
from reconciler.settings import Settings
from reconciler.store import Store

LOOK_SECONDS = 0.2


def now(settings: Settings, target: str, *, wait: bool, timeout: str) -> dict[str, Any]:
    """Ask, and wait until it is taken, or with ``wait`` until the pass is over. Raises ConfigurationError."""
    try:
        until = time.monotonic() + seconds(timeout)
    except ValueError as error:
        raise ConfigurationError([Problem(f"--timeout: {error}")]) from None
    if running(settings.db) is None:
        hint = "make the pass here: reconcile --once; or start it: reconcile"
        raise ConfigurationError([Problem(f"nothing runs continuously on {settings.db}", hint=hint)])
    with closing(Store(settings.db)) as store:
        _refuse_unseen(store, target)
        number = asks.ask(store, target, getpass.getuser())
        wanted = ("done",) if wait else ("taken", "done")
        while (found := asks.state(store, number) or {})["state"] not in wanted:
            if time.monotonic() > until:
                asks.withdraw(store, number)
                raise ConfigurationError([_too_late(found["state"], timeout)])
            time.sleep(LOOK_SECONDS)
    if found["problem"]:
        raise ConfigurationError([Problem(f"no pass was made: {found['problem']}")])
    return {**found, "said": _said(found, target)}


def _refuse_unseen(store: Store, target: str) -> None:
    """A mistyped name is said at once: a request is acknowledged before its pass reads what is declared."""
    seen = [ResourceId.parse(key) for key in store.conditions()]
    if target and seen and not any(covers(target, rid) for rid in seen):
        known = sorted({*(rid.node for rid in seen), *map(str, seen)})
        message = f"nothing that passes have looked at is called {target}"
        raise ConfigurationError([Problem(message, hint=suggestion(target, known))])


def _too_late(state: str, timeout: str) -> Problem:
    if state == "taken":
        return Problem(f"the pass is not over after {timeout}", hint="it goes on; see reconcile status")
    hint = "a pass under way is finished first; the request was withdrawn"
    return Problem(f"the request was not taken within {timeout}", hint=hint)


def _said(found: dict[str, Any], target: str) -> str:
    what = target or "everything"
    if found["state"] == "taken":
        return f"A pass over {what} has begun; see reconcile status."
    return f"The pass over {what} ended with exit code {found['exit_code']} (run {found['run_id']})."
